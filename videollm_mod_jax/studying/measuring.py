"""What every variant costs: counted, compiled, and timed in turn in one process."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from videollm_mod_jax.benchmarking import device
from videollm_mod_jax.benchmarking.batch import random_batch
from videollm_mod_jax.benchmarking.filled import Context
from videollm_mod_jax.benchmarking.sides import Side, draw_weights
from videollm_mod_jax.benchmarking.streaming import Streams
from videollm_mod_jax.benchmarking.timing import measure
from videollm_mod_jax.data.config import DataConfig
from videollm_mod_jax.models import VideoLLM, VideoLLMConfig, config_plan, init_variables
from videollm_mod_jax.models.flops import flops, kv_cache_bytes
from videollm_mod_jax.studying.config import StudyConfig
from videollm_mod_jax.training import compiled, sharding
from videollm_mod_jax.training.compiled import Target
from videollm_mod_jax.training.run import Run, TrainingConfig


def count(model: VideoLLMConfig, data: DataConfig, study: StudyConfig) -> dict[str, Any]:
    """What arithmetic says of a variant; nothing is compiled.

    Returns:
      `kept` tokens by layer (None where all are computed); `macs` of the decoder's linears in a
      forward pass over one example, as the paper counts; `flops` of all of that pass;
      `cache_bytes` of a stream of `study.stream_frames` frames with one other token each.
    """
    counted = flops(model, data.frames, data.text_tokens, data.labels)
    frames = study.stream_frames
    return {
        "kept": [spec.keep for spec in config_plan(model)],
        "macs": counted.paper_macs,
        "flops": counted.total,
        "cache_bytes": kv_cache_bytes(model, frames, frames, model.dtype),
    }


def measure_all(
    models: Mapping[str, VideoLLMConfig],
    data: DataConfig,
    training: TrainingConfig,
    study: StudyConfig,
    announce: Callable[[str], None],
) -> dict[str, Any]:
    """Compiles and times the training step, and a frame of a stream, of all variants in turn.

    Args:
      models: by variant.
      data: budget and batch size.
      training: how it is trained.
      study: rounds and lengths.
      announce: called with what comes next.

    Returns:
      `device`, and by variant: `count`; `step` and `frame` times in seconds (`Timing.to_dict`);
      `compiled_flops` and `peak_bytes` of the training step by the compiler, per device;
      `frame_bytes`, what the step of a stream holds: caches, weights and temporaries.
    """
    layout = sharding.make_layout(training.sharding, training.mesh)
    target = Target("these devices", list(layout.mesh.devices.flat), None)
    out: dict[str, Any] = {name: {"count": count(m, data, study)} for name, m in models.items()}
    steps, frames, streams = {}, {}, {}
    for name, model in models.items():
        announce(f"compiling {name}")
        run = Run.build(training, model, layout)
        abstract = compiled.abstract_batch(
            model, data.batch_size, data.frames, data.text_tokens, data.labels
        )
        program = compiled.compile_program(run.lower(abstract), target)
        out[name]["compiled_flops"] = program.cost.flops
        out[name]["peak_bytes"] = program.peak_bytes
        batch = layout.put_batch(random_batch(model, data))
        steps[name] = Side(run, *draw_weights(run, model), batch).step
        context = Context(study.stream_frames, study.stream_frames)
        calls = study.rounds + study.warmup
        room = Context(context.frames + calls, context.text + calls)
        variables = init_variables(VideoLLM(model), jax.random.key(0))
        streams[name] = Streams(VideoLLM(model), variables, context, room, 1)
        memory = streams[name].memory(int8=False)
        out[name]["frame_bytes"] = memory["argument_bytes"] + memory["temporary_bytes"]
        frames[name] = streams[name].see
    announce("timing the training step")
    for name, timing in measure(steps, study.rounds, study.warmup).items():
        out[name]["step"] = timing.to_dict()
    announce("timing a frame of a stream")
    for name, timing in measure(frames, study.rounds, study.warmup).items():
        out[name]["frame"] = timing.to_dict()
    return {"device": device.describe(), "variants": out}
