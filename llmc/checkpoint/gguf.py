"""Read the tensors of a GGUF file under transformers names, dequantized a range of rows at a time.

transformers' own code maps the names and undoes llama.cpp's transformations (the q/k permutation of rotary
embeddings, norms stored plus one, joined experts): `integrations.gguf` for the architectures that it covers,
`modeling_gguf_pytorch_utils` for the rest. All values are read as float32. The integer codes are available
beside them wherever rows are only reordered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.checkpoint import conversion
from llmc.checkpoint.finite import FiniteCheck
from llmc.checkpoint.gguf_codes import block_codes
from llmc.checkpoint.gguf_header import GgufHeader, GgufTensor
from llmc.checkpoint.gguf_rope import ROPE_TENSORS, check_rotary
from llmc.checkpoint.ranges import WholeValues, read_range, row_range
from llmc.checkpoint.rearrange import Arrangement, find_arrangement, probe, probe_shapes, rearrange
from llmc.errors import CheckpointError, UnsupportedError
from llmc.graph.weights import CodeGrid, TensorInfo, WeightStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_ELEMENTS = 1 << 20  # elements dequantized at once; gguf needs several times their size as scratch


@dataclass(frozen=True)
class GgufSource:
    """The tensors of a file, and the transformers mapping from their names to the model's names.

    Args:
        store: Results of transformers' processor, or the tensors unchanged.
        mapping: Renamings and converters for the names of `store`.
        files: Every tensor under its name in the file.
        dropped: Names in the file for which the processor gives no result.
    """

    store: WeightStore
    mapping: list[Any]
    files: WeightStore
    dropped: tuple[str, ...] = ()


def open_gguf(header: GgufHeader, model: PreTrainedModel) -> GgufSource:
    """Open the tensors of a GGUF model for `model`; only the factors of rotary frequencies are read.

    Raises:
        CheckpointError: The file is damaged, or holds another model.
        UnsupportedError: The architecture, a quantization or the rotary embedding is not supported.
    """
    from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, is_gguf_arch_supported

    check_rotary(header, model)
    blocks = BlockStore(header.files[0], header)
    if is_gguf_arch_supported(header.architecture):
        return GgufSource(blocks, get_gguf_conversion_mapping(header.architecture, model.config), blocks)
    processed = ProcessedStore.open(blocks, header.architecture, model)
    return GgufSource(processed, conversion.model_mapping(model), blocks, processed.dropped)


class BlockStore:
    """A `WeightStore` over a GGUF model that gives float32 values under the names in its files.

    Factors of rotary frequencies are excluded; they are part of the config.
    """

    def __init__(self, file: Path, header: GgufHeader) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

        self.file = file
        self._finite = FiniteCheck()
        self._tensors = {tensor.name: tensor for tensor in header.tensors if tensor.name not in ROPE_TENSORS}
        self._infos = MappingProxyType(
            {
                name: TensorInfo(name, tensor.shape, ir.DataType.FLOAT, self._codes(tensor))
                for name, tensor in self._tensors.items()
            }
        )
        for tensor in self._tensors.values():
            kind = GGMLQuantizationType(tensor.type_id)
            try:
                quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError as error:
                raise UnsupportedError(
                    f"{tensor.name} in {tensor.file} is stored as {kind.name}, "
                    f"which the gguf package cannot dequantize",
                    hint="use another quantization of the model",
                ) from error

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        from gguf import GGMLQuantizationType, quants

        tensor: GgufTensor = self._tensors[name]
        low, high = row_range(tensor.shape, start, stop)
        out = np.empty((high - low, math.prod(tensor.shape[1:])), np.float32)
        step = max(1, _CHUNK_ELEMENTS // max(1, out.shape[1]))
        for at in range(low, high, step):
            end = min(at + step, high)
            raw = self._read_bytes(tensor, at, end)
            with np.errstate(all="ignore"):  # non-finite values are refused below
                out[at - low : end - low] = quants.dequantize(raw, GGMLQuantizationType(tensor.type_id))
        out = out.reshape((high - low, *tensor.shape[1:]) if tensor.shape else ())
        return self._finite.check(name, low, out)

    def _read_bytes(self, tensor: GgufTensor, start: int, stop: int) -> Array:
        """Read rows start:stop as stored, uint8 (stop - start, bytes per row)."""
        stored = (tensor.shape[0] if tensor.shape else 1, tensor.row_bytes)
        return read_range(tensor.file, tensor.offset, np.dtype(np.uint8), stored, start, stop)

    def _codes(self, tensor: GgufTensor) -> Callable[[], CodeGrid | str] | None:
        """Return the value of `TensorInfo.codes` for a tensor."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        kind = GGMLQuantizationType(tensor.type_id)
        if GGML_QUANT_SIZES[kind][0] == 1:
            return None
        if len(tensor.shape) != 2:
            return lambda: f"it has {len(tensor.shape)} axes"
        codes = block_codes(tensor.type_id)
        if codes is None:
            return lambda: f"{kind.name} has codes that are not evenly spaced"
        grid = codes.grid(tensor.type_id, lambda start, stop: self._read_bytes(tensor, start, stop))
        return lambda: grid


