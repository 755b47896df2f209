"""Define faults of a checkpoint's folder, as a wrong writer or a careless copy would make them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

_LAYER, _OTHER = "model.layers.1.", "model.layers.0."
_MATRIX = f"{_LAYER}mlp.up_proj"
_SCALES = (".weight_scale", ".scales")
_ALL_SCALES = (*_SCALES, ".weight_scale_2", ".weight_global_scale")
_INPUTS = (".input_scale", ".input_global_scale")
_CODES = (".weight_packed", ".qweight", ".weight")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Fault:
    """A fault.

    Args:
        name: What it is.
        tensors: Changes the tensors of the files; returns whether the format has what it changes.
        files: Changes other files of the folder; returns likewise.
    """

    name: str
    tensors: Callable[[Tensors], bool] = lambda tensors: True
    files: Callable[[Path], bool] = lambda folder: True


def _change(tensors: Tensors, names: Sequence[str], change: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    found = [name for name in names if name in tensors]
    for name in found:
        before = tensors[name]
        tensors[name] = change(before.float() if before.is_floating_point() else before).to(before.dtype)
    return bool(found)


def _of_matrix(ends: Sequence[str]) -> list[str]:
    return [f"{_MATRIX}{end}" for end in ends]


def _codes(tensors: Tensors) -> str | None:
    return next((name for name in _of_matrix(_CODES) if name in tensors), None)


def scale_one(tensors: Tensors) -> bool:
    """Make the scales of one matrix 2 percent larger: of blocks, unless those have 3 bits of a mantissa."""
    coarse = f"{_MATRIX}.weight_scale_2" in tensors or f"{_MATRIX}.weight_global_scale" in tensors
    names = _of_matrix((".weight_scale_2", ".weight_global_scale") if coarse else _SCALES)
    return _change(tensors, names, lambda scale: scale * 1.02)


def scale_all(tensors: Tensors) -> bool:
    """Make all scales of matrices 2 percent larger."""
    coarse = [name for name in tensors if name.endswith((".weight_scale_2", ".weight_global_scale"))]
    names = coarse or [name for name in tensors if name.endswith(_SCALES)]
    return _change(tensors, names, lambda scale: scale * 1.02)


def scale_inputs(factor: float) -> Callable[[Tensors], bool]:
    """Return what multiplies the scale of the inputs of one matrix."""
    return lambda tensors: _change(tensors, _of_matrix(_INPUTS), lambda scale: scale * factor)


def shift_zero_points(tensors: Tensors) -> bool:
    """Move the zero points of one matrix by one, or its codes where the format has no zero points."""
    nibbles = sum(1 << (4 * place) for place in range(8)) - (1 << 32)
    if _change(tensors, [f"{_MATRIX}.qzeros"], lambda zeros: zeros + nibbles):
        return True
    packed = tensors.get(f"{_MATRIX}.weight_packed")
    if packed is not None and packed.dtype == torch.int32:
        return _change(tensors, [f"{_MATRIX}.weight_packed"], _next_codes)
    codes = tensors.get(f"{_MATRIX}.weight")
    if codes is not None and codes.dtype == torch.int8:
        return _change(tensors, [f"{_MATRIX}.weight"], lambda values: values.clamp(max=126) + 1)
    return False


def reorder(tensors: Tensors) -> bool:
    """Pack the codes of one matrix in the order of another format: awq's in gptq's, or high bits first."""
    name = _codes(tensors)
    if name is None:
        return False
    codes = tensors[name]
    if codes.dtype == torch.int32:
        order = _AWQ_ORDER if name.endswith(".qweight") else tuple(reversed(range(8)))
        return _change(tensors, [name], lambda words: _permute(words, order))
    if codes.dtype == torch.uint8:
        return _change(tensors, [name], lambda pairs: (pairs >> 4) | (pairs << 4))
    return False


def blank(tensors: Tensors) -> bool:
    """Give one matrix codes of zeros."""
    name = _codes(tensors)
    if name is not None:
        tensors[name] = torch.zeros_like(tensors[name])
    return name is not None


def rename(tensors: Tensors) -> bool:
    """Give one tensor a name that no server knows."""
    name = _codes(tensors)
    if name is not None:
        tensors[f"{name}_lost"] = tensors.pop(name)
    return name is not None


def drop_scales(tensors: Tensors) -> bool:
    """Leave out the scales of one matrix."""
    names = [name for name in _of_matrix(_ALL_SCALES) if name in tensors]
    for name in names:
        del tensors[name]
    return bool(names)


def drop_norm(tensors: Tensors) -> bool:
    """Leave out a tensor that is not quantized."""
    return tensors.pop(f"{_LAYER}input_layernorm.weight", None) is not None


def add(tensors: Tensors) -> bool:
    """Add a tensor that no server takes."""
    tensors[f"{_OTHER}mlp.up_proj.weight_forgotten"] = torch.zeros(4)
    return True


def exchange_layers(tensors: Tensors) -> bool:
    """Exchange one matrix of two layers."""
    names = [name for name in tensors if name.startswith(f"{_LAYER}self_attn.o_proj.")]
    for name in names:
        other = name.replace(_LAYER, _OTHER)
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return bool(names)


def exchange_ranks(tensors: Tensors) -> bool:
    """Exchange the slices of two ranks of one matrix: the halves of its outputs."""
    name = _codes(tensors)
    axis = 1 if name is not None and name.endswith(".qweight") else 0
    for each in [each for each in tensors if each.startswith(f"{_MATRIX}.")]:
        stored = tensors[each]
        if stored.ndim == 2 and stored.shape[axis] > 1:
            same = stored.view(torch.uint8) if stored.element_size() == 1 else stored
            tensors[each] = same.roll(stored.shape[axis] // 2, axis).view(stored.dtype)
    return name is not None


def exchange_tokens(folder: Path) -> bool:
    """Exchange the ids of two tokens of the tokenizer."""

    def change(tokenizer: Any) -> bool:
        vocabulary = tokenizer["model"]["vocab"]
        first, second = sorted(vocabulary, key=lambda token: (-len(token), token))[:2]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        return True

    return _edit(folder / "tokenizer.json", change)


def declare_groups(folder: Path) -> bool:
    """Declare groups of half their size, in every file that declares them."""

    def halve(value: Any) -> bool:
        found = False
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            each = value[key]
            if key == "group_size" and isinstance(each, int) and each > 1:
                value[key], found = each // 2, True
            elif isinstance(each, dict | list):
                found = halve(each) or found
        return found

    changed = [_edit(folder / name, halve) for name in ("config.json", "hf_quant_config.json")]
    return any(changed)


def declare_groups_for_tensorrt(folder: Path) -> bool:
    """Declare another size of groups in hf_quant_config.json alone."""

    def change(data: Any) -> bool:
        quantization = data["quantization"]
        found = "group_size" in quantization
        quantization["group_size"] = 32
        return found

    return _edit(folder / "hf_quant_config.json", change)


def ignore_matrix(folder: Path) -> bool:
    """Declare that one quantized matrix is not quantized."""

    def change(data: Any) -> bool:
        declared = data["quantization_config"]
        for key in ("ignore", "exclude_modules", "modules_to_not_convert"):
            if isinstance(declared.get(key), list):
                declared[key].append(_MATRIX)
                return True
        return False

    return _edit(folder / "config.json", change)


def ignore_nothing(folder: Path) -> bool:
    """Declare that the head is quantized."""

    def change(data: Any) -> bool:
        declared = data["quantization_config"]
        found = [key for key in ("ignore", "exclude_modules", "modules_to_not_convert") if declared.get(key)]
        for key in found:
            declared[key] = []
        return bool(found)

    return _edit(folder / "config.json", change)


def leave_index(folder: Path) -> bool:
    """Leave the index of an earlier folder of two files beside the weights."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {f"{_MATRIX}.weight": each for each in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return True


