"""The PyTorch model that a conversion came from, run so that it shows every stage of its way.

The only part of `verify` that needs torch, transformers and, for adapters, peft. They are imported
when a model is loaded.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from videollm_mod_jax.conversion.cases import Case
from videollm_mod_jax.conversion.llava import DEFAULTS as LLAVAS
from videollm_mod_jax.conversion.plan import Conversion, Part
from videollm_mod_jax.conversion.stages import Stages
from videollm_mod_jax.conversion.vision import vision_to_hf
from videollm_mod_jax.errors import UserError
from videollm_mod_jax.models import VisionConfig

_TOWERS = {"siglip": "SiglipVisionModel", "clip": "CLIPVisionModel"}

# From the names of the original LLaVA to those of the first transformers that had it, which every
# later one reads.
_ORIGINAL_NAMES = {
    r"model\.vision_tower\.vision_tower\.": "vision_tower.",
    r"model\.mm_projector\.0\.": "multi_modal_projector.linear_1.",
    r"model\.mm_projector\.2\.": "multi_modal_projector.linear_2.",
    r"model\.": "language_model.model.",
    r"lm_head\.": "language_model.lm_head.",
}
_ORIGINAL_TOWER = {r"(vision_model\.)?": "vision_tower.vision_model."}


@dataclasses.dataclass(frozen=True)
class Reference:
    """A PyTorch model in evaluation mode.

    Attributes:
      torch, transformers: the packages.
      model: the language model, with tower and connector inside where it is a LLaVA; None for a
        tower alone.
      tower: the vision tower where it is a model of its own.
      vision: how frames become tokens then.
    """

    torch: ModuleType
    transformers: ModuleType
    model: Any
    tower: Any
    vision: VisionConfig | None

    def run(self, case: Case, tokens: int) -> tuple[Stages, list[int]]:
        """Runs the model on a case; arguments and results as of `stages.run`."""
        seen: Stages = {}
        with self.torch.inference_mode(), self._recording(seen):
            inputs = self.inputs(case)
        stages, ids = self.run_on(inputs, len(case.after), tokens)
        return {**seen, **stages}, ids

    def run_on(
        self, inputs: Mapping[str, Any], judged: int, tokens: int
    ) -> tuple[Stages, list[int]]:
        """The same on the arguments of the model, with logits at the last `judged` tokens."""
        stages: Stages = {}
        # A checkpoint's own settings would sample, or end early.
        config = self.transformers.GenerationConfig(
            max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        self.model.generation_config = config
        with self.torch.inference_mode():
            with self._recording(stages):
                output = self.model(**inputs, logits_to_keep=judged, use_cache=False)
            ids = self.model.generate(**inputs, generation_config=config)
        stages["logits"] = _float32(output.logits[0])
        return stages, ids[0, -tokens:].tolist()

    def run_tower(self, case: Case) -> Stages:
        """Runs the vision tower alone on the pixels of a case."""
        with self.torch.inference_mode():
            output = self.tower(self._pixels(case))
        stages = {"tower": _float32(output.last_hidden_state)}
        if output.pooler_output is not None:
            stages["pooled"] = _float32(output.pooler_output)
        return stages

    def inputs(self, case: Case) -> dict[str, Any]:
        """The arguments of the model, as its own processor would make them."""
        torch = self.torch
        if case.pixels_XCCA is not None and self.tower is not None:
            embeddings = self._embeddings(case)
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
            return {"inputs_embeds": embeddings, "attention_mask": mask}
        family = self.model.config.model_type
        as_video = case.name == "video" and family != "llava"
        slots = (
            (self._slot_id("video" if as_video else "image"),) * case.slots if case.slots else ()
        )
        ids = torch.tensor([[*case.before, *slots, *case.after]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if case.pixels_XCCA is None:
            return inputs
        pixels = self._pixels(case)
        if as_video:
            return {**inputs, "pixel_values_videos": pixels[None]}
        if case.size is None:
            return {**inputs, "pixel_values": pixels}
        return {**inputs, "pixel_values": pixels[None], "image_sizes": torch.tensor([case.size])}

    def _embeddings(self, case: Case) -> Any:
        """Text and frames as VideoLLM-online lays them out (its `vision_live.py`)."""
        torch, vision = self.torch, self.vision
        output, tokens = self.tower(self._pixels(case)), []
        if vision.summary == "class_token":
            tokens.append(output.last_hidden_state[:, :1])
        elif vision.summary == "attention_pool":
            tokens.append(output.pooler_output[:, None])
        if vision.pool != (0, 0):
            side = vision.patches_per_side
            grid = output.last_hidden_state[:, -(side**2) :].unflatten(1, (side, side))
            pool = torch.nn.functional.adaptive_avg_pool2d
            tokens.append(pool(grid.permute(0, 3, 1, 2), vision.pool).flatten(2).transpose(1, 2))
        frames = self._connector()(torch.cat(tokens, dim=1))
        embed = self.model.get_input_embeddings()
        before, after = embed(torch.tensor(case.before)), embed(torch.tensor(case.after))
        return torch.cat([before, frames.flatten(0, 1), after])[None]

    def _pixels(self, case: Case) -> Any:
        pixels = self.torch.tensor(case.pixels_XCCA.transpose(0, 3, 1, 2))
        return pixels.to((self.tower or self.model).dtype)

    def _slot_id(self, kind: str) -> int:
        names = (f"{kind}_token_id", f"{kind}_token_index")  # transformers 5, transformers 4
        config, rows = self.model.config, self.model.get_input_embeddings().num_embeddings
        name, found = next((name, getattr(config, name)) for name in names if hasattr(config, name))
        if not 0 <= found < rows:
            raise UserError(
                f"{name} of the source is {found}, and its embeddings have {rows} rows, so that "
                "PyTorch cannot run it; set it in config.json to the id of a token that no "
                "prompt holds"
            )
        return found

    def _connector(self) -> Any:
        names = r"(.*\.)?(multi_modal_projector|connector)"
        modules = self.model.named_modules()
        return next((module for name, module in modules if re.fullmatch(names, name)), None)

    @contextlib.contextmanager
    def _recording(self, stages: Stages) -> Iterator[None]:
        """Keeps what passes the connector and every decoder layer."""

        def record_connector(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
            stages.update(tower=_float32(inputs[0]), connector=_float32(output))

        def record_layer(name: str) -> Any:
            def record(_: Any, inputs: tuple[Any, ...], output: Any) -> None:
                # A tuple up to transformers 4.5x.
                hidden = output[0] if isinstance(output, tuple) else output
                stages[name] = _float32(hidden[0])

            return record

        kinds = ("LlamaDecoderLayer", "Qwen2DecoderLayer")
        layers = [m for m in self.model.modules() if type(m).__name__ in kinds]
        hooks = [
            layer.register_forward_hook(record_layer(f"layer {i}"))
            for i, layer in enumerate(layers)
        ]
        if (connector := self._connector()) is not None:
            hooks.append(connector.register_forward_hook(record_connector))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def load_reference(conversion: Conversion, param_dtype: str, dtype: str) -> Reference:
    """Loads the PyTorch model of a conversion.

    Args:
      conversion: the plan, which names directories and families.
      param_dtype: that its weights are rounded to, as ours are.
      dtype: to compute in.

    Raises:
      UserError: torch, transformers or, for an adapter, peft is not installed.
    """
    torch, transformers = import_packages(conversion)
    parts = {part.role: part for part in conversion.parts}
    kind = {"dtype": getattr(torch, param_dtype)}
    first, model, tower = parts["model"], None, None
    if first.family in _TOWERS:
        tower = _load_tower(transformers, first, kind)
    elif first.family not in LLAVAS:
        model = transformers.AutoModelForCausalLM.from_pretrained(first.source.directory, **kind)
        if "vision_tower" in parts:
            tower = _load_tower(transformers, parts["vision_tower"], kind)
    elif first.layout.startswith("original"):
        model = _load_original(torch, transformers, parts, conversion.config.vision, kind)
    else:
        loader = transformers.AutoModelForImageTextToText
        model = loader.from_pretrained(first.source.directory, **kind)
    if "adapter" in parts:
        model = _with_adapter(torch, model, parts["adapter"], conversion)
    model, tower = (
        None if module is None else module.to(getattr(torch, dtype)).eval()
        for module in (model, tower)
    )
    return Reference(torch, transformers, model, tower, conversion.config.vision)


def import_packages(conversion: Conversion) -> tuple[ModuleType, ModuleType]:
    """Imports torch and transformers, and sees that peft is there where an adapter needs it.

    Raises:
      UserError: one of them is not installed.
    """
    try:
        import torch
        import transformers

        if any(part.role == "adapter" for part in conversion.parts):
            import peft  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"verify compares with PyTorch, and {error.name} is not installed: "
            "pip install 'videollm_mod_jax[parity]'"
        ) from error
    return torch, transformers


def _load_tower(transformers: ModuleType, part: Part, kind: Mapping[str, Any]) -> Any:
    loader = getattr(transformers, _TOWERS[part.family])
    return loader.from_pretrained(part.source.directory, **kind)


def _load_original(
    torch: ModuleType,
    transformers: ModuleType,
    parts: Mapping[str, Part],
    vision: VisionConfig,
    kind: Mapping[str, Any],
) -> Any:
    """transformers' LLaVA with the tensors of the original one, which it cannot load itself."""
    hf, state = parts["model"].config, {}
    for part in parts.values():
        names = _ORIGINAL_NAMES if part is parts["model"] else _ORIGINAL_TOWER
        used = part.table.by_source()
        for file in part.source.files:
            for name, tensor in _read_tensors(torch, file).items():
                if name in used:
                    old = next(pattern for pattern in names if re.match(pattern, name))
                    state[re.sub(old, names[old], name, count=1)] = tensor
    if "vision_tower" in parts:
        directory = parts["vision_tower"].source.directory
        tower = transformers.CLIPVisionConfig.from_pretrained(directory)
    else:
        tower = vision_to_hf(vision)
    features = {"patch": "default", "cls_patch": "full"}
    config = transformers.LlavaConfig(
        text_config={**hf, "model_type": "llama"},
        vision_config=tower,
        vision_feature_layer=hf["mm_vision_select_layer"],
        vision_feature_select_strategy=features[hf.get("mm_vision_select_feature", "patch")],
        image_token_index=0,  # <unk>: any id will do that no prompt holds
    )
    loader = transformers.LlavaForConditionalGeneration
    return loader.from_pretrained(None, config=config, state_dict=state, **kind)


def _read_tensors(torch: ModuleType, file: Path) -> Mapping[str, Any]:
    if file.suffix == ".bin":
        return torch.load(file, map_location="cpu", weights_only=True)
    from safetensors.torch import load_file

    return load_file(file)


def _with_adapter(torch: ModuleType, model: Any, part: Part, conversion: Conversion) -> Any:
    """The model with its PEFT adapter, which may hold a connector (VideoLLM-online)."""
    import peft

    if any(".connector." in name for name in part.source.names):
        width, hidden = conversion.config.vision.width, conversion.config.decoder.hidden_size
        linear, gelu = torch.nn.Linear, torch.nn.GELU
        model.connector = torch.nn.Sequential(linear(width, hidden), gelu(), linear(hidden, hidden))
    return peft.PeftModel.from_pretrained(model, part.source.directory)


def _float32(tensor: Any) -> np.ndarray:
    return tensor.float().numpy()
