"""Plans: a config's step, compiled for devices that need not be here, beside what they have."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from videollm_mod_jax.data.config import DataConfig
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VideoLLM, VideoLLMConfig, init_caches
from videollm_mod_jax.models.flops import flops, kv_cache_bytes, training_flops
from videollm_mod_jax.streaming import engine
from videollm_mod_jax.training import compiled, sharding
from videollm_mod_jax.training.compiled import Program, Target
from videollm_mod_jax.training.run import Run, TrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One compiled program and what follows from it; bytes and operations are per device.

    Attributes:
      name: of the model's variant.
      frames, text_tokens: of the sequence, or of the stream that the caches hold.
      parts: bytes of the program's arguments, by what they are: counted, not measured.
      tower_bytes: of the vision tower, which lies in memory but is not read by the step, so that
        the compiler does not know of it.
      program: what the compiler says.
      limit_bytes: memory that a program may use; None where nobody knows.
      fits: None where the limit is unknown.
      floor_flops: operations that the step cannot do without (`models.flops`), the recomputation
        that it is told to do included.
      recomputed_flops: how many of `floor_flops` are that recomputation.
      seconds: of each resource at its peak (estimate); None without a chip.
      cache_bytes_per_frame: of a stream, with one text token between frames; None for training.
      frames_until_full: estimate: frames whose caches, positions included, fill the memory that the
        streaming step leaves free; None for training.
    """

    name: str
    frames: int
    text_tokens: int
    parts: dict[str, int]
    tower_bytes: int
    program: Program
    limit_bytes: int | None
    fits: bool | None
    floor_flops: float
    recomputed_flops: float
    seconds: dict[str, float] | None
    cache_bytes_per_frame: int | None = None
    frames_until_full: int | None = None

    @property
    def needed_bytes(self) -> int | None:
        """Of the device, vision tower and all; None where the compiler refuses and does not say."""
        step = self.program.peak_bytes if self.program.fits else self.program.needed_bytes
        return None if step is None else step + self.tower_bytes


def plan_training(
    model: VideoLLMConfig,
    data: DataConfig,
    training: TrainingConfig,
    target: Target,
    limit_bytes: int | None = None,
) -> Plan:
    """Compiles the training step of a config.

    Args:
      model: the architecture.
      data: batch size and budget of an example.
      training: how it is trained.
      target: the devices to compile for.
      limit_bytes: memory per device; None takes the chip's.

    Raises:
      UserError: the batch does not divide over the devices, or the mesh does not fit them.
    """
    layout = sharding.make_layout(training.sharding, training.mesh, target.devices)
    parts = training.microbatches * layout.batch_shards
    if data.batch_size % parts:
        raise UserError(
            f"data.batch_size is {data.batch_size}; it does not divide into training.microbatches "
            f"= {training.microbatches} times {layout.batch_shards} devices along data and fsdp"
        )
    run = Run.build(training, model, layout)
    batch = compiled.abstract_batch(
        model, data.batch_size, data.frames, data.text_tokens, data.labels
    )
    state, frozen = run.target
    local_batch = compiled.bytes_per_device(
        {k: _placed(leaf, layout.batch) for k, leaf in batch.items()}
    )
    tower = compiled.bytes_per_device(frozen["params"]["vision"])
    floor = training_flops(
        model,
        data.frames,
        data.text_tokens,
        data.labels,
        trainable=training.trainable,
        remat=training.remat,
    )
    sequences = data.batch_size / len(target.devices)
    with target.tracing():
        lowered = run.lower(batch)
    return _plan(
        name=_variant(model),
        frames=data.frames,
        text_tokens=data.text_tokens,
        parts={
            "frozen weights": compiled.bytes_per_device(frozen) - tower,
            "trained weights": compiled.bytes_per_device(state.trained),
            "optimizer": compiled.bytes_per_device(state.opt_state),
            "batch": local_batch,
        },
        tower_bytes=tower,
        program=compiled.compile_program(lowered, target),
        target=target,
        limit_bytes=limit_bytes,
        floor_flops=floor.total * sequences,
        recomputed_flops=floor.recomputed * sequences,
    )


