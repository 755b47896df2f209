"""Write GGUF files that describe the same model as a large or split one, but without its vocabulary.

transformers reads a model's config out of a GGUF file with `gguf.GGUFReader`, which takes seconds for a usual
vocabulary and needs none of it. The outline has every key except the tokenizer's arrays, and every tensor's
name with a single element; the copy has every tensor whole.
"""

import struct
from pathlib import Path
from typing import BinaryIO

from llmc.checkpoint.gguf_header import GgufHeader, GgufTensor

_EMBEDDING = "token_embd.weight"
_VERSION = 3
_UINT32 = 4
_F32 = 0
_ALIGNMENT_KEY = "general.alignment"
_ALIGNMENT = 32  # where the key is absent
_PIECE = 16 << 20


def write_outline(header: GgufHeader, target: Path) -> None:
    """Write the outline of the model to `target`.

    If the file states no vocabulary size, the number of embeddings is added as the size.
    """
    table = [_string(t.name) + struct.pack("<IQIQ", 1, 1, _F32, 0) for t in header.tensors]
    body = _head(header, table)
    target.write_bytes(body + bytes(-len(body) % _ALIGNMENT) + bytes(_ALIGNMENT))


def write_copy(header: GgufHeader, target: Path) -> None:
    """Write the model to `target` as one file, including all of its parts, without the tokenizer's arrays."""
    table, offset = [], 0
    for tensor in header.tensors:
        dimensions = tensor.shape[::-1]
        form = f"<I{len(dimensions)}QIQ"
        table.append(
            _string(tensor.name) + struct.pack(form, len(dimensions), *dimensions, tensor.type_id, offset)
        )
        offset += -(-_byte_count(tensor) // _ALIGNMENT) * _ALIGNMENT
    body = _head(header, table)
    with target.open("wb") as stream:
        stream.write(body + bytes(-len(body) % _ALIGNMENT))
        for tensor in header.tensors:
            _copy_values(tensor, stream)


def _head(header: GgufHeader, table: list[bytes]) -> bytes:
    """Return the bytes that precede the tensors' values."""
    dropped = {key for key in header.array_lengths if key.startswith("tokenizer.")} | {_ALIGNMENT_KEY}
    pairs = []
    with header.files[0].open("rb") as stream:
        for key, (start, end) in header.spans.items():
            if key not in dropped:
                stream.seek(start)
                pairs.append(stream.read(end - start))
    size_key = f"{header.architecture}.vocab_size"
    rows = [t.shape[0] for t in header.tensors if t.name == _EMBEDDING and t.shape]
    if size_key not in header.metadata and rows:
        pairs.append(_string(size_key) + struct.pack("<II", _UINT32, rows[0]))
    return b"".join([b"GGUF" + struct.pack("<IQQ", _VERSION, len(table), len(pairs)), *pairs, *table])


def _copy_values(tensor: GgufTensor, target: BinaryIO) -> None:
    left = _byte_count(tensor)
    with tensor.file.open("rb") as source:
        source.seek(tensor.offset)
        while left and (piece := source.read(min(left, _PIECE))):
            target.write(piece)
            left -= len(piece)
    target.write(bytes(-_byte_count(tensor) % _ALIGNMENT))


def _byte_count(tensor: GgufTensor) -> int:
    return tensor.row_bytes * (tensor.shape[0] if tensor.shape else 1)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
