"""The decoder: blocks of the Llama family, some of which route their vision tokens.

One `Layer` serves training and streaming, dense and routed: a routed layer gathers the rows it
computes, runs the same `Block` on them, and scatters the weighted update back; a chunk of a stream
goes through the same code with a cache.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from videollm_mod_jax.models import mlp, routing
from videollm_mod_jax.models.attention import causal_attention
from videollm_mod_jax.models.cache import Caches, LayerCache
from videollm_mod_jax.models.cached_attention import cached_attention
from videollm_mod_jax.models.config import VideoLLMConfig
from videollm_mod_jax.models.execution import Execution, choose_kernels, current_platform
from videollm_mod_jax.models.layers import Linear, RMSNorm
from videollm_mod_jax.models.plan import LayerSpec, Plan, config_plan, scan_groups
from videollm_mod_jax.models.rope import apply_rope, rope_frequencies

Kept = tuple[jax.Array | None, ...]


def _linear(config: VideoLLMConfig, name: str, features: int, axes: tuple[str, str]) -> Linear:
    return Linear(
        features=features,
        axes=axes,
        use_bias=config.decoder.qkv_bias and name in ("q", "k", "v"),
        lora=config.lora if config.lora.adapts(name) else None,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def _shared_dropout_key(linears: Sequence[Linear]) -> jax.Array | None:
    """One key for the adapters of linears that read the same rows.

    With one mask the rows are drawn for and kept once, and not once per adapter, as PEFT does.
    """
    keys = (linear.dropout_key() for linear in linears)
    return next((key for key in keys if key is not None), None)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions, over the rows given or over a cache."""

    config: VideoLLMConfig
    execution: Execution

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, position_BT: jax.Array, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Returns [B, T, D] and the cache with these T tokens behind its entries."""
        decoder = self.config.decoder
        H, G, E = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
        B, T, D = x_BTD.shape
        linears = (
            _linear(self.config, "q", H * E, ("embed", "heads")),
            _linear(self.config, "k", G * E, ("embed", "kv_heads")),
            _linear(self.config, "v", G * E, ("embed", "kv_heads")),
        )
        key = _shared_dropout_key(linears)
        q_BTHE, k_BTGE, v_BTGE = (
            linear(x_BTD, dropout_key=key).reshape(B, T, -1, E) for linear in linears
        )
        frequencies = rope_frequencies(E, decoder.rope_theta, decoder.rope_scaling)
        q_BTHE = apply_rope(q_BTHE, position_BT, frequencies)
        k_BTGE = apply_rope(k_BTGE, position_BT, frequencies)
        kernels = choose_kernels(self.execution.kernels, current_platform(), q_BTHE.dtype, E)
        if cache is None:
            out_BTHE = causal_attention(q_BTHE, k_BTGE, v_BTGE, kernels)
        else:
            start_B = cache.length_B
            cache = cache.append(k_BTGE, v_BTGE, position_BT)
            out_BTHE = cached_attention(q_BTHE, cache, start_B, kernels)
        out_BTD = _linear(self.config, "o", D, ("heads", "embed"))(out_BTHE.reshape(B, T, H * E))
        return out_BTD, cache


class Mlp(nn.Module):
    """SwiGLU, its rows weighted: down(silu(gate(x)) * up(x)) * w."""

    config: VideoLLMConfig
    execution: Execution

    @nn.compact
    def __call__(self, x_BTD: jax.Array, weight_BT: jax.Array | None) -> jax.Array:
        """[B, T, D] -> [B, T, D]; `weight_BT` is None where every weight is 1."""
        mlp_size, hidden_size = self.config.decoder.mlp_size, x_BTD.shape[-1]
        linears = (
            (_linear(self.config, "gate", mlp_size, ("embed", "mlp")), hidden_size),
            (_linear(self.config, "up", mlp_size, ("embed", "mlp")), hidden_size),
            (_linear(self.config, "down", hidden_size, ("mlp", "embed")), mlp_size),
        )
        weights = tuple(linear.weights(inputs) for linear, inputs in linears)
        shared = _shared_dropout_key([linear for linear, _ in linears[:2]])
        keys = (shared, shared, linears[2][0].dropout_key())
        return mlp.in_row_chunks(x_BTD, weight_BT, weights, keys, self.execution.mlp_rows)


class Block(nn.Module):
    """f of the paper's equation 2: what attention and MLP add to the residual stream.

    With a router, the update comes out weighted. It is weighted here, and not by the caller, so
    that rematerialisation of this function stores its compact input rows and nothing else.
    """

    config: VideoLLMConfig
    execution: Execution

    @nn.compact
    def __call__(
        self,
        x_BMD: jax.Array,
        position_BM: jax.Array,
        router: tuple[jax.Array, jax.Array, jax.Array] | None,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Computes the update of M rows.

        Args:
          x_BMD: rows of the residual stream.
          position_BM: their positions in the stream.
          router: (kernel_D, bias, is_vision_BM) of a routed layer, or None.
          cache: of this layer, or None.

        Returns:
          update_BMD and the cache with the M rows appended.
        """
        eps, param_dtype = self.config.decoder.norm_eps, self.config.param_dtype
        normed_BMD = RMSNorm(eps, param_dtype, name="attention_norm")(x_BMD)
        a_BMD, cache = Attention(self.config, self.execution, name="attention")(
            normed_BMD, position_BM, cache
        )
        normed_BMD = RMSNorm(eps, param_dtype, name="mlp_norm")(x_BMD + a_BMD)
        feed_forward = Mlp(self.config, self.execution, name="mlp")
        if router is None or self.config.routing.weighting == "none":
            return a_BMD + feed_forward(normed_BMD, None), cache

        kernel_D, bias, is_vision_BM = router
        # Scores of the gathered rows are computed anew, so that their gradient needs no scatter of
        # scalars.
        score_BM = routing.router_scores(x_BMD, kernel_D) + bias
        gate_BM = routing.token_gates(self.config.routing.weighting, score_BM, is_vision_BM)
        gate_BM1 = gate_BM[..., None]
        update_BMD = gate_BM1.astype(a_BMD.dtype) * a_BMD + feed_forward(normed_BMD, gate_BM)
        if self.config.routing.weighting == "official":
            update_BMD = update_BMD + (gate_BM1 - 1).astype(x_BMD.dtype) * x_BMD
        return update_BMD, cache


