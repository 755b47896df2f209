"""Load the tokenizer of a checkpoint, and write the files in which runtimes expect it."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from llmc.artifact.store.codec import TOKENIZER
from llmc.checkpoint.fields import read_fields
from llmc.checkpoint.gguf_header import GgufHeader
from llmc.checkpoint.gguf_tokenizer import check_tokenizer, has_vocabulary
from llmc.checkpoint.gguf_tokenizer_files import tokenizer_texts
from llmc.checkpoint.pointer import refuse_pointer
from llmc.errors import CheckpointError, ResourceError, UnsupportedError, first_lines, require_failure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Files that define a vocabulary by themselves, and files that accompany them.
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
_FILES = (*_VOCABULARIES, *_COMPANIONS)
_SPECIAL_TOKENS = "special_tokens_map.json"
_CONFIG = "tokenizer_config.json"
_AGAIN = "download tokenizer.json and tokenizer_config.json again"
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
#: transformers' name, in all of its releases, for a tokenizer fully defined by its tokenizer.json.
_GENERIC = "PreTrainedTokenizerFast"


def tokenizer_files(folder: Path) -> list[Path]:
    """List the files of a Hugging Face folder that belong to its tokenizer."""
    return [folder / name for name in _FILES if (folder / name).is_file()]


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a file that defines a vocabulary."""
    return any((folder / name).is_file() for name in _VOCABULARIES)


def require_tokenizer(path: Path) -> None:
    """Check by names and headers alone that a folder or GGUF file holds a supported tokenizer.

    Raises:
        CheckpointError: There is no tokenizer.
        UnsupportedError: A GGUF file holds a tokenizer of an unsupported kind.
        ResourceError: The package that reads the tokenizer is missing.
    """
    if path.is_file():
        header = GgufHeader.parse(path)
        if not has_vocabulary(header):
            raise CheckpointError(
                f"{path} has no tokenizer (its metadata holds no vocabulary)",
                hint="take a GGUF that was converted with its vocabulary",
            )
        check_tokenizer(header)
    elif not has_tokenizer(path):
        raise CheckpointError(
            f"{path} has no tokenizer",
            hint="put the model's tokenizer.json and tokenizer_config.json beside its config.json",
        )
    _require_sentencepiece(path)


def _require_sentencepiece(path: Path) -> None:
    """Check that sentencepiece is installed for its protobuf models; tiktoken's namesakes are text."""
    models = [path / name for name in _SENTENCEPIECE if (path / name).is_file()]
    if not models or (path / "tokenizer.json").is_file() or find_spec("sentencepiece") is not None:
        return
    with models[0].open("rb") as stream:
        if stream.read(1) == b"\n":  # the first field of the message, a piece of the vocabulary
            raise ResourceError(
                f"{models[0]} is a SentencePiece model, but the package sentencepiece is not installed",
                hint="pip install sentencepiece",
            )


