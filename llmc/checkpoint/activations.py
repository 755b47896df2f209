"""Quantize the activations of a model's linear layers and experts as its folder declares them.

transformers does not know ModelOpt's format, and does not stack experts in the format of compressed-tensors.
This repeats their arithmetic in float32: an activation is rounded to the codes that a server computes with,
and multiplied by its scale again. ModelOpt has these algorithms:

- FP8: one scale of all activations of a layer, `input_scale`; FP8_PER_CHANNEL_PER_TOKEN: one by token, its
  largest magnitude over 448.
- NVFP4: E2M1 values in blocks of 16 with a scale in E4M3, the block's largest magnitude over 6, within
  `input_scale`.

compressed-tensors has the same, with `input_global_scale`, the inverse, for NVFP4, and int8 with one scale or
one by token, its largest magnitude over 127, as vLLM computes it.

Source: modelopt 0.47.0, `torch/quantization/tensor_quant.py` and `torch/export/quant_utils.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from llmc.calibration.expert_products import visiting_experts
from llmc.checkpoint.quantization import QuantMethod
from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.graph.files import FilePart

if TYPE_CHECKING:
    import torch

    from llmc.checkpoint.checkpoint import Checkpoint

#: Returns the inputs of a product as a server computes with them.
Rounding = Callable[["torch.Tensor"], "torch.Tensor"]
_FP8_MAX, _INT8_MAX, _FP4_MAX, _BLOCK = 448.0, 127.0, 6.0, 16


def quantize_inputs(model: Any, checkpoint: Checkpoint) -> int:
    """Let the layers of `model` round their inputs as the folder of `checkpoint` declares.

    Returns:
        The number of layers that do.
    """
    count = 0
    experts: dict[str, dict[str, dict[int, Rounding]]] = {}
    for count, (part, rounding) in enumerate(_roundings(checkpoint), 1):  # noqa: B007 - the last is kept
        if part.expert is None:
            module = model.get_submodule(part.parameter.removesuffix(".weight"))
            module.register_forward_pre_hook(partial(_before, rounding))
        else:
            owner, _, stack = part.parameter.rpartition(".")
            experts.setdefault(owner, {}).setdefault(stack, {})[part.expert] = rounding
    for owner, stacks in experts.items():
        module = model.get_submodule(owner)
        module.forward = partial(_round_experts, module, module.forward, stacks)
    return count


def _round_experts(
    module: Any,
    forward: Callable[..., Any],
    roundings: Mapping[str, Mapping[int, Rounding]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a module with stacked experts, each of which rounds what it reads."""

    def visit(stack: str, expert: int, rows: torch.Tensor) -> torch.Tensor | None:
        rounding = roundings[stack].get(expert)
        return None if rounding is None else rounding(rows)

    stacks = {name: module.get_parameter(name) for name in roundings}
    with visiting_experts(stacks, visit):
        return forward(*args, **kwargs)


def _before(rounding: Callable[[torch.Tensor], torch.Tensor], module: Any, inputs: tuple[Any, ...]) -> Any:
    return (rounding(inputs[0]), *inputs[1:])


def _roundings(checkpoint: Checkpoint) -> Iterator[tuple[FilePart, Rounding]]:
    """Yield each matrix whose inputs are quantized, and what rounds them."""
    stored = SafetensorsStore.open(checkpoint.path)
    parts = checkpoint.file_tensors().parts
    method = None if checkpoint.quantization is None else checkpoint.quantization.method
    if method is QuantMethod.COMPRESSED_TENSORS:
        yield from _declared_roundings(checkpoint.path, stored, parts)
        return
    infos = stored.infos()
    for name, part in parts.items():
        module, _, own = name.rpartition(".")
        if own != "weight" or name not in infos:
            continue
        scale = infos.get(f"{module}.input_scale")
        if scale is not None:
            value = float(np.asarray(stored.read(scale.name), np.float32).reshape(-1)[0])
            small = infos[name].dtype is ir.DataType.UINT8
            yield part, partial(_round_blocks if small else _round_whole, scale=value)
        elif infos[name].dtype is ir.DataType.FLOAT8E4M3FN:
            yield part, _round_tokens


def _declared_roundings(
    folder: Path, stored: SafetensorsStore, parts: Mapping[str, FilePart]
) -> Iterator[tuple[FilePart, Rounding]]:
    """Yield the same for compressed-tensors, whose config.json has the activations of groups of modules."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    groups = [each for each in config["config_groups"].values() if each.get("input_activations")]
    infos = stored.infos()
    for name, part in parts.items():
        module, _, own = name.rpartition(".")
        group = next((each for each in groups if _is_target(module, each["targets"])), None)
        if own != "weight" or group is None or _is_target(module, config.get("ignore") or ()):
            continue
        given = group["input_activations"]
        is_integer = given["type"] == "int"
        scale = infos.get(f"{module}.input_scale") or infos.get(f"{module}.input_global_scale")
        value = (
            None if scale is None else float(np.asarray(stored.read(scale.name), np.float32).reshape(-1)[0])
        )
        if given["num_bits"] == 4 and value is not None:
            yield part, partial(_round_blocks, scale=1 / value)
        elif given["dynamic"] is True:
            yield part, partial(_round_tokens, is_integer=is_integer)
        elif value is not None:
            yield part, partial(_round_whole, scale=value, is_integer=is_integer)


def _is_target(module: str, targets: Iterable[str]) -> bool:
    """Return whether one of the names, or patterns after `re:`, is that of a module."""
    patterns = (each[3:] if each.startswith("re:") else f"{re.escape(each)}$" for each in targets)
    return any(re.match(pattern, module) for pattern in patterns)


def _round_whole(values: torch.Tensor, scale: float, *, is_integer: bool = False) -> torch.Tensor:
    return (_int8 if is_integer else _fp8)(values / scale) * scale


def _round_tokens(values: torch.Tensor, *, is_integer: bool = False) -> torch.Tensor:
    highest = _INT8_MAX if is_integer else _FP8_MAX
    scales = (values.abs().amax(-1, keepdim=True) / highest).clamp(min=1e-12)
    return (_int8 if is_integer else _fp8)(values / scales) * scales


def _round_blocks(values: torch.Tensor, scale: float) -> torch.Tensor:
    blocks = values.reshape(*values.shape[:-1], -1, _BLOCK)
    scales = _fp8(blocks.abs().amax(-1, keepdim=True) / _FP4_MAX / scale) * scale
    return (_fp4(blocks / scales.clamp(min=1e-30)) * scales).flatten(-2)


def _int8(values: torch.Tensor) -> torch.Tensor:
    return values.round().clamp(-_INT8_MAX - 1, _INT8_MAX)


def _fp8(values: torch.Tensor) -> torch.Tensor:
    """Round to the nearest number of E4M3, float32."""
    import torch

    return values.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).float()


def _fp4(values: torch.Tensor) -> torch.Tensor:
    """Round to the nearest number of E2M1, ties to the even code."""
    import torch

    sizes = values.abs().clamp(max=_FP4_MAX)
    steps = torch.where(sizes < 2, 0.5, torch.where(sizes < 4, 1.0, 2.0))
    return torch.copysign(torch.round(sizes / steps) * steps, values)
