"""Determine which tokens end, pad and begin a text."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmc.errors import ConfigError

#: transformers' file of generation defaults, which names the tokens that end a text.
GENERATION_CONFIG = "generation_config.json"


def special_tokens(
    folder: Path, config: Any, generation_config: Any, vocab: int
) -> dict[str, list[int] | int]:
    """Return the end-of-sequence ids, the padding id and the beginning-of-sequence id, each if known.

    The generation config decides, then the model's config. If the checkpoint has no generation config of
    its own, or none of its end ids is in the vocabulary, the tokenizer's end of sequence is added: a chat
    model's config often names only the end of text, and small models keep the default of a larger vocabulary.

    Args:
        folder: Directory with the tokenizer files.
        config: transformers `PreTrainedConfig` of the model.
        generation_config: transformers `GenerationConfig`; None if the checkpoint has none.
        vocab: Size of the vocabulary; ids outside of it are left out.
    """
    sources = [generation_config, config, config.get_text_config(decoder=True)]
    ids = {
        name: [i for i in _ids(sources, f"{name}_token_id") if 0 <= i < vocab]
        for name in ("bos", "eos", "pad")
    }
    if generation_config is None or generation_config._from_model_config or not ids["eos"]:
        ends = _tokenizer_eos(folder)
        ids["eos"] += [i for i in ends if i < vocab and i not in ids["eos"]]
    tokens: dict[str, list[int] | int] = {}
    if eos := ids["eos"] or ids["pad"]:
        tokens = {"eos_token_id": eos, "pad_token_id": (ids["pad"] or eos)[0]}
    if ids["bos"]:
        tokens["bos_token_id"] = ids["bos"][0]
    return tokens


def write_generation_config(folder: Path, config: Any, generation_config: Any, vocab: int) -> None:
    """Write generation_config.json with the special tokens, for runtimes without their own file.

    Args:
        folder: Directory with the tokenizer files.
        config: transformers `PreTrainedConfig` of the model.
        generation_config: As for `special_tokens`.
        vocab: Size of the vocabulary.
    """
    tokens = special_tokens(folder, config, generation_config, vocab)
    text = json.dumps(tokens, indent=2, sort_keys=True) + "\n"
    (folder / GENERATION_CONFIG).write_text(text, encoding="utf-8")


def read_stop_tokens(folder: Path) -> tuple[int, ...]:
    """Read the tokens that end a text from generation_config.json in `folder`; empty if it names none.

    Raises:
        ConfigError: The file is missing or damaged.
    """
    path = folder / GENERATION_CONFIG
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))["eos_token_id"]
    except KeyError:
        return ()
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="build the artifact again") from error
    return tuple(stated) if isinstance(stated, list) else (stated,)


def _ids(sources: Iterable[Any], attribute: str) -> list[int]:
    """Return the ids of the first source that states any."""
    for source in sources:
        stated = getattr(source, attribute, None)
        if stated is not None:
            return list(stated) if isinstance(stated, list) else [stated]
    return []


def _tokenizer_eos(folder: Path) -> list[int]:
    """Return the id of the end-of-sequence token that the tokenizer files in `folder` state, if they do."""
    settings, tokenizer = (_read_json(folder / f) for f in ("tokenizer_config.json", "tokenizer.json"))
    token = settings.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", ())}
    return [added[text]] if text in added else []


def _read_json(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return data if isinstance(data, dict) else {}
