"""Decide which tensors a checkpoint for servers has: those of the original, or the codes of its matrices.

Tensors keep their names in the files and their order. A matrix with codes in the quantized graph is replaced
by the tensors of the format; a weight whose channels were scaled has new values in its old type; all others
are copied.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.backends.checkpoint.coded import coded_matrices, expert_matrix, stored_experts
from llmc.backends.checkpoint.formats.base import CodedMatrix, Format
from llmc.backends.written import WrittenFrom, WrittenTensors
from llmc.config import ServedCheckpoint, WeightRole
from llmc.errors import UnsupportedError
from llmc.graph.files import FileTensors
from llmc.graph.linear import find_linears
from llmc.graph.match import lazy_of
from llmc.graph.model import Graph
from llmc.graph.weights import (
    CastRows,
    LazyWeight,
    Rows,
    ScaledRows,
    ShiftedRows,
    StoredRows,
    TensorInfo,
    read_all,
    row_chunks,
)
from llmc.quantize.cache_scales import cache_scales, module_of

_WEIGHT = ".weight"
#: The names of scales of a quantized KV cache.
_CACHE_SCALE = re.compile(r"\.(k|v|q|kv|prob|k_cache|v_cache|kv_cache)_(scale|zero_point|scaling_factor)$")


@dataclass(frozen=True)
class Contents:
    """The contents of a checkpoint for servers.

    Args:
        tensors: Its tensors, in the order in which they are written.
        matrices: The quantized matrices among them.
        ignored: Names of the linear modules that stay in float.
        rounded: Names of tensors whose values do not all fit the type in which they are written.
        unused: Names of tensors that are copied although transformers' model has no parameter for them.
    """

    tensors: tuple[WrittenTensors, ...]
    matrices: tuple[CodedMatrix, ...]
    ignored: tuple[str, ...]
    rounded: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def plan_contents(graph: Graph, section: ServedCheckpoint, form: Format, checkpoint: WrittenFrom) -> Contents:
    """Plan the tensors of a checkpoint; their values are computed when they are written.

    Args:
        graph: The quantized graph.
        section: The section `checkpoint` of the target.
        form: Its format.
        checkpoint: The checkpoint that was compiled.

    Raises:
        UnsupportedError: A weight was changed in a way that its tensor in the files cannot follow.
    """
    files = checkpoint.file_tensors()
    names = {part.parameter: name for name, part in files.parts.items() if part.is_whole}
    coded = {matrix.module: matrix for matrix in coded_matrices(graph, section.format)}
    changed = {rows.sources[0]: rows for rows in _changed_rows(graph)}
    experts, joined = stored_experts(graph), _joined_experts(files)
    _require_files(files, {*coded, *changed})
    tensors: list[WrittenTensors] = []
    matrices: list[CodedMatrix] = []
    rounded: list[str] = []
    for name, info in files.store.infos().items():
        part = files.parts.get(name)
        if part is None and _CACHE_SCALE.search(name):
            continue  # of the original's own cache; the folder declares another, or none
        parameter = None if part is None or not part.is_whole else part.parameter
        matrix = None
        if parameter in coded and names.get(parameter) == name:
            module, alias = name.removesuffix(_WEIGHT), parameter.removesuffix(_WEIGHT)
            matrix = replace(coded[parameter], module=module, alias=alias)
        elif part is not None and part.expert is not None and experts.get(part.parameter) is not None:
            own, stored = StoredRows(files.store, info), experts[part.parameter]
            peers = joined[part.parameter, part.expert]
            matrix = expert_matrix(name.removesuffix(_WEIGHT), own, part, stored, peers, section.format)
            parameter = part.parameter if stored.calibrated else None
        if matrix is not None:
            matrices.append(matrix)
            specs = {spec.name: (spec.dtype, spec.shape) for spec in form.specs(matrix)}
            tensors.append(WrittenTensors(specs, partial(_encode, form, matrix), parameter))
            continue
        dtype = _written_type(info, checkpoint, keep=files.are_files and info.codes is None)
        if dtype is not info.dtype:
            rounded.append(name)
        rows = changed.get(parameter) if parameter is not None else None
        specs = {name: (dtype, info.shape)}
        if rows is not None:
            tensors.append(WrittenTensors(specs, partial(_named, name, partial(_change, rows, dtype))))
            continue
        copied = CastRows(StoredRows(files.store, info), dtype)
        read = partial(read_all, copied)
        tensors.append(WrittenTensors(specs, partial(_named, name, read), rows=partial(_in_steps, copied)))
    tensors += _cache_tensors(graph, form, files)
    inner = (linear for linear in find_linears(graph) if linear.role is not WeightRole.LM_HEAD)
    products = [lazy_of(linear.weight).sources[0] for linear in inner]
    linears = (*checkpoint.linear_parameters(), *products)
    ignored = _float_modules(linears, files, names, {matrix.module for matrix in matrices})
    unused = tuple(name for name in files.store.infos() if name not in files.parts)
    return Contents(tuple(tensors), tuple(matrices), ignored, tuple(rounded), unused)


def _cache_tensors(graph: Graph, form: Format, files: FileTensors) -> Iterator[WrittenTensors]:
    """Yield the scales of the KV cache of each layer, beside its matrices in the files."""
    stored: dict[str, str] = {}
    for name, part in files.parts.items():
        stored.setdefault(part.parameter, name)
    for scales in cache_scales(graph):
        name = stored.get(scales.weight, scales.weight)
        values = form.cache_tensors(module_of(name), scales.keys, scales.values)
        specs = {each: (ir.DataType.FLOAT, value.shape) for each, value in values.items()}
        yield WrittenTensors(specs, partial(_given, values))


def _given(values: Mapping[str, Array]) -> Mapping[str, Array]:
    return values


def _joined_experts(files: FileTensors) -> dict[tuple[str, int], list[Rows]]:
    """Return the matrices of the files that make up one expert's matrix of a stack, such as gate and up."""
    joined: dict[tuple[str, int], list[Rows]] = {}
    for name, part in files.parts.items():
        if part.expert is not None:
            rows = StoredRows(files.store, files.store.infos()[name])
            joined.setdefault((part.parameter, part.expert), []).append(rows)
    return joined


