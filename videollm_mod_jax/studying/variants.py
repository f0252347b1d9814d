"""The variants of the study, as data: what each changes, and what the paper found for it.

The paper is arXiv 2408.16730; its numbers are those of Ego4D narration (Tables 1 to 3).
"""

import dataclasses
from collections.abc import Mapping

from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models.config import (
    RoutingConfig,
    VideoLLMConfig,
    early_exit,
    full_computation,
    layer_skip,
)
from videollm_mod_jax.models.plan import routed_layers

FULL, MOD, ONLINE = "full", "mod", "online"
EARLY_EXIT, LAYER_SKIP = "early-exit", "layer-skip"
# Of the study's four; the paper leaves after 2 of 32, which is nearer to 1 than to 2.
EXIT_LAYER = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """What the paper prints for a variant; None where it prints nothing.

    Attributes:
      lm_ppl, time_diff, fluency, lm_correctness: the last two in per cent.
      tflops: its "FLOPs", in units of 10^12.
      hours: of training on eight A100.
    """

    lm_ppl: float | None = None
    time_diff: float | None = None
    fluency: float | None = None
    lm_correctness: float | None = None
    tflops: float | None = None
    hours: float | None = None


NOTHING = Published()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of a table.

    Attributes:
      name: of the variant, as `--only` takes it.
      title: what the tables call it.
      routing: what it changes of the routing of the config; a whole `RoutingConfig` for a baseline
        that has one of its own.
      summary_only: a frame is its CLS token alone.
      published: what the paper says of it.
    """

    name: str
    title: str
    routing: RoutingConfig
    summary_only: bool = False
    published: Published = NOTHING

    def model(self, config: VideoLLMConfig) -> VideoLLMConfig:
        """The model of the study with the routing of this variant."""
        vision = config.vision
        if self.summary_only:
            vision = dataclasses.replace(vision, pool=(0, 0))
        return dataclasses.replace(config, routing=self.routing, vision=vision)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the report.

    Attributes:
      name: heading.
      text: what it asks, in a sentence.
      rows: names of variants.
    """

    name: str
    text: str
    rows: tuple[str, ...]


TABLES = (
    Table(
        name="Methods",
        text="Table 1 of the paper: what is computed for vision tokens, and what it costs.",
        rows=(ONLINE, FULL, EARLY_EXIT, LAYER_SKIP, MOD),
    ),
    Table(
        name="Insertion",
        text="Table 2 of the paper: which layers route.",
        rows=("all", "all-deep", MOD, "interleaved-deep"),
    ),
    Table(
        name="Selection and keep ratio",
        text="Table 3 of the paper: which tokens a routed layer computes, and how many.",
        rows=("random", "uniform", "keep-0.1", MOD, "keep-0.3", "keep-0.5"),
    ),
    Table(
        name="Selection in all layers",
        text="Not in the paper: the same choice at r = 0.2 where no dense layer comes before, so "
        "that a kept token knows its own patch and nothing of those beside it.",
        rows=("all-uniform", "all"),
    ),
    Table(
        name="Weighting, schedule, the last token and exploration",
        text="Choices that the paper does not compare: what the update of a kept token is "
        "multiplied by, a keep ratio that falls with depth, always keeping the token at which "
        "silence is decided, and drawing the kept tokens of some frames at random while training.",
        rows=(
            MOD,
            "tanh1",
            "paper",
            "official",
            "unweighted",
            "decaying",
            "keep-last",
            "no-exploration",
        ),
    ),
)


