"""The model: configuration, layers, routing, caches, and `VideoLLM`.

Shape letters, one legend for the whole package:

```
B batch            S tokens of the flat sequence      F frames
N tokens per frame K kept tokens per frame            M rows that a routed layer computes
J judged positions T tokens of a chunk, queries       U keys
D decoder width    H query heads                      G key/value heads     E head width
I MLP width        V vocabulary                       L layers              C cache capacity
R LoRA rank        P patches                          W vision width
```
"""

from videollm_mod_jax.models.cache import (
    EMPTY,
    Caches,
    LayerCache,
    init_caches,
    layer_capacities,
    trim_caches,
)
from videollm_mod_jax.models.config import (
    NO_LORA,
    DecoderConfig,
    LoraConfig,
    RoutingConfig,
    VideoLLMConfig,
    VisionConfig,
    early_exit,
    full_computation,
    layer_skip,
)
from videollm_mod_jax.models.execution import Execution
from videollm_mod_jax.models.layers import merge_lora
from videollm_mod_jax.models.plan import config_plan, stack_layers, unstack_layers
from videollm_mod_jax.models.video_llm import Output, VideoLLM, init_variables

__all__ = [
    "EMPTY",
    "NO_LORA",
    "Caches",
    "DecoderConfig",
    "Execution",
    "LayerCache",
    "LoraConfig",
    "Output",
    "RoutingConfig",
    "VideoLLM",
    "VideoLLMConfig",
    "VisionConfig",
    "config_plan",
    "early_exit",
    "full_computation",
    "init_caches",
    "init_variables",
    "layer_capacities",
    "layer_skip",
    "merge_lora",
    "stack_layers",
    "trim_caches",
    "unstack_layers",
]