def load_tokenizer(path: Path, template: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or GGUF file with `AutoTokenizer`.

    Args:
        template: Chat template that replaces the tokenizer's own; None to keep its own.
    """
    require_tokenizer(path)
    if path.is_file():
        with TemporaryDirectory() as folder:
            for name, text in tokenizer_texts(GgufHeader.parse(path)).items():
                (Path(folder) / name).write_text(text, encoding="utf-8")
            tokenizer = _load_folder(Path(folder), path)
        tokenizer.name_or_path = ""
    else:
        tokenizer = _load_folder(path, path)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _load_folder(folder: Path, named: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer from the files of `folder`; `named` is the path that the user gave."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer("a", verbose=False)
    except BaseException as error:  # tokenizers raises a bare Exception, or panics
        require_failure(error)
        for file in tokenizer_files(folder):
            refuse_pointer(file)
        _refuse_code(folder / _CONFIG, error)
        raise CheckpointError(
            f"the tokenizer of {named} cannot be read: {first_lines(error)}",
            hint=_AGAIN,
        ) from error
    _refuse_dropout(tokenizer, named)
    if not tokenizer.chat_template:  # an empty text, or an empty list
        tokenizer.chat_template = None
    return tokenizer


def _refuse_dropout(tokenizer: Any, named: Path) -> None:
    """Refuse a tokenizer that skips merges at random, as some are saved after training."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    dropout = getattr(getattr(inner, "model", None), "dropout", None)
    if dropout:
        raise CheckpointError(
            f"the tokenizer of {named} leaves out merges at random (dropout {dropout:g}), so that the same "
            "text gives different tokens every time",
            hint=f"set dropout to null in {TOKENIZER}, as is usual for inference",
        )


def _refuse_code(file: Path, error: BaseException) -> None:
    """Raise `UnsupportedError` if the tokenizer is code shipped with the model."""
    settings = _read_settings(file)
    if settings.get("auto_map"):
        raise UnsupportedError(
            f"{file} names the tokenizer class {settings.get('tokenizer_class')} of code shipped with the "
            "model, which is not run",
            hint=f"remove auto_map and tokenizer_class from {file.name} if its tokenizer.json is complete",
        ) from error


def plain_template(tokenizer: Any) -> str | None:
    """Return the chat template for conversations without tools; None if there is none."""
    stated = tokenizer.chat_template
    template: str | None = stated.get("default") if isinstance(stated, dict) else stated
    return template or None


def save_tokenizer(path: Path, folder: Path, tokenizer: Any, template: str | None) -> tuple[Path, ...]:
    """Write the tokenizer's files into `folder`; see `Checkpoint.save_tokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    copied = tokenizer_files(path) if path.is_dir() else []
    is_new = TOKENIZER not in {file.name for file in copied}
    if is_new:
        _save_converted(tokenizer, folder)
    for file in copied:
        shutil.copyfile(file, folder / file.name)
    if not (folder / TOKENIZER).is_file():
        raise UnsupportedError(
            f"the tokenizer of {path} is a {type(tokenizer).__name__}, which transformers cannot write as "
            f"{TOKENIZER}",
            hint=f"put a {TOKENIZER} into the checkpoint's folder",
        )
    _write_vocabulary(tokenizer, folder / TOKENIZER, is_new=is_new)
    if tokenizer.chat_template is None or template is not None:
        for name in _TEMPLATES:
            (folder / name).unlink(missing_ok=True)
    if template is not None:
        (folder / _TEMPLATES[0]).write_text(template, encoding="utf-8")
    _write_settings(tokenizer, folder / _CONFIG, given=template is not None)
    return tuple(sorted(file for name in _FILES if (file := folder / name).is_file()))


def _write_vocabulary(tokenizer: Any, file: Path, *, is_new: bool) -> None:
    """Replace a tokenizer.json that differs from the tokenizer that transformers builds from it.

    Some classes rebuild parts of the tokenizer, or add tokens that tokenizer_config.json names; an added
    token whose id leaves a gap gets the next free id.

    Args:
        is_new: Whether transformers wrote the file; its indentation more than doubles the size.
    """
    from tokenizers import Tokenizer

    def plain(inner: Any) -> str:
        inner.no_truncation()
        inner.no_padding()
        return str(inner.to_str())

    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return
    whole = plain(Tokenizer.from_str(inner.to_str()))
    stated = json.loads(file.read_text(encoding="utf-8")).get("added_tokens") or ()
    moved = any(inner.token_to_id(token["content"]) != token["id"] for token in stated)
    if is_new or moved or plain(Tokenizer.from_file(str(file))) != whole:
        file.write_text(whole, encoding="utf-8")


def _write_settings(tokenizer: Any, file: Path, *, given: bool) -> None:
    """Write tokenizer_config.json with the class that transformers used, if it names another.

    Without the checkpoint's config.json beside it, transformers would guess a different class.

    Args:
        given: Whether the user gave the chat template, which is stored in its own file.
    """
    settings = _read_settings(file)
    before = dict(settings)
    settings.pop("auto_map", None)
    if given or not settings.get("chat_template"):
        settings.pop("chat_template", None)
    name, stated = type(tokenizer).__name__, settings.get("tokenizer_class")
    if not isinstance(stated, str) or _bare_class(stated) != _bare_class(name):
        settings["tokenizer_class"] = _GENERIC if _bare_class(name) == _bare_class(_GENERIC) else name
    if settings != before or not file.is_file():
        text = json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        file.write_text(text, encoding="utf-8")


def _bare_class(name: str) -> str:
    """Return one name for a class that transformers 4 and 5 name differently."""
    return _GENERIC if name == "TokenizersBackend" else f"{name.removesuffix('Fast')}Fast"


def _read_settings(file: Path) -> dict[str, Any]:
    return read_fields(file) if file.is_file() else {}


def _save_converted(tokenizer: Any, folder: Path) -> None:
    # How it was loaded is not a property of the tokenizer, and would differ between machines.
    for key in ("local_files_only", "is_local", "name_or_path"):
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)
    (folder / _SPECIAL_TOKENS).write_text(
        json.dumps(tokenizer.special_tokens_map, indent=2, ensure_ascii=False, sort_keys=True) + "\n",
        encoding="utf-8",
    )
