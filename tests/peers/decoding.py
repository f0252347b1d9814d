"""The peer's stream: a frame is appended to a KV cache of transformers and judged."""

import torch
import transformers

from tests.peers.model import Peer

CACHES = ("dynamic", "static")
"""Caches of transformers: `dynamic` concatenates at every step; `static` is written in place, and
attention reads all of its capacity."""


class Decoding:
    """One stream of a peer without adapters, in inference mode.

    Attributes:
      cache: of transformers.
    """

    def __init__(self, peer: Peer, cache: str, capacity: int, compiled: bool):
        """Starts an empty stream.

        Args:
          peer: the model, in evaluation mode.
          cache: of `CACHES`.
          capacity: tokens that a static cache holds.
          compiled: run the language model through torch.compile, on a GPU with CUDA graphs.
        """
        self._peer, config = peer, peer.causal_lm.config
        if cache == "static":
            self.cache = transformers.StaticCache(config, max_cache_len=capacity)
        else:
            self.cache = transformers.DynamicCache(config=config)
        self._forward = peer.causal_lm.forward
        if compiled:
            on_gpu = peer.causal_lm.device.type == "cuda"
            mode = "reduce-overhead" if on_gpu else "default"
            self._forward = torch.compile(peer.causal_lm.forward, mode=mode, dynamic=False)

    @torch.inference_mode()
    def fill(self, tokens: int, seed: int) -> None:
        """Appends random keys and values: what a frame costs depends on how many there are."""
        lm = self._peer.causal_lm
        config, generator = lm.config, torch.Generator(lm.device).manual_seed(seed)
        shape = (1, config.num_key_value_heads, tokens, config.head_dim)
        for layer in range(config.num_hidden_layers):
            k_BGTE, v_BGTE = (
                torch.randn(shape, generator=generator, device=lm.device, dtype=lm.dtype)
                for _ in range(2)
            )
            self.cache.update(k_BGTE, v_BGTE, layer)

    @torch.inference_mode()
    def append(self, tokens_BT: torch.Tensor, features_BNW: torch.Tensor) -> torch.Tensor:
        """Appends text and a frame behind it, in one call.

        Args:
          tokens_BT: int64 ids, B = 1.
          features_BNW: of the frame.

        Returns:
          logits_BV at the frame's last token.
        """
        with self._peer.arithmetic():
            text_BTD = self._peer.causal_lm.get_input_embeddings()(tokens_BT)
            vision_BND = self._peer.connector(features_BNW).to(text_BTD.dtype)
            out = self._forward(
                inputs_embeds=torch.cat([text_BTD, vision_BND], dim=1),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[:, 0]

    def speaks(self, tokens_BT: torch.Tensor, features_BNW: torch.Tensor, silence: int) -> bool:
        """Appends likewise; whether any token is likelier than `silence`, on the host."""
        return bool(self.append(tokens_BT, features_BNW).argmax(-1) != silence)
