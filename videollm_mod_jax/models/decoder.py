"""The decoder: blocks of the Llama family, some of which route their vision tokens.

One `Layer` serves training and streaming, dense and routed: a routed layer gathers the rows it
computes, runs the same `Block` on them, and scatters the weighted update back; a chunk of a stream
goes through the same code with a cache.
"""

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from videollm_mod_jax.models import routing, row_wise
from videollm_mod_jax.models.attention import causal_attention
from videollm_mod_jax.models.cache import Caches, LayerCache
from videollm_mod_jax.models.cached_attention import cached_attention
from videollm_mod_jax.models.config import VideoLLMConfig
from videollm_mod_jax.models.execution import Execution, choose_kernels, current_platform
from videollm_mod_jax.models.layers import Linear, RMSNorm
from videollm_mod_jax.models.plan import LayerSpec, Plan, config_plan, scan_groups
from videollm_mod_jax.models.rope import rope_frequencies

Kept = tuple[jax.Array | None, ...]


class Linears(nn.Module):
    """The linears of one half of a block: what the functions of `row_wise` compute with.

    Attributes:
      config: the model.
      sizes: inputs, outputs and logical axes of the kernel, by name.
      same_rows: names of those that read the same rows. With one dropout mask the rows are drawn
        for and kept once, and not once per adapter, as PEFT does.
    """

    config: VideoLLMConfig
    sizes: Mapping[str, tuple[int, int, tuple[str, str]]]
    same_rows: tuple[str, ...]

    @classmethod
    def of_attention(cls, config: VideoLLMConfig) -> "Linears":
        """q, k, v and o."""
        decoder = config.decoder
        D, heads = decoder.hidden_size, decoder.num_heads * decoder.head_dim
        kv_heads = decoder.num_kv_heads * decoder.head_dim
        sizes = {
            "q": (D, heads, ("embed", "heads")),
            "k": (D, kv_heads, ("embed", "kv_heads")),
            "v": (D, kv_heads, ("embed", "kv_heads")),
            "o": (heads, D, ("inner", "embed_out")),
        }
        return cls(config, sizes, ("q", "k", "v"), name="attention")

    @classmethod
    def of_mlp(cls, config: VideoLLMConfig) -> "Linears":
        """gate, up and down."""
        D, inner = config.decoder.hidden_size, config.decoder.mlp_size
        sizes = {
            "gate": (D, inner, ("embed", "mlp")),
            "up": (D, inner, ("embed", "mlp")),
            "down": (inner, D, ("inner", "embed_out")),
        }
        return cls(config, sizes, ("gate", "up"), name="mlp")

    @nn.compact
    def __call__(self) -> tuple[row_wise.Linears, row_wise.Keys]:
        """Returns weights and dropout keys, by name."""
        config = self.config
        weights, keys = {}, {}
        for name, (inputs, outputs, axes) in self.sizes.items():
            linear = Linear(
                features=outputs,
                axes=axes,
                use_bias=config.decoder.qkv_bias and name in ("q", "k", "v"),
                lora=config.lora if config.lora.adapts(name) else None,
                dtype=config.dtype,
                param_dtype=config.param_dtype,
                name=name,
            )
            weights[name], keys[name] = linear.weights(inputs), linear.dropout_key()
        shared = next((keys[name] for name in self.same_rows if keys[name] is not None), None)
        return weights, keys | dict.fromkeys(self.same_rows, shared)