def plan_streaming(
    model: VideoLLMConfig, data: DataConfig, target: Target, limit_bytes: int | None = None
) -> Plan:
    """Compiles the streaming step, one frame behind one token, for one device of the target.

    Args:
      model: the architecture.
      data: frames and text tokens that the caches have room for.
      target: of whose devices the first is taken.
      limit_bytes: memory of the device; None takes the chip's.
    """
    mesh = Mesh(
        np.array(target.devices[:1]).reshape(1, 1, 1),
        sharding.MESH_AXES,
        axis_types=(AxisType.Auto,) * 3,
    )
    layout = sharding.Layout(mesh, sharding.RULES["replicate"])
    video_llm = VideoLLM(model)
    variables = sharding.abstract_variables(video_llm, layout)
    state = jax.eval_shape(
        lambda: engine.start(video_llm, 1, data.text_tokens, data.frames, seed=0)
    )
    features = (1, model.vision.features_per_frame, model.vision.width)
    arguments = jax.tree.map(
        lambda leaf: _placed(leaf, layout.replicated),
        (
            state,
            jax.ShapeDtypeStruct((1, 1), jnp.int32),
            jax.ShapeDtypeStruct(features, jnp.float32),
        ),
    )
    with layout.active(), target.tracing():
        lowered = engine.append_frame.lower(video_llm, variables, *arguments)
    tower = compiled.bytes_per_device(variables["params"]["vision"])
    per_frame = kv_cache_bytes(model, 1, 1, jnp.dtype(model.dtype))
    caches = compiled.bytes_per_device(arguments[0].caches)
    plan = _plan(
        name=_variant(model),
        frames=data.frames,
        text_tokens=data.text_tokens,
        parts={
            "weights": compiled.bytes_per_device(variables) - tower,
            "caches": caches,
            "logits and features": compiled.bytes_per_device(arguments) - caches,
        },
        tower_bytes=tower,
        program=compiled.compile_program(lowered, target),
        target=target,
        limit_bytes=limit_bytes,
        floor_flops=float(flops(model, 1, 1, 1).total),
        recomputed_flops=0.0,
    )
    until_full = None
    if plan.program.fits and plan.limit_bytes is not None:
        free = plan.limit_bytes - plan.program.peak_bytes - tower + caches
        until_full = max(0, int(free // _cache_growth(model, data)))
    return dataclasses.replace(plan, cache_bytes_per_frame=per_frame, frames_until_full=until_full)


def _cache_growth(model: VideoLLMConfig, data: DataConfig) -> float:
    """Bytes that caches with room for one more frame and one more token take more.

    Of the arrays that a stream allocates: with positions, and as capacities are rounded, on the
    average of many frames.
    """
    many = 1024

    def stored(more: int) -> int:
        room = (data.text_tokens + more, data.frames + more)
        caches = jax.eval_shape(lambda: init_caches(model, 1, *room, jnp.dtype(model.dtype)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))

    return (stored(many) - stored(0)) / many


def longest_stream(
    plan_frames: Callable[[int], Plan], frames: int, report: Callable[[Plan], None]
) -> Plan | None:
    """Finds the longest stream that fits, to a 64th of its length, in few compilations.

    Memory grows nearly along a line: the last two lengths say where it meets the limit. What is
    tried next lies a little below that, or above. Once one was too long, every third halves what
    is left, whatever the line says.

    ```
    limit 99, needed 9 + frames / 10
    frames      600   1200    895    905
    needed       69    129   98.5   99.5     ->  895
    ```

    Args:
      plan_frames: compiles for a number of frames.
      frames: to begin with.
      report: called with every plan on the way.

    Returns:
      The longest one that was found to fit; None if not a single frame does.

    Raises:
      UserError: the memory of the device is unknown.
    """
    best, low, high, size, enclosed = None, 0, None, frames, 0
    needs: list[tuple[int, int]] = []
    while True:
        plan = plan_frames(size)
        report(plan)
        if plan.fits is None:
            raise UserError("--max-frames needs a limit; give --memory GB with a cpu topology")
        if plan.fits:
            best, low = plan, size
        else:
            high = size
        if high is not None and high - low <= max(1, high // 64):
            return best
        if plan.needed_bytes is not None:
            needs.append((size, plan.needed_bytes))
        enclosed += high is not None
        halve = enclosed and enclosed % 3 == 0
        meets = None if halve else _meeting_point(needs[-2:], plan.limit_bytes)
        size = _next_size(low, high, meets)


def _meeting_point(needs: Sequence[tuple[int, int]], limit_bytes: int | None) -> int | None:
    """Frames at which the line through two (frames, bytes) meets the limit; None without one."""
    if len(needs) < 2 or limit_bytes is None:
        return None
    (frames, size), (other, other_size) = needs
    slope = (other_size - size) / (other - frames)
    return int(other + (limit_bytes - other_size) / slope) if slope > 0 else None


def _next_size(low: int, high: int | None, meets: int | None) -> int:
    """What to try between the longest that fits and the shortest that does not, if any."""
    if meets is not None:
        meets = min(meets, 32 * low) if high is None else meets
        # Two of them enclose less than a 64th.
        margin = max(1, meets // 160)
        for size in (meets - margin, meets + margin):
            if size - low >= margin and (high is None or high - size >= margin):
                return size
    return 2 * low if high is None else (low + high) // 2


def scale_frames(data: DataConfig, frames: int) -> DataConfig:
    """The same data with streams of another length, text and labels in proportion."""
    return dataclasses.replace(
        data,
        frames=frames,
        text_tokens=-(-data.text_tokens * frames // data.frames),
        labels=-(-data.labels * frames // data.frames),
    )


def _plan(
    *, program: Program, target: Target, limit_bytes: int | None, tower_bytes: int, **values: Any
) -> Plan:
    if limit_bytes is None and target.chip:
        limit_bytes = target.chip.usable_bytes
    fits = program.fits
    if fits:
        needed = program.peak_bytes + tower_bytes
        fits = None if limit_bytes is None else needed <= limit_bytes
    seconds = None
    if program.fits and target.chip:
        seconds = dict(compiled.roofline_seconds(program.cost, target.chip))
    return Plan(
        program=program,
        limit_bytes=limit_bytes,
        tower_bytes=tower_bytes,
        fits=fits,
        seconds=seconds,
        **values,
    )


def _placed(leaf: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _variant(model: VideoLLMConfig) -> str:
    return "full computation" if model.routing.insertion == () else "Mixture-of-Depths"
