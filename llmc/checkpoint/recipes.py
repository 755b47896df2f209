"""Parse the fields in which each quantization library declares what it did to a checkpoint.

Sources: transformers' `utils/quantization_config.py` for `quant_method` and the fields of gptq, awq, fp8,
fbgemm_fp8, mxfp4, bitsandbytes and compressed-tensors; GPTQModel's `QuantizeConfig` for `dynamic`;
auto-round's `export_to_autoround` for `packing_format` and `extra_config`; ModelOpt's `convert_hf_config.py`
for `quant_algo`; mlx-lm's `utils.py` for the key `quantization`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmc.checkpoint.quantization import Layout, ModuleFormat, QuantMethod, StoredQuantization
from llmc.errors import CheckpointError, UnsupportedError

FLOAT_HINT = "compile the original checkpoint in float instead"

_Targets = tuple[tuple[tuple[str, ...], ModuleFormat], ...]

#: Other names of methods that occur in published checkpoints.
_ALIASES = {
    "auto_round": QuantMethod.AUTO_ROUND,
    "intel/auto-round": QuantMethod.AUTO_ROUND,
    "autoround": QuantMethod.AUTO_ROUND,
    "compressed_tensors": QuantMethod.COMPRESSED_TENSORS,
    "modelopt_fp8": QuantMethod.MODELOPT,
    "modelopt_fp4": QuantMethod.MODELOPT,
    "modelopt_mxfp8": QuantMethod.MODELOPT,
    "modelopt_mixed": QuantMethod.MODELOPT,
    "finegrained_fp8": QuantMethod.FP8,
}

#: Layouts by format name of compressed-tensors.
_COMPRESSED = {
    "pack-quantized": {Layout.PACKED_INTEGERS},
    "int-quantized": {Layout.INT8},
    "float-quantized": {Layout.FP8},
    "naive-quantized": {Layout.INT8, Layout.FP8},
    "nvfp4-pack-quantized": {Layout.NVFP4},
    "mxfp4-pack-quantized": {Layout.MXFP4},
    "mxfp8-quantized": {Layout.FP8},
    "mixed-precision": set(),
}

#: Layouts by ModelOpt's algorithm name; its treatment of activations does not concern the weights.
_MODELOPT = {
    "FP8": Layout.FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": Layout.FP8,
    "FP8_PB_WO": Layout.FP8,
    "FP8_PB_REAL": Layout.FP8,
    "MXFP8": Layout.FP8,
    "NVFP4": Layout.NVFP4,
    "NVFP4_AWQ": Layout.NVFP4,
    "W4A16_NVFP4": Layout.NVFP4,
    "MXFP4": Layout.MXFP4,
    "W4A8_MXFP4_FP8": Layout.MXFP4,
    "W4A16_AWQ": Layout.INT4_BY_OUTPUT,
    "W8A16": Layout.INT8,
    "W8A8_SQ_PER_CHANNEL": Layout.INT8,
}


def method_name(fields: Mapping[str, Any]) -> str:
    """Return the method that `fields` name, by its standard name if it is supported."""
    name = str(fields.get("quant_method") or fields.get("method") or "an unnamed method").lower()
    return _ALIASES.get(name, name)


def parse_quantization(
    fields: Mapping[str, Any], folder: Path, source: str = "config.json"
) -> StoredQuantization:
    """Parse the quantization that `fields`, found in the file `source` of `folder`, describe.

    Raises:
        UnsupportedError: The method or layout is not supported.
        CheckpointError: A field is missing or has an invalid value.
    """
    name = method_name(fields)
    if name not in tuple(QuantMethod):
        raise UnsupportedError(
            f"{folder} is quantized by {name}; supported are {', '.join(QuantMethod)}", hint=FLOAT_HINT
        )
    try:
        _refuse_rotation(fields, folder, name)
        parsed = _PARSERS[QuantMethod(name)](fields, folder)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        where = "quantization_config" if source == "config.json" else source
        raise CheckpointError(
            f"{where} of {folder} is damaged: {type(error).__name__}: {error}", hint=FLOAT_HINT
        ) from error
    return replace(parsed, source=source)


def _refuse_rotation(fields: Mapping[str, Any], folder: Path, method: str) -> None:
    """Refuse weights that need rotated activations, which llmc does not support.

    Rotations of compressed-tensors on the side of a weight are already part of the stored weight.
    """
    for key, value in fields.items():
        if not value or not re.search("transform_config|rotat|hadamard", key):
            continue
        groups = value.get("config_groups") if isinstance(value, dict) else None
        uses = [use for group in (groups or {}).values() for use in group.get("apply") or ()]
        if groups is None or any(not str(use.get("location")).startswith("weight_") for use in uses):
            raise _unknown(folder, method, f"rotated activations ({key})")


def _parse_gptq(fields: Mapping[str, Any], folder: Path) -> StoredQuantization:
    layout = fields.get("checkpoint_format") or fields.get("format")
    if layout not in {None, "gptq", "gptq_v2"} or fields.get("is_marlin_format"):
        raise _unknown(folder, "gptq", f"layout {layout if layout not in {None, 'gptq'} else 'marlin'}")
    bits = _bits(fields["bits"], (2, 3, 4, 8), folder, "gptq")
    rest = _linear(ModuleFormat(bits, _group(fields["group_size"])))
    named = _dynamic(fields.get("dynamic") or {}, bits, fields["group_size"])
    offset = {None: None, "gptq": 1, "gptq_v2": 0}[layout]
    symmetric = fields.get("sym") is True
    return StoredQuantization(
        QuantMethod.GPTQ, (*named, *rest), frozenset({Layout.GPTQ}), offset, symmetric=symmetric
    )


def _dynamic(rules: Mapping[str, Any], bits: int, group_size: Any) -> _Targets:
    """Parse GPTQModel's rules by module: a pattern, prefixed with `-:` for modules that stay in float."""
    targets = []
    for pattern, fields in rules.items():
        if not pattern.startswith("-:"):
            form = ModuleFormat(int(fields.get("bits", bits)), _group(fields.get("group_size", group_size)))
            targets.append(((f"re:{pattern.removeprefix('+:')}",), form))
    return tuple(targets)


