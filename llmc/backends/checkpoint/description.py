"""Write the files that describe a checkpoint to servers: config.json and generation_config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.artifact.store.disk import space_errors
from llmc.backends.special_tokens import GENERATION_CONFIG, special_tokens

if TYPE_CHECKING:
    from llmc.backends.checkpoint.contents import Contents
    from llmc.backends.checkpoint.formats.base import Format
    from llmc.backends.written import WrittenFrom

CONFIG = "config.json"
#: What a server needs besides to read images, sound and video for a model with towers.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_QUANTIZATION = "quantization_config"


def describe_folder(form: Format, contents: Contents, checkpoint: WrittenFrom) -> dict[str, Any]:
    """Return config.json with the declaration of the quantized matrices, and the documents beside it.

    Args:
        form: The format of the folder.

    Returns:
        A JSON document by file name.
    """
    fields = _original_fields(checkpoint)
    fields.pop(_QUANTIZATION, None)
    fields.pop("compression_config", None)
    if not contents.matrices:
        return {CONFIG: fields}
    fields[_QUANTIZATION] = form.config(contents.matrices, contents.ignored)
    return {CONFIG: fields, **form.side_files(contents.matrices, contents.ignored)}


def write_documents(
    folder: Path, documents: Mapping[str, Any], config: Any, generation_config: Any, vocabulary: int
) -> None:
    """Write the documents, and generation_config.json with the original's settings.

    Where the original has no generation_config.json, the tokens that end a text are taken from its config and
    its tokenizer.

    Args:
        folder: Folder that has the tokenizer's files already.
        config: transformers configuration of the model.
        generation_config: transformers `GenerationConfig`; None if the checkpoint has none.
        vocabulary: Number of the model's tokens.
    """
    settings = special_tokens(folder, config, generation_config, vocabulary)
    if generation_config is not None and not generation_config._from_model_config:
        settings = {**generation_config.to_diff_dict(), **settings}
        settings.pop("transformers_version", None)
    with space_errors(folder):
        for name, document in {**documents, GENERATION_CONFIG: settings}.items():
            text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")


def copy_processors(source: Path, folder: Path) -> None:
    """Copy the settings of the original's processors into `folder`; a text model, or a GGUF file, has none.

    Args:
        source: The original's folder or file.
    """
    with space_errors(folder):
        for name in PROCESSORS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)


def _original_fields(checkpoint: WrittenFrom) -> dict[str, Any]:
    """Return the fields of the original's config.json, or of its configuration where it has no such file.

    A GGUF file has none, and a model that was pruned or adapted may have other sizes.
    """
    file = checkpoint.path / CONFIG
    if not checkpoint.altered and file.is_file():
        fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return fields
    fields = json.loads(checkpoint.config.to_json_string(use_diff=True))
    fields.pop("transformers_version", None)
    return {"architectures": [checkpoint.architecture], **fields}
