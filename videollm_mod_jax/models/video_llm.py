"""The whole model: frame encoder, connector, embedding, decoder, output head."""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from videollm_mod_jax.models import routing
from videollm_mod_jax.models.cache import Caches
from videollm_mod_jax.models.config import VideoLLMConfig
from videollm_mod_jax.models.connector import Connector
from videollm_mod_jax.models.decoder import Decoder, Kept
from videollm_mod_jax.models.execution import Execution
from videollm_mod_jax.models.layers import Linear, LinearWeights
from videollm_mod_jax.models.vision import VisionTower, interpolation_matrix, pool_patches


@flax.struct.dataclass
class Output:
    """What a forward pass gives.

    Attributes:
      logits_BJV: float32, at the positions asked for.
      caches: one `LayerCache` per layer with this chunk appended, or None.
      kept: per layer, int32 offsets_BFK of the kept tokens inside their frame; None for a dense
        layer.
    """

    logits_BJV: jax.Array
    caches: Caches | None
    kept: Kept


class VideoLLM(nn.Module):
    """A streaming video LLM with Mixture-of-Depths (arXiv 2408.16730).

    Attributes:
      config: the architecture.
      execution: how it is computed.
    """

    config: VideoLLMConfig
    execution: Execution = Execution()

    def setup(self):
        """Makes the parts that the config has, under the names their parameters have."""
        config, decoder, vision = self.config, self.config.decoder, self.config.vision
        if vision is not None:
            self.vision = VisionTower(vision, config.dtype, config.param_dtype)
        if decoder is None:
            return
        if vision is not None:
            # Its activations would stay in memory for as long as the decoder runs.
            connector = nn.remat(Connector) if self.execution.remat else Connector
            self.connector = connector(decoder.hidden_size, config.dtype)
        init = nn.initializers.normal(decoder.hidden_size**-0.5)
        self.embedding_VD = self.param(
            "embedding",
            nn.with_logical_partitioning(init, ("vocab", "embed")),
            (decoder.vocab_size, decoder.hidden_size),
            config.param_dtype,
        )
        if config.newline:
            self.newline_D = self.param(
                "newline",
                nn.with_logical_partitioning(init, ("embed",)),
                (decoder.hidden_size,),
                config.param_dtype,
            )
        self.decoder = Decoder(config, self.execution)
        self.lm_head = Linear(
            features=decoder.vocab_size,
            axes=("embed", "vocab"),
            use_bias=False,
            lora=config.lora if config.lora.adapts("lm_head") else None,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            out_dtype=jnp.float32,
        )

    def __call__(
        self,
        tokens_BS: jax.Array,
        features_BFNW: jax.Array | None,
        frame_starts_BF: jax.Array,
        logit_positions_BJ: jax.Array,
        position_BS: jax.Array | None = None,
        caches: Caches | None = None,
    ) -> Output:
        """Runs a batch of sequences, or appends a chunk of each to its caches.

        Text and frames lie in one flat sequence in the order of the stream, padding at the tail:

        ```
        tokens        b [ 0 0 0 , 0 0 0 ] A x e        N = 3
        frame_starts      2       6                    0 stands in vision slots
        ```

        Dropout (of LoRA) is active when `apply` is given a `dropout` rng.

        Args:
          tokens_BS: int32 text ids; vision and padding slots hold any valid id. Id V is the newline
            of a model that has one.
          features_BFNW: frame tokens from `encode`; F may be 0, or the array None.
          frame_starts_BF: int32 index of the first token of every frame in this sequence.
          logit_positions_BJ: int32 indices of the tokens whose next-token logits are wanted.
          position_BS: int32 positions in the stream, EMPTY for padding of a cached chunk; None
            means 0, 1, 2, ...
          caches: of the earlier stream, or None.

        Returns:
          `Output`.
        """
        x_BSD = self.embed(tokens_BS, features_BFNW, frame_starts_BF)
        return self.decode(x_BSD, frame_starts_BF, logit_positions_BJ, position_BS, caches)

    def embed(
        self,
        tokens_BS: jax.Array,
        features_BFNW: jax.Array | None,
        frame_starts_BF: jax.Array,
    ) -> jax.Array:
        """The residual stream x_BSD that enters the decoder; arguments as in `__call__`."""
        last = self.config.decoder.vocab_size - 1
        x_BSD = self.embedding_VD[jnp.minimum(tokens_BS, last)]
        if self.config.newline:
            x_BSD = jnp.where((tokens_BS > last)[:, :, None], self.newline_D, x_BSD)
        x_BSD = x_BSD.astype(self.config.dtype)
        if features_BFNW is None or features_BFNW.shape[1] == 0:
            return x_BSD
        vision_BFND = self.connect(features_BFNW)
        B, F, N, D = vision_BFND.shape
        rows_BR = routing.vision_rows(frame_starts_BF, N)
        return routing.set_rows(x_BSD, rows_BR, vision_BFND.reshape(B, F * N, D))

    def connect(self, features_BFNW: jax.Array) -> jax.Array:
        """Frame tokens of the tower to embeddings [B, F, N, D]; bilinear pooling happens here."""
        vision_BFND = self.connector(features_BFNW)
        config = self.config.vision
        if config.pooling == "bilinear" and config.pool != (config.patches_per_side,) * 2:
            matrix_QP = interpolation_matrix(config.patches_per_side, config.pool)
            vision_BFND = pool_patches(matrix_QP, vision_BFND)
        return vision_BFND

    def decode(
        self,
        x_BSD: jax.Array,
        frame_starts_BF: jax.Array,
        logit_positions_BJ: jax.Array,
        position_BS: jax.Array | None = None,
        caches: Caches | None = None,
    ) -> Output:
        """Everything behind `embed`; arguments as in `__call__`."""
        judged_BJD, caches, kept = self._judged(
            x_BSD, frame_starts_BF, logit_positions_BJ, position_BS, caches
        )
        logits_BJV = self.lm_head(judged_BJD, self._tied_kernel())
        return Output(logits_BJV=logits_BJV, caches=caches, kept=kept)

    def before_logits(
        self,
        tokens_BS: jax.Array,
        features_BFNW: jax.Array | None,
        frame_starts_BF: jax.Array,
        logit_positions_BJ: jax.Array,
    ) -> tuple[jax.Array, jax.Array | None, LinearWeights]:
        """`__call__` up to the output head, for a loss that never has all logits.

        Arguments as in `__call__`.

        Returns:
          hidden_BJD, low_rank_BJR of the head's adapter (None without one), and the head's weights:
          `weights.from_rank(hidden_BJD, low_rank_BJR)` are the logits.
        """
        x_BSD = self.embed(tokens_BS, features_BFNW, frame_starts_BF)
        hidden_BJD, _, _ = self._judged(x_BSD, frame_starts_BF, logit_positions_BJ, None, None)
        head = self.lm_head.weights(hidden_BJD.shape[-1], self._tied_kernel())
        return hidden_BJD, head.to_rank(hidden_BJD, self.lm_head.dropout_key()), head

    def _judged(
        self,
        x_BSD: jax.Array,
        frame_starts_BF: jax.Array,
        logit_positions_BJ: jax.Array,
        position_BS: jax.Array | None,
        caches: Caches | None,
    ) -> tuple[jax.Array, Caches | None, Kept]:
        """Hidden states at the judged positions, the caches, and the kept offsets."""
        if position_BS is None:
            position_BS = jnp.broadcast_to(
                jnp.arange(x_BSD.shape[1], dtype=jnp.int32), x_BSD.shape[:2]
            )
        return self.decoder(x_BSD, position_BS, frame_starts_BF, logit_positions_BJ, caches)

    def _tied_kernel(self) -> jax.Array | None:
        return self.embedding_VD.T if self.config.decoder.tie_embeddings else None

    def encode(self, images_BCCA: jax.Array) -> jax.Array:
        """Frames to frame tokens.

        Args:
          images_BCCA: float [B, image_size, image_size, 3], normalised by `vision.preprocess`.

        Returns:
          features_BNW in the compute dtype: the CLS token, then the pooled patches row by row. All
          patches if they are pooled behind the connector.
        """
        return self.vision(images_BCCA)

    def embed_patches(self, images_BCCA: jax.Array) -> jax.Array:
        """Every patch of such images as an embedding [B, P, D], pooled nowhere (still images)."""
        return self.connector(self.vision.patches(images_BCCA))

    def init_all(self) -> None:
        """Touches every part, so that one `init` makes every parameter."""
        vision, N = self.config.vision, self.config.tokens_per_frame
        features_BFNW = None
        if vision is not None:
            self.encode(jnp.zeros((1, vision.image_size, vision.image_size, 3), jnp.float32))
            features_BFNW = jnp.zeros((1, 1, vision.features_per_frame, vision.width), jnp.float32)
        if self.config.decoder is not None:
            frames = 0 if vision is None else 1
            self(
                tokens_BS=jnp.zeros((1, N + 1), jnp.int32),
                features_BFNW=features_BFNW,
                frame_starts_BF=jnp.ones((1, frames), jnp.int32),
                logit_positions_BJ=jnp.zeros((1, 1), jnp.int32),
            )


def init_variables(model: VideoLLM, key: jax.Array) -> dict[str, Any]:
    """Random weights: `{'params': ...}`, and `'lora'` with adapters, as plain arrays."""
    return nn.meta.unbox(jax.jit(functools.partial(model.init, method="init_all"))(key))