class Router(nn.Module):
    """The LayerExpert: one score per vision token, mu = w . x (+ b in the authors' code).

    Its parameters are float32, because LoRA training updates them.
    """

    config: VideoLLMConfig

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | float]:
        """Returns kernel_D and the bias (0.0 where the weighting has none)."""
        weighting, D = self.config.routing.weighting, self.config.decoder.hidden_size
        # tanh1 starts at zero so that the gate starts at 1; the others need scores that differ.
        init = nn.initializers.normal(0.0 if weighting == "tanh1" else D**-0.5)
        init = nn.with_logical_partitioning(init, ("embed",))
        kernel_D = self.param("kernel", init, (D,), jnp.float32)
        if weighting != "official":
            return kernel_D, 0.0
        return kernel_D, self.param("bias", nn.initializers.zeros_init(), (), jnp.float32)


class Layer(nn.Module):
    """One decoder layer: dense, or routed as its `LayerSpec` says."""

    config: VideoLLMConfig
    spec: LayerSpec
    execution: Execution

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        position_BS: jax.Array,
        frame_starts_BF: jax.Array,
        layer_index: jax.Array | int,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None, jax.Array | None]:
        """Returns the residual stream, the cache, and the kept offsets_BFK (None if dense)."""
        # Only the block is rematerialised: gather and scatter stay outside, so a routed layer
        # stores its M compact rows and not the whole sequence. Barriers (`prevent_cse`, by default)
        # keep the layers of a period apart in the backward pass: without them XLA recomputes one
        # while recomputed activations of another are still in memory.
        block = (nn.remat(Block) if self.execution.remat else Block)(
            self.config, self.execution, name="block"
        )
        S, keep = x_BSD.shape[1], self.spec.keep
        N, settings = self.config.tokens_per_frame, self.config.routing
        if keep is None:
            update_BSD, cache = block(x_BSD, position_BS, None, cache)
            return x_BSD + update_BSD, cache, None

        kernel_D, bias = Router(self.config, name="router")()
        if frame_starts_BF.shape[1] == 0:
            update_BSD, cache = block(x_BSD, position_BS, None, cache)
            return x_BSD + update_BSD, cache, jnp.zeros((x_BSD.shape[0], 0, keep), jnp.int32)

        B, F = frame_starts_BF.shape
        vision_BR = routing.vision_rows(frame_starts_BF, N)
        score_BS = routing.router_scores(jax.lax.stop_gradient(x_BSD), kernel_D)
        offsets_BFK = routing.select_tokens(
            routing.selection_scores(
                settings.selection,
                routing.gather_rows(score_BS, vision_BR).reshape(B, F, N),
                jnp.take_along_axis(position_BS, frame_starts_BF, axis=1),
                layer_index,
                keep,
                settings.force_keep_last,
            ),
            keep,
        )
        rows_BM, is_vision_BM = routing.compact_rows(frame_starts_BF, offsets_BFK, S, N)
        update_BMD, cache = block(
            routing.gather_rows(x_BSD, rows_BM),
            routing.gather_rows(position_BS, rows_BM),
            (kernel_D, bias, is_vision_BM),
            cache,
        )
        return routing.scatter_add_rows(x_BSD, rows_BM, update_BMD), cache, offsets_BFK