def variants(config: VideoLLMConfig) -> Mapping[str, Variant]:
    """All variants by name, in the order in which they are run.

    Args:
      config: the model of the study; its routing is that of `mod`, and the others change one thing
        of it.
    """
    routing, layers = config.routing, config.decoder.num_layers

    def changed(**changes: object) -> RoutingConfig:
        if changes.get("selection", "learned") != "learned":
            changes["exploration"] = 0.0
        return dataclasses.replace(routing, **changes)

    mod = Published(
        lm_ppl=2.41, time_diff=2.04, fluency=45.2, lm_correctness=48.9, tflops=30.74, hours=14
    )
    all_of_them = (
        Variant(
            name=FULL,
            title="Full computation",
            routing=full_computation(),
            published=Published(
                lm_ppl=2.40,
                time_diff=2.05,
                fluency=45.3,
                lm_correctness=49.0,
                tflops=48.29,
                hours=24,
            ),
        ),
        Variant(name=MOD, title="VideoLLM-MoD, r = 0.2", routing=routing, published=mod),
        Variant(
            name="random",
            title="random, r = 0.2",
            routing=changed(selection="random"),
            published=Published(lm_ppl=2.45, time_diff=2.18, fluency=43.6, lm_correctness=48.1),
        ),
        Variant(
            name="uniform",
            title="uniform, r = 0.2",
            routing=changed(selection="uniform"),
            published=Published(lm_ppl=2.42, time_diff=2.17, fluency=43.9, lm_correctness=48.6),
        ),
        Variant(
            name=EARLY_EXIT,
            title="EarlyExit",
            routing=early_exit(EXIT_LAYER, layers),
            published=Published(
                lm_ppl=2.50,
                time_diff=2.29,
                fluency=41.3,
                lm_correctness=46.2,
                tflops=7.14,
                hours=10,
            ),
        ),
        Variant(
            name=LAYER_SKIP,
            title="LayerSkip",
            routing=layer_skip(),
            published=Published(
                lm_ppl=2.52,
                time_diff=2.24,
                fluency=42.0,
                lm_correctness=46.5,
                tflops=26.35,
                hours=13,
            ),
        ),
        Variant(
            name="all",
            title="all",
            routing=changed(insertion="all"),
            published=Published(fluency=42.5, lm_correctness=47.5, tflops=13.18),
        ),
        Variant(
            name="all-uniform",
            title="all, uniform",
            routing=changed(insertion="all", selection="uniform"),
        ),
        Variant(
            name=ONLINE,
            title="VideoLLM-online (CLS only)",
            routing=full_computation(),
            summary_only=True,
            published=Published(
                lm_ppl=2.43,
                time_diff=2.04,
                fluency=45.1,
                lm_correctness=48.1,
                tflops=15.75,
                hours=8,
            ),
        ),
        Variant(
            name="keep-0.1",
            title="learned, r = 0.1",
            routing=changed(keep_ratio=0.1),
            published=Published(lm_ppl=2.43, time_diff=2.11, fluency=44.7, lm_correctness=48.1),
        ),
        Variant(
            name="keep-0.3",
            title="learned, r = 0.3",
            routing=changed(keep_ratio=0.3),
            published=Published(lm_ppl=2.41, time_diff=2.05, fluency=44.9, lm_correctness=48.7),
        ),
        Variant(name="keep-0.5", title="learned, r = 0.5", routing=changed(keep_ratio=0.5)),
        Variant(
            name="all-deep",
            title="all-deep",
            routing=changed(insertion="all-deep"),
            published=Published(fluency=44.8, lm_correctness=48.8, tflops=15.37),
        ),
        Variant(
            name="interleaved-deep",
            title="interleaved-deep",
            routing=changed(insertion="interleaved-deep"),
            published=Published(fluency=45.2, lm_correctness=49.0, tflops=31.83),
        ),
        Variant(name="official", title="weighting official", routing=changed(weighting="official")),
        Variant(name="paper", title="weighting paper", routing=changed(weighting="paper")),
        Variant(name="tanh1", title="weighting tanh1", routing=changed(weighting="tanh1")),
        Variant(name="unweighted", title="weighting none", routing=changed(weighting="none")),
        Variant(
            name="decaying",
            title="r falling with depth, 0.2 on average",
            routing=changed(keep_ratio=decaying(routing, layers)),
        ),
        Variant(name="keep-last", title="force_keep_last", routing=changed(force_keep_last=True)),
        Variant(
            name="no-exploration",
            title="without exploration",
            routing=changed(exploration=0.0),
        ),
    )
    return {variant.name: variant for variant in all_of_them}


def decaying(routing: RoutingConfig, num_layers: int) -> tuple[float, ...]:
    """Keep ratios by layer that fall linearly over the routed ones, with the mean of `routing`.

    ```
    keep_ratio 0.2, 4 layers, interleaved      0  .3  0  .1      (dense layers do not read theirs)
    ```
    """
    routed = routed_layers(routing.insertion, num_layers)
    first, last = 1.5 * routing.keep_ratio, 0.5 * routing.keep_ratio
    step = (first - last) / max(len(routed) - 1, 1)
    ratios = {layer: first - i * step for i, layer in enumerate(routed)}
    return tuple(round(ratios.get(layer, 0.0), 6) for layer in range(num_layers))


def chosen(config: VideoLLMConfig, names: tuple[str, ...]) -> Mapping[str, Variant]:
    """The variants of these names, or all if there are none.

    Raises:
      UserError: a name that no variant has.
    """
    known = variants(config)
    for name in names:
        if name not in known:
            raise UserError(f"--only {name}: there is no such variant; known: {', '.join(known)}")
    return {name: variant for name, variant in known.items() if not names or name in names}