class Block(nn.Module):
    """A decoder block; with a router, only what it adds to the residual stream, weighted.

    Which is f of the paper's equation 2. It is weighted here, and not by the caller, so that
    rematerialisation of this function stores its compact input rows and nothing else.
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
        """Computes M rows.

        Args:
          x_BMD: rows of the residual stream.
          position_BM: their positions in the stream.
          router: (kernel_D, offset, is_vision_BM) of a routed layer, or None; the offset, a number
            or [B, M], is added to the scores.
          cache: of this layer, or None.

        Returns:
          [B, M, D], x + f(x) without a router and the update with one, and the cache with the M
          rows appended.
        """
        decoder, execution = self.config.decoder, self.execution
        eps, param_dtype = decoder.norm_eps, self.config.param_dtype
        B, M, D = x_BMD.shape
        in_chunks = functools.partial(row_wise.in_row_chunks, rows_at_once=execution.row_chunk)

        attention, keys = Linears.of_attention(self.config)()
        scale_D = RMSNorm(eps, param_dtype, name="attention_norm").scale(D)
        frequencies = rope_frequencies(decoder.head_dim, decoder.rope_theta, decoder.rope_scaling)
        project = functools.partial(row_wise.project, eps=eps, frequencies=frequencies)
        q_BMHE, k_BMGE, v_BMGE = in_chunks(
            project, (x_BMD, position_BM), (scale_D, attention), keys
        )
        gate_BM = self._gates(x_BMD, router)
        if gate_BM is not None and self.config.routing.weighting == "relative":
            v_BMGE = v_BMGE * gate_BM[..., None, None].astype(v_BMGE.dtype)
        platform = current_platform()
        kernels = choose_kernels(execution.kernels, platform, q_BMHE.dtype, decoder.head_dim)
        if cache is None:
            heads_BMHE = causal_attention(q_BMHE, k_BMGE, v_BMGE, kernels)
        else:
            start_B = cache.length_B
            cache = cache.append(k_BMGE, v_BMGE, position_BM)
            heads_BMHE = cached_attention(q_BMHE, cache, start_B, kernels)

        mlp, mlp_keys = Linears.of_mlp(self.config)()
        out_BMD = in_chunks(
            functools.partial(row_wise.finish, eps=eps, residual=router is None),
            (x_BMD, heads_BMHE.reshape(B, M, -1), gate_BM),
            (RMSNorm(eps, param_dtype, name="mlp_norm").scale(D), attention | mlp),
            keys | mlp_keys,
        )
        if gate_BM is not None and self.config.routing.weighting == "official":
            out_BMD = out_BMD + (gate_BM - 1)[..., None].astype(x_BMD.dtype) * x_BMD
        return out_BMD, cache

    def _gates(
        self, x_BMD: jax.Array, router: tuple[jax.Array, jax.Array, jax.Array] | None
    ) -> jax.Array | None:
        """What the updates are multiplied by, float32 [B, M]; None where all are 1."""
        if router is None or self.config.routing.weighting == "none":
            return None
        kernel_D, offset, is_vision_BM = router
        # Scores of the gathered rows are computed anew, so that their gradient needs no scatter of
        # scalars.
        score_BM = routing.router_scores(self.config.routing.weighting, x_BMD, kernel_D) + offset
        return routing.token_gates(self.config.routing.weighting, score_BM, is_vision_BM)


class Router(nn.Module):
    """The LayerExpert: one score per vision token, mu = w . x (+ b in the authors' code).

    Its parameters are float32, because LoRA training updates them.
    """

    config: VideoLLMConfig

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | float]:
        """Returns kernel_D and the bias (0.0 where the weighting has none)."""
        weighting, D = self.config.routing.weighting, self.config.decoder.hidden_size
        # tanh1 starts at zero so that the gate starts at 1, and relative so that all tokens start
        # alike; the others need scores that differ.
        init = nn.initializers.normal(0.0 if weighting in ("tanh1", "relative") else D**-0.5)
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
            x_BSD, cache = block(x_BSD, position_BS, None, cache)
            return x_BSD, cache, None

        kernel_D, offset = Router(self.config, name="router")()
        if frame_starts_BF.shape[1] == 0:
            x_BSD, cache = block(x_BSD, position_BS, None, cache)
            return x_BSD, cache, jnp.zeros((x_BSD.shape[0], 0, keep), jnp.int32)

        B, F = frame_starts_BF.shape
        vision_BR = routing.vision_rows(frame_starts_BF, N)
        score_BS = routing.router_scores(settings.weighting, jax.lax.stop_gradient(x_BSD), kernel_D)
        score_BFN = routing.gather_rows(score_BS, vision_BR).reshape(B, F, N)
        ranked_BFN = score_BFN
        if settings.exploration > 0 and self.has_rng("dropout"):
            ranked_BFN = routing.explored_scores(
                score_BFN, settings.exploration, self.make_rng("dropout")
            )
        offsets_BFK = routing.select_tokens(
            routing.selection_scores(
                settings.selection,
                ranked_BFN,
                jnp.take_along_axis(position_BS, frame_starts_BF, axis=1),
                layer_index,
                keep,
                settings.force_keep_last,
            ),
            keep,
        )
        rows_BM, is_vision_BM = routing.compact_rows(frame_starts_BF, offsets_BFK, S, N)
        if settings.weighting == "relative":
            offset = -routing.gather_rows(routing.frame_means(score_BFN, vision_BR, S), rows_BM)
        update_BMD, cache = block(
            routing.gather_rows(x_BSD, rows_BM),
            routing.gather_rows(position_BS, rows_BM),
            (kernel_D, offset, is_vision_BM),
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
        judged_BJ: jax.Array,
        caches: Caches | None,
    ) -> tuple[jax.Array, Caches | None, Kept]:
        """Returns what is judged, the caches, and the kept offsets_BFK of every layer.

        The first are normed hidden states at indices `judged_BJ` of the sequence, [B, J, D].
        """
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
        x_BJD = jnp.take_along_axis(x_BSD, judged_BJ[:, :, None], axis=1)
        norm = RMSNorm(self.config.decoder.norm_eps, self.config.param_dtype, name="norm")
        return norm(x_BJD), caches, tuple(kept)

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
