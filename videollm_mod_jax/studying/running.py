"""One run of the study: a variant trained with one seed and evaluated, as a dict of results.

Shape suffixes: R records, F frames, N tokens per frame, K kept tokens, P spatial tokens.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from videollm_mod_jax.data.annotations import Record
from videollm_mod_jax.data.pipeline import Examples, evaluation_batches, training_batches
from videollm_mod_jax.evaluation.judge import ExactMatch
from videollm_mod_jax.evaluation.running import STREAM, Subject, parts_of
from videollm_mod_jax.evaluation.vqa import exact_match
from videollm_mod_jax.models import VideoLLM, VideoLLMConfig
from videollm_mod_jax.streaming.kept import last_patches, on_objects
from videollm_mod_jax.training import loop
from videollm_mod_jax.training.checkpoint import LoadedModel, read_model_config
from videollm_mod_jax.training.initial import variables_from
from videollm_mod_jax.training.metrics import read_metrics
from videollm_mod_jax.training.run import TrainingConfig
from videollm_mod_jax.training.sharding import Layout, init_sharded

SELF_CONDITIONED = "self-conditioned"


@dataclasses.dataclass(frozen=True)
class Held(Examples):
    """Examples that are built once and held in memory, for many runs in one process.

    Attributes:
      features_per_frame: how many of the stored tokens of a frame are taken, the first ones: 1 is
        the CLS token alone.
    """

    features_per_frame: int = dataclasses.field(kw_only=True)

    def load(self, index: int, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """The arrays of record `index`, undisturbed; see `Examples.load`."""
        if index not in self._arrays:
            self._arrays[index] = super().load(index)
        return self._arrays[index]

    def frames(self, record: Record) -> np.ndarray:
        """The features of the frames of a record: [F, N, W]."""
        return super().frames(record)[:, : self.features_per_frame]

    @functools.cached_property
    def _arrays(self) -> dict[int, dict[str, np.ndarray]]:
        return {}


def held(examples: Examples, model: VideoLLMConfig) -> Held:
    """The same examples for a model that may take fewer tokens of a frame than are stored."""
    fields = {field.name: getattr(examples, field.name) for field in dataclasses.fields(Examples)}
    taken = model.vision.features_per_frame
    return Held(**fields | {"tokens_per_frame": model.tokens_per_frame}, features_per_frame=taken)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Material:
    """What all runs share.

    Attributes:
      learnt: examples of the training split.
      judged: examples of the test split.
      objects_RFP: bool, the spatial places of the test frames that show an object.
      tower: parameters of the vision tower, in the host's memory.
      start: directory of the model that all runs start from; None for random weights.
      batch_size: of training.
      evaluation_batch: streams that are evaluated together.
      answer_tokens: longest answer.
    """

    learnt: Examples
    judged: Examples
    objects_RFP: np.ndarray
    tower: Mapping[str, Any]
    start: Path | None
    batch_size: int
    evaluation_batch: int
    answer_tokens: int


def train_variant(
    model: VideoLLMConfig,
    training: TrainingConfig,
    material: Material,
    learnt: Held,
    seed: int,
    workdir: Path,
) -> LoadedModel:
    """Trains a variant, or what is left of that; arguments as in `run_variant`."""
    training = dataclasses.replace(training, seed=seed)

    def initial(layout: Layout) -> Mapping[str, Any]:
        key = jax.random.key(seed)
        if material.start is not None:
            # A frame of fewer tokens has the same variables.
            vision = read_model_config(material.start).vision
            same = dataclasses.replace(model, vision=vision)
            return variables_from(material.start, same, key, layout)
        variables = init_sharded(VideoLLM(model), key, layout)
        return variables | {"params": variables["params"] | {"vision": material.tower}}

    return loop.train(
        training,
        workdir,
        run_config={"model": model.to_dict(), "training": dataclasses.asdict(training)},
        model_config=model,
        initial_variables=initial,
        tokenizer=learnt.tokenizer,
        system=learnt.system,
        batches_from=lambda start: training_batches(
            [(learnt, 1.0)], material.batch_size, seed, start_batch=start
        ),
    )


def run_variant(
    model: VideoLLMConfig,
    training: TrainingConfig,
    material: Material,
    learnt: Held,
    judged: Held,
    seed: int,
    workdir: Path,
) -> dict[str, Any]:
    """Trains and evaluates a variant, or what is left of that.

    Args:
      model: of the variant.
      training: how; its seed is replaced.
      material: shared by all runs.
      learnt, judged: `held` of the material's examples for this model.
      seed: of the initial weights, of the order of the examples, and of dropout.
      workdir: of the run, as `train` leaves one.

    Returns:
      loss (mean over the last tenth of the updates), seconds of `training` and `evaluation`,
      `teacher_forced` and `self_conditioned` scores by name, `answers`: the share of questions
      answered word for word, self-conditioned, and `kept` of every routed layer with learned
      selection.

    Raises:
      UserError: the workdir holds another run.
      FloatingPointError: a loss is not finite.
    """
    began = time.perf_counter()
    trained = train_variant(model, training, material, learnt, seed, workdir)
    learnt_by = time.perf_counter()
    subject = Subject(
        model=trained,
        examples=judged,
        labels=(),
        batch_size=material.evaluation_batch,
        answer_tokens=material.answer_tokens,
        silence_threshold=None,
        judge=ExactMatch(),
        seed=0,
    )
    scores: dict[str, Any] = {}
    for part in parts_of(STREAM, subject):
        rows = list(part.predict(range(len(judged))))
        scores[part.name.replace("-", "_")] = part.score(rows)
        if part.name == SELF_CONDITIONED:
            scores["answers"] = _answered(rows)
    if model.routing.selection == "learned":
        scores["kept"] = _kept_on_objects(trained, judged, material)
    seconds = {"training": learnt_by - began, "evaluation": time.perf_counter() - learnt_by}
    return {"loss": _last_loss(workdir, training.steps), "seconds": seconds, **scores}


def _kept_on_objects(
    trained: LoadedModel, judged: Held, material: Material
) -> dict[str, dict[str, float]]:
    """How many of the patches that a routed layer keeps show an object (`kept.on_objects`).

    Returns:
      By layer `share` (0 where it keeps none), `chance`, `ratio` of both, `last_ratio`, the same
      for the last patch of every object, and `summary`, the share of frames whose CLS token is
      kept.
    """
    model = VideoLLM(trained.config)

    @jax.jit
    def kept_tokens(variables: Mapping[str, Any], batch: Mapping[str, jax.Array]):
        return model.apply(
            variables,
            batch["tokens"],
            batch["features"],
            batch["frame_starts"],
            batch["label_positions"][:, :1],
        ).kept

    N = judged.tokens_per_frame
    layers: dict[str, list[np.ndarray]] = {}
    for batch in evaluation_batches(judged, material.evaluation_batch):
        valid = batch.pop("example_valid")
        for layer, offsets_BFK in enumerate(kept_tokens(trained.variables, batch)):
            if offsets_BFK is not None and offsets_BFK.shape[-1]:
                kept_BFN = (np.asarray(offsets_BFK)[..., None] == np.arange(N)).any(2)
                layers.setdefault(str(layer), []).append(kept_BFN[valid])
    first = int(trained.config.vision.summary != "none")
    kept_LFN = np.stack([np.concatenate(kept).reshape(-1, N) for kept in layers.values()])
    objects_FP = material.objects_RFP.reshape(-1, N - first)
    found = on_objects(kept_LFN[:, :, first:], objects_FP)
    _, columns = trained.config.vision.pool
    found_last = on_objects(kept_LFN[:, :, first:], last_patches(objects_FP, columns))
    return {
        layer: {
            "share": float(share),
            "chance": found.chance,
            "ratio": float(ratio),
            "last_ratio": float(last_ratio),
            "summary": float(kept_FN[:, :first].mean()) if first else 0.0,
        }
        for layer, share, ratio, last_ratio, kept_FN in zip(
            layers,
            np.nan_to_num(found.share_L),
            np.nan_to_num(found.ratio_L),
            np.nan_to_num(found_last.ratio_L),
            kept_LFN,
            strict=True,
        )
    }


def _answered(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of the users' questions that were answered word for word; None without any."""
    answers = [answer for row in rows for answer in row["answers"] if answer[2] is not None]
    if not answers:
        return None
    return sum(exact_match(said, true) for _, said, true in answers) / len(answers)


def _last_loss(workdir: Path, steps: int) -> float:
    losses = [row["loss"] for row in read_metrics(workdir) if row["step"] > 0.9 * steps]
    return float(np.mean(losses))