def _parse_awq(fields: Mapping[str, Any], folder: Path) -> StoredQuantization:
    stated = (fields.get(key) for key in ("version", "checkpoint_format", "format"))
    version = next((str(name).lower() for name in stated if name), "gemm")
    if version != "gemm":
        raise _unknown(folder, "awq", f"layout {version}")
    bits = fields["bits"] if "bits" in fields else fields["w_bit"]
    group_size = fields["group_size"] if "group_size" in fields else fields["q_group_size"]
    form = ModuleFormat(_bits(bits, (4,), folder, "awq"), _group(group_size))
    return StoredQuantization(QuantMethod.AWQ, _linear(form), frozenset({Layout.AWQ}))


def _parse_auto_round(fields: Mapping[str, Any], folder: Path) -> StoredQuantization:
    """Parse GPTQ's or AWQ's layout; auto-round's own layout is GPTQ's with zero points stored unchanged."""
    kind = str(fields.get("data_type") or "int")
    packing = _packing(fields)
    by_kind = {"nv_fp": Layout.NVFP4, "mx_fp": Layout.MXFP4, "fp": Layout.FP8}
    if not kind.startswith("int"):
        layouts = [layout for name, layout in by_kind.items() if kind.startswith(name)]
        if not layouts or "e5m3" in packing:
            raise _unknown(folder, "auto-round", f"{kind} by {packing}")
        form = ModuleFormat(int(fields["bits"]), _float_group(fields.get("group_size")))
        allowed = {layouts[0], Layout.FP8} if int(fields["bits"]) == 8 else {layouts[0]}
        return StoredQuantization(QuantMethod.AUTO_ROUND, _linear(form), frozenset(allowed))
    bits = _bits(fields["bits"], (2, 3, 4, 8), folder, "auto-round")
    rest = _linear(ModuleFormat(bits, _group(fields["group_size"])))
    named = []
    for name, own in (fields.get("extra_config") or {}).items():
        wide = int(own.get("bits") or bits)
        if wide <= 8:
            form = ModuleFormat(wide, _group(own.get("group_size", fields["group_size"])))
            named += [((name,), form), ((f"re:{name}",), form)]
    layout, offset = (Layout.AWQ, None) if "awq" in packing else (Layout.GPTQ, _auto_round_offset(packing))
    symmetric = fields.get("sym") is True and layout is Layout.GPTQ
    return StoredQuantization(
        QuantMethod.AUTO_ROUND, (*named, *rest), frozenset({layout}), offset, symmetric=symmetric
    )


