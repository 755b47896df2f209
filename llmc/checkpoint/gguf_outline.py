"""A small GGUF file that describes the same model as a large one, or as several parts.

transformers reads a model's config out of a GGUF file with `gguf.GGUFReader`, which takes seconds for
a usual vocabulary and needs none of it. The outline has every key but the tokenizer's arrays, and
every tensor's name over a single element.
"""

import struct
from pathlib import Path

from llmc.checkpoint.gguf_header import GgufHeader

_EMBEDDING = "token_embd.weight"
_VERSION = 3
_UINT32 = 4
_F32 = 0
_ALIGNMENT_KEY = "general.alignment"


def write_outline(header: GgufHeader, target: Path) -> None:
    """Write the outline of the model to `target`.

    Where the file states no vocabulary size, the number of embeddings is added as one.
    """
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
    table = [_string(t.name) + struct.pack("<IQIQ", 1, 1, _F32, 0) for t in header.tensors]
    head = b"GGUF" + struct.pack("<IQQ", _VERSION, len(table), len(pairs))
    body = b"".join([head, *pairs, *table])
    target.write_bytes(body + bytes(-len(body) % 32) + bytes(32))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