@dataclass(frozen=True)
class _Target:
    """A tensor under its transformers name.

    `untouched` says that one file tensor holds the same values; otherwise the processor converts `parts`.
    """

    info: TensorInfo
    parts: tuple[str, ...]
    untouched: bool


class ProcessedStore:
    """A `WeightStore` of the tensors that a transformers `TensorProcessor` makes from those of a file."""

    def __init__(
        self, blocks: BlockStore, processor: Any, names: dict[str, str], targets: Mapping[str, _Target]
    ) -> None:
        self._blocks = blocks
        self._processor = processor
        self._names = names
        self._targets = targets
        self._infos = MappingProxyType({name: target.info for name, target in targets.items()})
        self._whole = WholeValues()

    @classmethod
    def open(cls, blocks: BlockStore, architecture: str, model: PreTrainedModel) -> ProcessedStore:
        """Find the effect of the processor on each tensor by giving it a narrow tensor with as many rows."""
        from transformers.modeling_gguf_pytorch_utils import (
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
        )

        processor_of: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        processor = processor_of(config=model.config.to_dict())
        try:
            names: dict[str, str] = get_gguf_hf_weights_map(names_of(model), processor)
        except NotImplementedError as error:
            raise UnsupportedError(
                f"{blocks.file} is a GGUF of architecture {architecture}, "
                f"whose tensor names the installed gguf package does not know",
                hint="compile the original Hugging Face checkpoint instead",
            ) from error
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        parts: dict[str, list[str]] = {}
        probed: dict[str, _Probed] = {}
        for name, info in blocks.infos().items():
            for target, effect in _probe(processor, names, info).items():
                parts.setdefault(target, []).append(name)
                probed[target] = effect
        targets: dict[str, _Target] = {}
        for target, sources in parts.items():
            stored = blocks.infos()[sources[0]].shape
            shape = stored if probed[target].untouched else shapes.get(target, stored)
            elements = sum(math.prod(blocks.infos()[source].shape) for source in sources)
            if math.prod(shape) != elements:
                raise CheckpointError(
                    f"{', '.join(sources)} in {blocks.file} have {elements} elements, "
                    f"{target} has {list(shape)}",
                    hint="the file's metadata and tensors must belong to the same model",
                )
            codes = rearrange([blocks.infos()[source] for source in sources], probed[target].arrangement)
            info = TensorInfo(target, shape, ir.DataType.FLOAT, codes)
            targets[target] = _Target(info, tuple(sources), probed[target].untouched)
        return cls(blocks, processor, names, targets)

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @property
    def dropped(self) -> tuple[str, ...]:
        """The tensors of the file for which the processor gives no result."""
        used = {part for target in self._targets.values() for part in target.parts}
        return tuple(name for name in self._blocks.infos() if name not in used)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        target = self._targets[name]
        if target.untouched:
            return self._blocks.read(target.parts[0], start, stop)
        return self._whole.rows(name, lambda: self._process(target), start, stop)

    def _process(self, target: _Target) -> Array:
        results: dict[str, Any] = {}
        for part in target.parts:
            results.update(_process(self._processor, self._names, part, self._blocks.read(part), results))
        value = results[target.info.name]
        return np.ascontiguousarray(value if isinstance(value, np.ndarray) else value.numpy(), np.float32)


@dataclass(frozen=True)
class _Names:
    """The part of a model that `get_gguf_hf_weights_map` needs: names, config and children.

    That function rebuilds its name map for every module below; a file is written from the causal model or
    from its base model, so these two levels are enough.
    """

    config: Any
    state: Mapping[str, Any]
    children: tuple[tuple[str, _Names], ...] = ()

    def state_dict(self) -> Mapping[str, Any]:
        return self.state

    def named_children(self) -> list[tuple[str, _Names]]:
        return list(self.children)


def names_of(model: PreTrainedModel) -> _Names:
    base = _Names(model.config, model.base_model.state_dict())
    return _Names(model.config, model.state_dict(), ((model.base_model_prefix, base),))


def _process(
    processor: Any, names: dict[str, str], name: str, values: Array, results: dict[str, Any]
) -> dict[str, Any]:
    """Return the tensors, by transformers name, that the processor makes of file tensor `name`.

    `results` holds the results of earlier parts of the same tensors; the processor adds to it in place.
    """
    result = processor.process(
        weights=values, name=name, tensor_key_mapping=names, parsed_parameters={"tensors": results}
    )
    if result.name in names:
        return {names[result.name]: result.weights}
    return results if result.name is None else {}


@dataclass(frozen=True)
class _Probed:
    """The effect of the processor on a tensor: none, an arrangement of rows, or something else (None)."""

    untouched: bool
    arrangement: Arrangement | None


def _probe(processor: Any, names: dict[str, str], info: TensorInfo) -> dict[str, _Probed]:
    """Find the processor's effect on a file tensor, by target name, with a narrow tensor of as many rows."""
    for shape in probe_shapes(info.shape):
        values = probe(shape)
        try:
            with np.errstate(all="ignore"):
                results = _process(processor, names, info.name, values, {})
        except (ValueError, IndexError):  # the processor needs all columns, or rearranges more than rows
            continue
        return {
            target: _Probed(value is values, find_arrangement(np.asarray(value), shape[-1]))
            for target, value in results.items()
        }
    return {names[info.name]: _Probed(False, None)} if info.name in names else {}
