"""VideoLLM-MoD in JAX: a streaming video LLM with Mixture-of-Depths (arXiv 2408.16730).

```python
import videollm_mod_jax as vm

model = vm.load("runs/digits")
session = vm.StreamingSession(model)
for frame in session.encode_ahead(vm.read_video("clip.mp4", fps=2)):
    if answer := session.see(frame):
        print(f"{answer.time:6.1f}s  {answer.text}")
print(session.ask("How many digits so far?").text)
```

The names below are the public face; everything else may change. They are loaded when they are first
used, so that a data worker, which needs no JAX, does not pay for it.
"""

import importlib
import signal
import sys
from typing import TYPE_CHECKING, Any

if sys.argv[:1] == ["-m"]:
    # One of our commands, whose modules take seconds to load: Ctrl-C ends it, without the traceback
    # of an import. The command hears signals itself when it begins.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

if TYPE_CHECKING:
    from videollm_mod_jax.data.video import Frame, read_video, write_video
    from videollm_mod_jax.errors import UserError
    from videollm_mod_jax.evaluation.stream import evaluate_stream
    from videollm_mod_jax.models import VideoLLM, VideoLLMConfig, init_variables
    from videollm_mod_jax.models.flops import flops
    from videollm_mod_jax.streaming.int8 import quantize
    from videollm_mod_jax.streaming.session import Answer, StreamingSession
    from videollm_mod_jax.streaming.together import narrate_together
    from videollm_mod_jax.training.checkpoint import LoadedModel, load_trained, save_model
    from videollm_mod_jax.training.checkpoint import load_model as load

_HOMES = {
    "Answer": "streaming.session",
    "Frame": "data.video",
    "LoadedModel": "training.checkpoint",
    "StreamingSession": "streaming.session",
    "UserError": "errors",
    "VideoLLM": "models",
    "VideoLLMConfig": "models",
    "evaluate_stream": "evaluation.stream",
    "flops": "models.flops",
    "init_variables": "models",
    "load": "training.checkpoint",
    "load_trained": "training.checkpoint",
    "narrate_together": "streaming.together",
    "quantize": "streaming.int8",
    "read_video": "data.video",
    "save_model": "training.checkpoint",
    "write_video": "data.video",
}

__all__ = [
    "Answer",
    "Frame",
    "LoadedModel",
    "StreamingSession",
    "UserError",
    "VideoLLM",
    "VideoLLMConfig",
    "evaluate_stream",
    "flops",
    "init_variables",
    "load",
    "load_trained",
    "narrate_together",
    "quantize",
    "read_video",
    "save_model",
    "write_video",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = globals()[name] = getattr(module, "load_model" if name == "load" else name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
