"""Read tensors of a safetensors folder by byte range: headers when opening, rows on demand.

Format: 8 bytes little-endian length, that many bytes of JSON
{name: {dtype, shape, data_offsets: [begin, end]}}, then the tensors back to back
(https://github.com/huggingface/safetensors#format). Files are read with `pread` instead of being mapped, so
that their pages do not count as the process's memory.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.checkpoint.fields import read_fields
from llmc.checkpoint.finite import FiniteCheck
from llmc.checkpoint.location import whole_models
from llmc.checkpoint.pointer import refuse_dangling, refuse_pointer
from llmc.checkpoint.ranges import read_range, row_range
from llmc.checkpoint.ties import equal_rows
from llmc.errors import CheckpointError, UnsupportedError, count_names
from llmc.graph.weights import TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_HEADER_LIMIT = 100_000_000  # the format's own limit
_DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class _Stored:
    file: Path
    offset: int  # bytes from the start of the file
    dtype: np.dtype
    info: TensorInfo

    def read(self, start: int, stop: int | None) -> Array:
        return read_range(self.file, self.offset, self.dtype, self.info.shape, start, stop)


class SafetensorsStore:
    """A `WeightStore` over one or several safetensors files, under the names in the files.

    Args:
        notes: Sentences for the user about files that are not read.
    """

    def __init__(
        self, files: tuple[Path, ...], tensors: Mapping[str, _Stored], notes: tuple[str, ...] = ()
    ) -> None:
        self.files = files
        self.notes = notes
        self._tensors = tensors
        self._infos = MappingProxyType({name: t.info for name, t in tensors.items()})
        self._finite = FiniteCheck()

    @classmethod
    def open(cls, folder: Path) -> "SafetensorsStore":
        """Read the headers of the weights in `folder` and check files, sizes and index against each other.

        Raises:
            CheckpointError: There are no weights, a shard is missing or truncated, or the index does not
                match.
            UnsupportedError: A tensor has an unsupported type, such as packed fp4.
        """
        if (folder / SINGLE).is_file():
            return cls((folder / SINGLE,), _read_header(folder / SINGLE), _unread_shards(folder))
        if (folder / INDEX).is_file():
            return cls._open_sharded(folder)
        refuse_dangling(folder)
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
        if pickled:
            raise CheckpointError(
                f"{folder} holds only pickled weights ({pickled[0]}), which are not loaded",
                hint="load it with transformers once and `save_pretrained` it as safetensors",
            )
        models, named = whole_models(folder), sorted(file.name for file in folder.glob("*.safetensors"))
        hint = "download the model's weights into the folder"
        if models:
            hint = f"give the GGUF file: {folder / models[0]}"
        elif named:
            hint = f"a single file must be named {SINGLE}; several need their index, {INDEX}"
        content = f"; it holds {count_names(named)}" if named else ""
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{content}", hint=hint)

    @classmethod
    def open_file(cls, file: Path) -> "SafetensorsStore":
        """Open a single file and read its header.

        Raises:
            CheckpointError: The file is truncated or damaged.
            UnsupportedError: A tensor has an unsupported type.
        """
        return cls((file,), _read_header(file))

    @classmethod
    def _open_sharded(cls, folder: Path) -> "SafetensorsStore":
        index = folder / INDEX
        try:
            weight_map = read_fields(index)["weight_map"]
            placed: dict[str, str] = dict(weight_map.items())
        except (KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{index} is not an index of safetensors files: it has no weight_map",
                hint="download it again",
            ) from error
        for name, file in placed.items():
            if not _is_file_name(file):
                raise CheckpointError(
                    f"{index} names a file outside of its folder for {name}: {str(file)[:60]!r}",
                    hint="download it again",
                )
        names = sorted(set(placed.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(names)} shards are missing in {folder}: {', '.join(missing)}",
                hint="finish the download",
            )
        shards = {name: _read_header(folder / name) for name in names}
        for tensor, file in placed.items():
            if tensor not in shards[file]:
                raise CheckpointError(f"{index} places {tensor} in {file}, which does not hold it")
        tensors = {tensor: shards[file][tensor] for tensor, file in placed.items()}
        for name, tensors_of_shard in shards.items():
            _check_placed(folder / name, tensors_of_shard, tensors)
        return cls(tuple(folder / name for name in names), tensors)

    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        stored = self._tensors[name]
        low, _ = row_range(stored.info.shape, start, stop)
        return self._finite.check(name, low, stored.read(start, stop))


def _is_file_name(value: object) -> bool:
    """Return whether a value can be the name of a file in a folder."""
    if not isinstance(value, str) or "\0" in value:
        return False
    return Path(value).name == value and 0 < len(value.encode(errors="surrogatepass")) < 256


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds one safetensors file, or an index of several."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def _unread_shards(folder: Path) -> tuple[str, ...]:
    """Return a note if shards exist beside the single file that is read, as transformers does."""
    shards = sorted(file.name for file in folder.glob("model-*-of-*.safetensors"))
    if not shards:
        return ()
    return (f"Not used: {count_names(shards)}, since {SINGLE} exists beside them and is read first.",)


def _check_placed(shard: Path, shard_tensors: Mapping[str, _Stored], tensors: Mapping[str, _Stored]) -> None:
    """Check that every tensor of a shard is the tensor that the index refers to.

    Raises:
        CheckpointError: The index does not list it, or assigns it to another file with other values.
    """
    hint = "the shards are of different versions of the model: download them again, with their index"
    for name, stored in shard_tensors.items():
        if name not in tensors:
            raise CheckpointError(f"{shard} holds {name}, which {INDEX} does not name", hint=hint)
        other = tensors[name]
        both = SafetensorsStore((), {"here": stored, "there": other})
        if other is not stored and not equal_rows(both, "here", "there"):
            raise CheckpointError(
                f"{shard} holds {name} with other values than {other.file.name}, where {INDEX} places it",
                hint=hint,
            )


def _read_header(file: Path) -> dict[str, _Stored]:
    size = os.path.getsize(file)
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _HEADER_LIMIT):
            refuse_pointer(file)
            raise CheckpointError(
                f"{file} is not a safetensors file, or is truncated within its header ({size} bytes)",
                hint="download it again",
            )
        text = stream.read(length)
    entries = _parse_entries(file, text)
    tensors: dict[str, _Stored] = {}
    data = 8 + length
    for name, dtype_name, shape, begin, end in entries:
        if dtype_name not in _DTYPES:
            raise UnsupportedError(
                f"{name} in {file} is stored as {dtype_name}; supported are {', '.join(_DTYPES)}",
                hint="compile the original checkpoint in float instead",
            )
        dtype = _DTYPES[dtype_name]
        if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{file} gives {name} {end - begin} bytes, but {dtype_name} {list(shape)} takes "
                f"{math.prod(shape) * dtype.itemsize}"
            )
        info = TensorInfo(name, shape, ir.DataType.from_numpy(dtype))
        if name in tensors:
            raise CheckpointError(f"{file} names {name} twice in its header", hint="download it again")
        tensors[name] = _Stored(file, data + begin, dtype, info)
    expected = data + max((entry.end for entry in entries), default=0)
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise CheckpointError(
            f"{file} is {state}: {size} bytes, its header describes {expected}", hint="download it again"
        )
    _check_format(file)
    return tensors


class _Entry(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the end of the header
    end: int


def _parse_entries(file: Path, text: bytes) -> list[_Entry]:
    """List the tensors that a header describes; a repeated name is listed each time it occurs."""
    try:
        pairs: list[tuple[str, Any]] = json.loads(text, object_pairs_hook=list)
        fields = [(name, dict(entry)) for name, entry in pairs if name != "__metadata__"]
        return [
            _Entry(name, str(e["dtype"]), tuple(map(int, e["shape"])), *map(int, e["data_offsets"][:2]))
            for name, e in fields
        ]
    except (
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"{file} has a damaged header: {error}", hint="download it again") from error


def _check_format(file: Path) -> None:
    """Check a file by the rules of the safetensors library, which maps it and reads only its header.

    Raises:
        CheckpointError: Tensors overlap or leave gaps between them, or a field has a wrong type.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{file} has a damaged header: {error}", hint="download it again") from error