def _edit(path: Path, change: Callable[[Any], bool]) -> bool:
    if not path.is_file():
        return False
    data = json.loads(path.read_text(encoding="utf-8"))
    changed = change(data)
    path.unlink()
    path.write_text(json.dumps(data), encoding="utf-8")
    return changed


def _places(words: torch.Tensor) -> list[torch.Tensor]:
    return [(words.to(torch.int64) >> (4 * place)) & 15 for place in range(8)]


def _words(places: Sequence[torch.Tensor]) -> torch.Tensor:
    words = torch.zeros_like(places[0])
    for place, code in enumerate(places):
        words = words | (code << (4 * place))
    return torch.where(words >= 1 << 31, words - (1 << 32), words)


def _next_codes(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes plus one, 15 staying as it is, of eight codes in each word."""
    return _words([code.clamp(max=14) + 1 for code in _places(packed)])


def _permute(packed: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    places = _places(packed)
    return _words([places[place] for place in order])


NOTHING = Fault("nothing")
FAULTS = (
    NOTHING,
    Fault("scales of one matrix 2 % off", scale_one),
    Fault("all scales 2 % off", scale_all),
    Fault("an input scale 2 % off", scale_inputs(1.02)),
    Fault("an input scale halved", scale_inputs(0.5)),
    Fault("an input scale inverted", lambda tensors: _change(tensors, _of_matrix(_INPUTS), lambda s: 1 / s)),
    Fault("zero points or codes of one matrix one off", shift_zero_points),
    Fault("codes packed in another order", reorder),
    Fault("codes of zeros", blank),
    Fault("a tensor renamed", rename),
    Fault("scales of one matrix left out", drop_scales),
    Fault("a norm left out", drop_norm),
    Fault("a tensor added", add),
    Fault("a matrix of two layers exchanged", exchange_layers),
    Fault("slices of two ranks exchanged", exchange_ranks),
    Fault("groups declared of half the size", files=declare_groups),
    Fault("groups declared otherwise for TensorRT-LLM", files=declare_groups_for_tensorrt),
    Fault("a quantized matrix declared as not quantized", files=ignore_matrix),
    Fault("the head declared as quantized", files=ignore_nothing),
    Fault("a stale index", files=leave_index),
    Fault("two tokens exchanged", files=exchange_tokens),
)