class Period(nn.Module):
    """The unlike layers that a scan repeats, e.g. (dense, routed)."""

    config: VideoLLMConfig
    specs: Plan
    execution: Execution

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        layer_index: jax.Array,
        position_BS: jax.Array,
        frame_starts_BF: jax.Array,
    ) -> tuple[jax.Array, Kept]:
        """Runs the period whose first layer is `layer_index`."""
        kept = []
        for j, spec in enumerate(self.specs):
            layer = Layer(self.config, spec, self.execution, name=f"layer_{j}")
            x_BSD, _, offsets = layer(x_BSD, position_BS, frame_starts_BF, layer_index + j, None)
            kept.append(offsets)
        return x_BSD, tuple(kept)


class Decoder(nn.Module):
    """All layers and the final norm.

    Attributes:
      config: the model.
      execution: its `scan` decides the names of the parameters: True scans over the plan's periods
        (`group_*`, fast to compile, training without caches), False unrolls (`layer_*`, one cache
        per layer).
    """

    config: VideoLLMConfig
    execution: Execution

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        position_BS: jax.Array,
        frame_starts_BF: jax.Array,
        caches: Caches | None,
    ) -> tuple[jax.Array, Caches | None, Kept]:
        """Returns normed hidden states, the caches, and the kept offsets_BFK of every layer."""
        x_BSD = nn.with_logical_constraint(x_BSD, ("batch", "sequence", "residual"))
        if self.execution.scan:
            if caches is not None:
                raise ValueError("a scanned decoder has no caches; decode with scan=False")
            x_BSD, kept = self._scan(x_BSD, position_BS, frame_starts_BF)
        else:
            plan = config_plan(self.config)
            kept, new_caches = [], []
            for i, spec in enumerate(plan):
                layer = Layer(self.config, spec, self.execution, name=f"layer_{i}")
                cache = None if caches is None else caches[i]
                x_BSD, cache, offsets = layer(x_BSD, position_BS, frame_starts_BF, i, cache)
                kept.append(offsets)
                new_caches.append(cache)
            caches = None if caches is None else tuple(new_caches)
        norm = RMSNorm(self.config.decoder.norm_eps, self.config.param_dtype, name="norm")
        return norm(x_BSD), caches, tuple(kept)

    def _scan(
        self, x_BSD: jax.Array, position_BS: jax.Array, frame_starts_BF: jax.Array
    ) -> tuple[jax.Array, list[jax.Array | None]]:
        kept, first = [], 0
        for g, (specs, repeats) in enumerate(scan_groups(config_plan(self.config))):
            period = nn.scan(
                Period,
                length=repeats,
                variable_axes={"params": 0, "lora": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(self.config, specs, self.execution, name=f"group_{g}")
            starts = first + len(specs) * jnp.arange(repeats)
            x_BSD, stacked = period(x_BSD, starts, position_BS, frame_starts_BF)
            for r in range(repeats):
                kept += [None if offsets is None else offsets[r] for offsets in stacked]
            first += len(specs) * repeats
        return x_BSD, kept
