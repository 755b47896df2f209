"""Write a GGUF's tokenizer as the files of a Hugging Face folder, and cache them in the stage cache.

The key of an entry covers the bytes of the metadata that describe the tokenizer, the code that builds it and
the versions of the libraries that write it. An entry is a JSON object of file names and texts.
"""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from llmc.artifact.store.cache import StageCache, content_key, default_cache_folder
from llmc.checkpoint import gguf_pretokenizers, gguf_tokenizer
from llmc.checkpoint.gguf_header import GgufHeader
from llmc.errors import LlmcError

_CACHE_BYTES = 512 << 20  # a vocabulary of 262,144 tokens takes 33 MB
_LOADING_ARGUMENTS = ("local_files_only", "is_local", "name_or_path", "gguf_file")


def tokenizer_texts(header: GgufHeader) -> dict[str, str]:
    """Return the texts of tokenizer.json, tokenizer_config.json and the chat template, by file name.

    Raises:
        CheckpointError: The vocabulary is damaged.
        UnsupportedError: The kind of tokenizer is not supported.
    """
    gguf_tokenizer.check_tokenizer(header)
    cache = StageCache(default_cache_folder() / "tokenizer", _CACHE_BYTES)
    key = _key(header)
    cached = _read_cached(cache, key)
    if cached is not None:
        return cached
    texts = _make(header)
    try:
        cache.put(key, json.dumps(texts).encode())
    except (LlmcError, OSError):  # a read-only folder only costs the next build some seconds
        return texts
    return texts


def _read_cached(cache: StageCache, key: str) -> dict[str, str] | None:
    try:
        entry = cache.get(key)
        texts = None if entry is None else json.loads(entry)
    except (OSError, ValueError):  # unreadable entry: build it again
        return None
    is_complete = isinstance(texts, dict) and "tokenizer.json" in texts
    return texts if is_complete else None


def _key(header: GgufHeader) -> str:
    state = hashlib.sha256(header.architecture.encode())
    with header.files[0].open("rb") as stream:
        for key, (start, end) in sorted(header.spans.items()):
            if key.startswith("tokenizer."):
                stream.seek(start)
                state.update(stream.read(end - start))
    for module in (__file__, gguf_tokenizer.__file__, gguf_pretokenizers.__file__):
        state.update(Path(module).read_bytes())
    facts = {"vocabulary": state.hexdigest()}
    return content_key("tokenizer", facts | {name: version(name) for name in ("tokenizers", "transformers")})


def _make(header: GgufHeader) -> dict[str, str]:
    tokenizer = gguf_tokenizer.build_tokenizer(header)
    for key in _LOADING_ARGUMENTS:  # how it was loaded is not a property of the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    with TemporaryDirectory() as folder:
        saved = [Path(name) for name in tokenizer.save_pretrained(folder)]
        return {file.name: file.read_text(encoding="utf-8") for file in saved if file.is_file()}
