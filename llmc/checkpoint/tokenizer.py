"""The tokenizer of a checkpoint, and the files in which runtimes expect it."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.checkpoint.gguf_header import GgufHeader
from llmc.errors import CheckpointError, ResourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Files that alone define a vocabulary, and those that go with them.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "tiktoken.model",
)
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_SPECIAL_TOKENS = "special_tokens_map.json"


def tokenizer_files(folder: Path) -> list[Path]:
    """Files of a Hugging Face folder that belong to its tokenizer."""
    return [folder / name for name in (*_VOCABULARIES, *_COMPANIONS) if (folder / name).is_file()]


def require_tokenizer(path: Path) -> None:
    """Check that a folder or GGUF file holds a tokenizer that can be read here.

    Raises:
        CheckpointError: There is none.
        ResourceError: The package that reads it is missing.
    """
    if path.is_file():
        found = "tokenizer.ggml.tokens" in GgufHeader.parse(path).array_lengths
    else:
        found = any((path / name).is_file() for name in _VOCABULARIES)
    if not found:
        raise CheckpointError(
            f"{path} has no tokenizer",
            hint="put the model's tokenizer.json and tokenizer_config.json beside its config.json",
        )
    _require_sentencepiece(path)


def _require_sentencepiece(path: Path) -> None:
    """A model of SentencePiece is a protobuf message; tiktoken's files of the same name are text."""
    models = [path / name for name in _SENTENCEPIECE if (path / name).is_file()]
    if not models or (path / "tokenizer.json").is_file() or find_spec("sentencepiece") is not None:
        return
    with models[0].open("rb") as stream:
        if stream.read(1) == b"\n":  # the first field of the message, a piece of the vocabulary
            raise ResourceError(
                f"{models[0]} is a SentencePiece model, and the package sentencepiece is not installed",
                hint="pip install sentencepiece",
            )


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or GGUF file, through `AutoTokenizer`."""
    require_tokenizer(path)

    from transformers import AutoTokenizer

    source: dict[str, Any] = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **source
        )
    except Exception as error:  # tokenizers raises a bare Exception on files that it cannot read
        raise CheckpointError(f"the tokenizer of {path} cannot be read: {error}") from error
    return tokenizer


def save_tokenizer(path: Path, folder: Path) -> tuple[Path, ...]:
    """Write the tokenizer's files into `folder`; see `Checkpoint.save_tokenizer`."""
    require_tokenizer(path)
    folder.mkdir(parents=True, exist_ok=True)
    written: set[Path] = set()
    copied = tokenizer_files(path) if path.is_dir() else []
    names = {file.name for file in copied}
    if "tokenizer.json" not in names:
        written.update(_save_converted(path, folder))
    for file in copied:
        written.add(Path(shutil.copyfile(file, folder / file.name)))
    return tuple(sorted(written))


def _save_converted(path: Path, folder: Path) -> list[Path]:
    tokenizer = load_tokenizer(path)
    # How it was loaded is no property of the tokenizer, and would differ between machines.
    for key in ("local_files_only", "is_local", "name_or_path", "gguf_file"):
        tokenizer.init_kwargs.pop(key, None)
    saved = [Path(name) for name in tokenizer.save_pretrained(folder)]
    special = folder / _SPECIAL_TOKENS
    special.write_text(
        json.dumps(tokenizer.special_tokens_map, indent=2, ensure_ascii=False, sort_keys=True) + "\n",
        encoding="utf-8",
    )
    return [file for file in (*saved, special) if file.is_file()]
