"""Model configuration: frozen dataclasses, validated when they are made.

Numbers that change the arithmetic (theta, eps, scale, keep ratio) have no defaults: a preset or a
converted checkpoint states each of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from videollm_mod_jax.config_dict import (
    COUNT,
    SHARE,
    Checked,
    Interval,
    build,
    require,
    require_choice,
)

LINEAR_NAMES = ("q", "k", "v", "o", "gate", "up", "down")
"""The seven linears of a decoder layer, in the order of their use; LoRA targets name them."""

INSERTIONS = ("interleaved", "all", "all-deep", "interleaved-deep")
SELECTIONS = ("learned", "uniform", "random")
WEIGHTINGS = ("paper", "official", "tanh1", "relative", "none")

# The limits are several times those of the largest models that are published (126 layers, width
# 18432, MLP width 53248, vocabulary 262400), and small enough that a model.json of a stranger
# cannot make us trace layers for hours, or build a pooling matrix that fills the memory.
MOST_PATCHES = 128
"""Along one side of an image."""

_LAYERS = Annotated[int, Interval("[1, 1024]")]
_LAYERS_OR_NONE = Annotated[int, Interval("[0, 1024]")]
_LAYER = Annotated[int, Interval("[0, 1024)")]
_WIDTH = Annotated[int, Interval("[1, 2**18]")]
_HEADS = Annotated[int, Interval("[1, 2**10]")]
_PIXELS = Annotated[int, Interval("[1, 2**14]")]
_POOLED = Annotated[int, Interval("[0, 128]")]
# Less is 0 in the float32 in which norms are computed.
_EPS = Annotated[float, Interval("[1e-30, 1)")]
_STRETCH = Annotated[float, Interval("[1e-3, 1e6]")]
_STD = Annotated[float, Interval("[1e-3, 10]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling(Checked):
    """A rescaling of rotary frequencies, for longer contexts than a model was first trained on.

    Attributes:
      kind: `linear` stretches all wavelengths by `factor` (LLaVA-NeXT-Video). `llama3` keeps those
        shorter than `original_max_positions / high_freq_factor` tokens, stretches those longer
        than `original_max_positions / low_freq_factor`, and interpolates between (Llama 3.1).
      factor: of the stretch.
      low_freq_factor, high_freq_factor, original_max_positions: of `llama3`; None for `linear`.
    """

    kind: str
    factor: _STRETCH
    low_freq_factor: _STRETCH | None = None
    high_freq_factor: _STRETCH | None = None
    original_max_positions: COUNT | None = None

    def __post_init__(self):
        super().__post_init__()
        require_choice("rope_scaling.kind", self.kind, ("linear", "llama3"))
        for field in ("low_freq_factor", "high_freq_factor", "original_max_positions"):
            require(
                (getattr(self, field) is None) == (self.kind == "linear"),
                f"rope_scaling.{field} is {getattr(self, field)}, which does not go with kind "
                f"{self.kind!r}: llama3 needs a number, linear has none",
            )
        require(
            self.kind == "linear" or self.low_freq_factor < self.high_freq_factor,
            f"rope_scaling.low_freq_factor is {self.low_freq_factor}; it must be less than "
            f"rope_scaling.high_freq_factor = {self.high_freq_factor}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Checked):
    """A decoder of the Llama family: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Attributes:
      vocab_size: V, rows of the embedding table.
      hidden_size: D, width of the residual stream.
      mlp_size: I, width of the SwiGLU.
      num_layers: L.
      num_heads: H, query heads.
      num_kv_heads: G, key/value heads; divides `num_heads`.
      head_dim: E.
      rope_theta: base of the rotary frequencies.
      rope_scaling: of the rotary frequencies, or None.
      norm_eps: added to the mean square in RMSNorm.
      qkv_bias: biases on q, k and v (Qwen2).
      tie_embeddings: the output head is the transposed embedding table.
    """

    vocab_size: Annotated[int, Interval("[1, 2**24]")]
    hidden_size: _WIDTH
    mlp_size: _WIDTH
    num_layers: _LAYERS
    num_heads: _HEADS
    num_kv_heads: _HEADS
    head_dim: Annotated[int, Interval("[2, 2**12]")]
    rope_theta: Annotated[float, Interval("[1, 1e12]")]
    rope_scaling: RopeScaling | None
    norm_eps: _EPS
    qkv_bias: bool
    tie_embeddings: bool

    def __post_init__(self):
        super().__post_init__()
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"decoder.num_heads is {self.num_heads}, which is not a multiple of "
            f"decoder.num_kv_heads = {self.num_kv_heads}",
        )
        require(
            self.head_dim % 2 == 0,
            f"decoder.head_dim is {self.head_dim}; rotary embedding needs an even number",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingConfig(Checked):
    """Which decoder layers route vision tokens, and how (paper, sections 3.2 and 3.3).

    Attributes:
      insertion: the routed layers: `interleaved` (1, 3, 5, ...: the paper's default), `all`,
        `all-deep` (2, 3, 4, ...), `interleaved-deep` (3, 5, 7, ...), or an explicit tuple of layer
        indices; `()` routes nowhere, which is the full-computation baseline.
      keep_ratio: share of each frame's tokens that a routed layer computes, one number or a tuple
        with one entry per decoder layer (entries of layers that do not route are ignored). The
        count is `ceil(keep_ratio * tokens_per_frame)`; 0 drops all vision tokens, 1 keeps all.
      selection: `learned` takes the highest router scores; `uniform` takes evenly spaced tokens;
        `random` takes tokens at random, fixed by (layer, position of the frame in the stream).
      weighting: what multiplies a kept vision token's update f(x), where s is its router score:
        `paper` x + s f(x) (equation 2); `official` sigmoid(s + b) (x + f(x)), as the authors' code
        does; `tanh1` x + (1 + 0.2 tanh s) f(x) with a router that starts at zero, so that a
        pretrained block starts unchanged (p-MoD, arXiv 2412.04449); `relative` x + sigmoid(s')
        f(x), where s' is the score of x / rms(x) less its mean over the frame, which starts at
        zero, and the values that others read of the token in attention are multiplied, too (ours:
        a router learns of a token from who reads it, and only how it differs from the others of
        its frame); `none` x + f(x), whose router gets no gradient. Text tokens always get x + f(x).
      force_keep_last: always keep a frame's last token, where the decision to stay silent is read.
      exploration: in training, the share of frames whose kept tokens a layer draws at random
        instead of by its router, anew in every step. A router's gradient comes from kept tokens
        alone, so that without any it learns nothing of what it ranks last. Nothing but a training
        step explores. 0, the paper's: never.
    """

    insertion: str | tuple[_LAYER, ...]
    keep_ratio: SHARE | tuple[SHARE, ...]
    selection: str
    weighting: str
    force_keep_last: bool
    exploration: SHARE

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.insertion, str):
            require_choice("routing.insertion", self.insertion, INSERTIONS)
        require_choice("routing.selection", self.selection, SELECTIONS)
        require_choice("routing.weighting", self.weighting, WEIGHTINGS)
        require(
            self.exploration == 0 or self.selection == "learned",
            f"routing.exploration is {self.exploration}, which needs a router that selects; "
            f"routing.selection is {self.selection!r}: set exploration to 0",
        )


def full_computation() -> RoutingConfig:
    """The paper's Full-computation baseline: every layer computes every token."""
    return _baseline(insertion=())


def early_exit(layer: int, num_layers: int) -> RoutingConfig:
    """The paper's EarlyExit baseline: layers >= `layer` compute no vision token."""
    return _baseline(insertion=tuple(range(layer, num_layers)))


def layer_skip() -> RoutingConfig:
    """The paper's LayerSkip baseline: every second layer computes no vision token."""
    return _baseline(insertion="interleaved")


def _baseline(insertion: str | tuple[int, ...]) -> RoutingConfig:
    return RoutingConfig(
        insertion=insertion,
        keep_ratio=0.0,
        selection="uniform",
        weighting="none",
        force_keep_last=False,
        exploration=0.0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Checked):
    """Low-rank adapters (arXiv 2106.09685): y = x W + (alpha / rank) (dropout(x) A) B.

    Attributes:
      rank: R; 0 means no adapters.
      alpha: numerator of the scale.
      dropout: rate on the adapter's input while training.
      targets: which linears carry an adapter: any of q, k, v, o, gate, up, down, lm_head.
    """

    rank: Annotated[int, Interval("[0, 2**16]")]
    alpha: Annotated[float, Interval("(0, 1e6]")]
    dropout: Annotated[float, Interval("[0, 1)")]
    targets: tuple[str, ...]

    def __post_init__(self):
        super().__post_init__()
        for target in self.targets:
            require_choice("lora.targets", target, (*LINEAR_NAMES, "lm_head"))

    def adapts(self, name: str) -> bool:
        """Whether the linear called `name` carries an adapter."""
        return self.rank > 0 and name in self.targets


NO_LORA = LoraConfig(rank=0, alpha=1.0, dropout=0.0, targets=())


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(Checked):
    """A ViT that is SigLIP or CLIP by its fields, and how its patches become frame tokens.

    Attributes:
      architecture: `siglip`, or `clip` (class token, pre-norm, no bias on the patch embedding).
      image_size: side of the square input, pixels.
      patch_size: side of a patch, pixels. What `image_size` leaves over at the right and bottom is
        unseen, as in a convolution without padding (SigLIP so400m: 384 = 27 * 14 + 6).
      width: W, width of the tower and of the frame tokens it gives.
      mlp_width: width of its MLPs.
      num_layers: transformer blocks that have weights; 0 leaves every patch to itself, so that only
        the summary sees the whole frame.
      unused_blocks: how many of them, the last ones, never run. LLaVA-1.5 reads the patches behind
        23 of 24 blocks (`vision_feature_layer: -2`).
      num_heads: attention heads; divides `width`.
      norm_eps: of every layer norm.
      activation: `gelu_tanh` (SigLIP), `quick_gelu` (CLIP) or `gelu`.
      final_norm: the patches pass the tower's last layer norm (SigLIP's `last_hidden_state`).
      pooling_head: SigLIP's attention-pooling head has weights.
      summary: where a frame's CLS token comes from: `attention_pool` (SigLIP's pooling head),
        `class_token` (CLIP), or `none`: a frame is its patches alone (LLaVA).
      pool: (h, w): the patch grid is pooled to h x w spatial tokens; (0, 0) leaves the CLS token
        alone (VideoLLM-online's one token per frame). The grid itself pools nothing.
      pooling: `average`, of what the tower gives (VideoLLM-online, LLaVA-NeXT-Video), or
        `bilinear`, of what the connector makes of it (LLaVA-OneVision).
      mean, std: per channel, of pixels scaled to [0, 1].
    """

    architecture: str
    image_size: _PIXELS
    patch_size: _PIXELS
    width: _WIDTH
    mlp_width: _WIDTH
    num_layers: _LAYERS_OR_NONE
    unused_blocks: _LAYERS_OR_NONE
    num_heads: _HEADS
    norm_eps: _EPS
    activation: str
    final_norm: bool
    pooling_head: bool
    summary: str
    pool: tuple[_POOLED, _POOLED]
    pooling: str
    mean: tuple[SHARE, SHARE, SHARE]
    std: tuple[_STD, _STD, _STD]

    def __post_init__(self):
        super().__post_init__()
        require_choice("vision.architecture", self.architecture, ("siglip", "clip"))
        require_choice("vision.activation", self.activation, ("gelu_tanh", "quick_gelu", "gelu"))
        require_choice("vision.summary", self.summary, ("attention_pool", "class_token", "none"))
        require_choice("vision.pooling", self.pooling, ("average", "bilinear"))
        require(
            self.patch_size <= self.image_size,
            f"vision.patch_size is {self.patch_size}; it must lie between 1 and "
            f"vision.image_size = {self.image_size}",
        )
        side = self.patches_per_side
        require(
            side <= MOST_PATCHES,
            f"vision.image_size is {self.image_size} and vision.patch_size is {self.patch_size}: "
            f"{side} patches along a side; expected {MOST_PATCHES} at most",
        )
        require(
            max(self.pool) <= side and (0 in self.pool) == (self.pool == (0, 0)),
            f"vision.pool is {self.pool}; expected (0, 0), or two numbers from 1 to {side}, the "
            "patches along a side",
        )
        require(
            self.width % self.num_heads == 0,
            f"vision.width is {self.width}, which is not a multiple of "
            f"vision.num_heads = {self.num_heads}",
        )
        require(
            self.unused_blocks < max(self.num_layers, 1),
            f"vision.unused_blocks is {self.unused_blocks}; it must be less than "
            f"vision.num_layers = {self.num_layers}",
        )
        possible = {
            "attention_pool": self.architecture == "siglip"
            and self.pooling_head
            and not self.unused_blocks,
            "class_token": self.architecture == "clip",
            "none": self.pool != (0, 0),
        }
        require(
            possible[self.summary],
            f"vision.summary is {self.summary!r}, which this tower cannot give: attention_pool "
            "needs siglip with its pooling_head and all blocks, class_token needs clip, and none "
            "needs a pool of at least one token",
        )
        require(
            self.pooling == "average" or self.summary == "none",
            "vision.pooling is 'bilinear', which pools patches alone; set vision.summary to 'none'",
        )

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_frame(self) -> int:
        """N: the CLS token, if there is one, and the pooled spatial tokens."""
        return (self.summary != "none") + self.pool[0] * self.pool[1]

    @property
    def features_per_frame(self) -> int:
        """What the tower gives and the connector takes: N, or all patches if these pool later."""
        if self.pooling == "bilinear":
            return self.patches_per_side**2
        return self.tokens_per_frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoLLMConfig(Checked):
    """Everything that `model.json` of a checkpoint says: the architecture and its number types.

    What LoRA training updates (adapters, routers, connector) is stored in float32 whatever
    `param_dtype` says, because small updates to bfloat16 numbers are lost to rounding.

    Attributes:
      decoder: the language model; None for a vision tower alone.
      routing: Mixture-of-Depths over its vision tokens.
      lora: its adapters.
      vision: the frame encoder; None for a language model alone, which has no connector either.
      newline: there is a learnt embedding, of token id V, that ends a row of an image or a video
        (`image_newline` of LLaVA-NeXT and LLaVA-OneVision).
      dtype: of activations and matrix products, `bfloat16` or `float32`.
      param_dtype: of the stored parameters of embedding, decoder, head and tower.
    """

    decoder: DecoderConfig | None
    routing: RoutingConfig
    lora: LoraConfig
    vision: VisionConfig | None
    newline: bool
    dtype: str
    param_dtype: str

    def __post_init__(self):
        super().__post_init__()
        for field in ("dtype", "param_dtype"):
            require_choice(field, getattr(self, field), ("bfloat16", "float32"))
        require(
            self.decoder is not None or self.vision is not None,
            "the model has neither a decoder nor a vision tower; give it one",
        )
        require(
            self.vision is not None or self.routing.insertion == (),
            "routing.insertion routes vision tokens, and the model has no vision tower; add one, "
            "or route nowhere: ()",
        )

    @property
    def tokens_per_frame(self) -> int:
        """N, vision tokens per frame; 0 without a vision tower."""
        return self.vision.tokens_per_frame if self.vision else 0

    def require(self, *parts: str) -> None:
        """Checks that the model has what its user needs.

        Args:
          *parts: of `decoder` and `vision`.

        Raises:
          UserError: one is missing.
        """
        for part in parts:
            require(
                getattr(self, part) is not None,
                f"the model has no {part}: it is a part, converted alone; convert the language "
                "model again with --vision-tower to get a whole",
            )

    def to_dict(self) -> dict[str, Any]:
        """A nested dict that JSON can hold; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VideoLLMConfig":
        """Reads what `to_dict` wrote.

        Raises:
          UserError: an unknown, missing or wrongly typed field, named.
        """
        return build(cls, values, "model")