def _packing(fields: Mapping[str, Any]) -> str:
    """Return `packing_format`, or its older key `backend` if that names a layout."""
    older = str(fields.get("backend") or "")
    named = any(word in older for word in ("auto_round", "gptq", "awq"))
    return str(fields.get("packing_format") or (older if named else "auto_round:auto_gptq"))


def _auto_round_offset(packing: str) -> int:
    return 1 if "gptq" in packing and "gptqmodel" not in packing else 0


def _parse_compressed(fields: Mapping[str, Any], folder: Path) -> StoredQuantization:
    sparsity = (fields.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _unknown(folder, "compressed-tensors", f"sparse format {sparsity}")
    targets, layouts = [], set()
    for group in fields["config_groups"].values():
        layout = group.get("format") or fields.get("format")
        if layout not in _COMPRESSED:
            raise _unknown(folder, "compressed-tensors", f"format {layout}")
        weights = group["weights"]
        bits = _bits(weights["num_bits"], (2, 3, 4, 5, 6, 7, 8), folder, "compressed-tensors")
        by_group = weights.get("strategy") in {"group", "tensor_group"}
        group_size = _group(weights.get("group_size")) if by_group else None
        tile = weights["block_structure"] if weights.get("strategy") == "block" else None
        form = ModuleFormat(bits, group_size, None if tile is None else (int(tile[0]), int(tile[1])))
        targets.append((tuple(map(str, group["targets"])), form))
        layouts |= _COMPRESSED[layout]
    return StoredQuantization(QuantMethod.COMPRESSED_TENSORS, tuple(targets), frozenset(layouts))


def _parse_fp8(fields: Mapping[str, Any], folder: Path) -> StoredQuantization:
    size = fields.get("weight_block_size")
    tile = None if size is None else (int(size[0]), int(size[1]))
    layouts = frozenset({Layout.FP8})
    return StoredQuantization(QuantMethod.FP8, _linear(ModuleFormat(8, tile=tile)), layouts)


def _parse_fbgemm(fields: Mapping[str, Any], folder: Path) -> StoredQuantization:
    return StoredQuantization(QuantMethod.FBGEMM_FP8, _linear(ModuleFormat(8)), frozenset({Layout.FP8}))


def _parse_mxfp4(fields: Mapping[str, Any], folder: Path) -> StoredQuantization:
    layouts = frozenset({Layout.MXFP4_EXPERTS, Layout.MXFP4})
    return StoredQuantization(QuantMethod.MXFP4, _linear(ModuleFormat(4, 32)), layouts)


def _parse_mxfp8(fields: Mapping[str, Any], folder: Path) -> StoredQuantization:
    return StoredQuantization(QuantMethod.MXFP8, _linear(ModuleFormat(8)), frozenset({Layout.FP8}))


def _parse_modelopt(fields: Mapping[str, Any], folder: Path) -> StoredQuantization:
    """Parse ModelOpt's `quant_algo`, for all modules or for each one (MIXED_PRECISION)."""
    inner = fields.get("quantization") or fields
    algorithm = inner.get("quant_algo")
    if algorithm == "MIXED_PRECISION":
        layers = {name: own["quant_algo"] for name, own in inner["quantized_layers"].items()}
    else:
        layers = {"Linear": algorithm if algorithm is not None else _modelopt_of_groups(inner)}
    unknown = sorted({str(name) for name in layers.values()} - set(_MODELOPT))
    if unknown:
        raise _unknown(folder, "modelopt", f"algorithm {unknown[0]}")
    layouts = frozenset(_MODELOPT[name] for name in layers.values())
    form = ModuleFormat(8 if layouts <= {Layout.FP8, Layout.INT8} else 4)
    return StoredQuantization(QuantMethod.MODELOPT, _linear(form), layouts)


def _modelopt_of_groups(fields: Mapping[str, Any]) -> str:
    """Derive the algorithm of a config that only has groups in compressed-tensors' form."""
    weights = next(iter(fields["config_groups"].values()))["weights"]
    kind = (weights["num_bits"], weights["type"])
    return {(8, "float"): "FP8", (4, "float"): "NVFP4", (8, "int"): "W8A16", (4, "int"): "W4A16_AWQ"}[kind]


def _parse_bitsandbytes(fields: Mapping[str, Any], folder: Path) -> StoredQuantization:
    layouts = frozenset({Layout.BNB_4BIT, Layout.BNB_INT8})
    return StoredQuantization(QuantMethod.BITSANDBYTES, _linear(ModuleFormat(4)), layouts)


def _parse_mlx(fields: Mapping[str, Any], folder: Path) -> StoredQuantization:
    mode = str(fields.get("mode") or "affine")
    if mode != "affine":
        raise _unknown(folder, "mlx", f"mode {mode}")
    own = {name: form for name, form in fields.items() if isinstance(form, dict)}
    named = tuple(
        ((name,), ModuleFormat(int(form["bits"]), int(form["group_size"])))
        for name, form in own.items()
        if "bits" in form
    )
    rest = _linear(ModuleFormat(int(fields["bits"]), int(fields["group_size"])))
    return StoredQuantization(QuantMethod.MLX, (*named, *rest), frozenset({Layout.AFFINE}))


_PARSERS: Mapping[QuantMethod, Callable[[Mapping[str, Any], Path], StoredQuantization]] = {
    QuantMethod.GPTQ: _parse_gptq,
    QuantMethod.AWQ: _parse_awq,
    QuantMethod.AUTO_ROUND: _parse_auto_round,
    QuantMethod.COMPRESSED_TENSORS: _parse_compressed,
    QuantMethod.FP8: _parse_fp8,
    QuantMethod.FBGEMM_FP8: _parse_fbgemm,
    QuantMethod.MXFP4: _parse_mxfp4,
    QuantMethod.MXFP8: _parse_mxfp8,
    QuantMethod.MODELOPT: _parse_modelopt,
    QuantMethod.BITSANDBYTES: _parse_bitsandbytes,
    QuantMethod.MLX: _parse_mlx,
}


def _linear(form: ModuleFormat) -> _Targets:
    """Return one format for every module."""
    return ((("Linear",), form),)


def _bits(value: Any, supported: tuple[int, ...], folder: Path, method: str) -> int:
    if int(value) not in supported:
        raise _unknown(folder, method, f"{value} bits")
    return int(value)


def _group(value: Any) -> int | None:
    if value is None or int(value) == -1:
        return None
    if int(value) < 1:
        raise ValueError(f"group_size {value}")
    return int(value)


def _float_group(value: Any) -> int | None:
    """Return a float format's group size; 0 means a whole tensor and a pair a tile, which shapes tell."""
    return value if isinstance(value, int) and value > 0 else None


def _unknown(folder: Path, method: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{folder} is quantized by {method} with {what}, which is not supported", hint=FLOAT_HINT
    )