def _require_files(files: FileTensors, parameters: set[str]) -> None:
    """Refuse a changed parameter that the files hold in parts."""
    for name, part in files.parts.items():
        if part.parameter in parameters and not part.is_whole:
            raise UnsupportedError(
                f"{part.parameter} is made of {name} and other tensors of the files, and cannot be written "
                "back as them",
                hint="give it a rule with scheme: null",
            )


def _changed_rows(graph: Graph) -> Iterator[Rows]:
    """Yield the weights of the graph that have other values than the checkpoint's.

    Raises:
        UnsupportedError: One is not a tensor of the checkpoint with scaled channels.
    """
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, LazyWeight) and tensor.rows is not None and _is_scaled(tensor.rows):
            yield tensor.rows


def _is_scaled(rows: Rows) -> bool:
    match rows:
        case ScaledRows():
            return True
        case CastRows() | ShiftedRows():
            return _is_scaled(rows.inner)
    return False


def _change(rows: Rows, dtype: ir.DataType) -> Array:
    """Return the values that a tensor needs for the graph to read `rows`, in `dtype`."""
    values = read_all(rows).astype(np.float32)
    inner = rows
    while not isinstance(inner, StoredRows):
        if isinstance(inner, ShiftedRows):
            values = values - np.float32(inner.shift)
        if not isinstance(inner, ScaledRows | CastRows | ShiftedRows):
            raise UnsupportedError(
                f"the channels of {', '.join(rows.sources)} are scaled, but the graph has them in another "
                "arrangement than the files",
                hint="leave scale_channels or calibration out of the target",
            )
        inner = inner.inner
    changed: Array = values.astype(dtype.numpy())
    return changed


def _in_steps(rows: Rows) -> Iterator[Array]:
    return (rows.rows(start, stop) for start, stop in row_chunks(rows))


def _named(name: str, read: partial[Array]) -> Mapping[str, Array]:
    return {name: read()}


def _encode(form: Format, matrix: CodedMatrix) -> Mapping[str, Array]:
    return form.encode(matrix, matrix.read())


def _written_type(info: TensorInfo, checkpoint: WrittenFrom, *, keep: bool) -> ir.DataType:
    """Return the type in which a tensor is written: that of the files, or of the config if they have none.

    Values that were dequantized are written in bfloat16 where the config names float32, as GGUF files
    have it: servers compute in half precision, and would round them when they load.
    """
    if keep or not info.dtype.is_floating_point():
        return info.dtype
    match str(getattr(checkpoint.config, "dtype", None)).removeprefix("torch."):
        case "float16":
            return ir.DataType.FLOAT16
        case "bfloat16":
            return ir.DataType.BFLOAT16
    return info.dtype if info.codes is None else ir.DataType.BFLOAT16


def _float_modules(
    linears: Sequence[str], files: FileTensors, names: Mapping[str, str], coded: set[str]
) -> tuple[str, ...]:
    """Return the linear modules without codes, by their names in the files, and in transformers if different.

    Matrices of experts, and those that transformers does not use, may be linear modules to a server.

    Args:
        linears: Parameters of linear layers and of products in the graph, routers among them.
        names: Name in the files by parameter.
        coded: Modules with codes.
    """
    found: dict[str, None] = {}
    for parameter in linears:
        name = names.get(parameter, parameter)
        if name.removesuffix(_WEIGHT) not in coded:
            found.update(dict.fromkeys((name, parameter)))
    infos = files.store.infos()
    for name in infos:
        part = files.parts.get(name)
        is_matrix = len(infos[name].shape) == 2 and name.endswith(_WEIGHT)
        is_other = part is None or not part.is_whole
        if is_matrix and is_other and name.removesuffix(_WEIGHT) not in coded:
            found[name] = None
    return tuple(name.removesuffix(_WEIGHT) for name in found)
