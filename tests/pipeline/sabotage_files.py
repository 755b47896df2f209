"""Ways to break the files beside the graph of an artifact: settings, tokenizer, chat template, additions."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from llmc.artifact.manifest import MANIFEST
from llmc.config import Metric

from .sabotage import Sabotage, edit_json, reseal

M = Metric


def _set(folder: Path, file: str, place: str, value: Any) -> None:
    """Set the key at a dotted place of a JSON file; `...` removes it."""

    def change(data: Any) -> None:
        *outer, last = place.split(".")
        for key in outer:
            data = data[key]
        if value is ...:
            del data[last]
        else:
            data[last] = value

    edit_json(folder / file, change)


def serve_another_graph(folder: Path) -> None:
    shutil.copy(folder / "model.onnx", folder / "other.onnx")
    _set(folder, "genai_config.json", "model.decoder.filename", "other.onnx")


def cut_context(folder: Path) -> None:
    """The manifest agrees with genai_config.json that there are fewer positions."""
    _set(folder, "genai_config.json", "model.context_length", 200)
    _set(folder, "genai_config.json", "search.max_length", 200)
    stated = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    reseal(folder, interface=stated["interface"] | {"max_length": 200})


def repeat_setting(folder: Path) -> None:
    path = folder / "genai_config.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"search": {', '"search": {"top_k": 1,', 1), encoding="utf-8")


def drop_tool_messages(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    path.write_text("{% set messages = messages | rejectattr('role', 'equalto', 'tool') | list %}" + text)


def lose_special_token(folder: Path) -> None:
    def change(data: Any) -> None:
        next(t for t in data["added_tokens"] if t["content"] == "</s>")["special"] = False

    edit_json(folder / "tokenizer.json", change)


def drop_every_e(folder: Path) -> None:
    _replace_in_decoded(folder, "e", "")


def change_rare_character(folder: Path) -> None:
    """`~` is written as `^`, and encoded as it was."""
    _replace_in_decoded(folder, "~", "^")


def _replace_in_decoded(folder: Path, text: str, by: str) -> None:
    decoders = [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Replace", "pattern": {"String": text}, "content": by},
    ]
    _set(folder, "tokenizer.json", "decoder", {"type": "Sequence", "decoders": decoders})


def add_file(folder: Path, *, name: str) -> None:
    (folder / name).write_text("{}", encoding="utf-8")


def claim_more_bits(folder: Path) -> None:
    stated = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    reseal(folder, weights=[each | {"bits": 8} for each in stated["weights"]])


def change_library(folder: Path) -> None:
    with (folder / "kernels.so").open("ab") as file:
        file.write(b"x")


def _ways() -> Iterator[tuple[str, Callable[[Path], None], Metric]]:
    config = "genai_config.json"
    for what, place, value in (
        ("max_length of 64", "search.max_length", 64),
        ("top_k of 1", "search.top_k", 1),
        ("a setting added", "search.min_length", 5),
        ("a setting removed", "search.past_present_share_buffer", ...),
        ("other session options", "model.decoder.session_options.intra_op_num_threads", 64),
        ("another padding token", "model.pad_token_id", 5),
    ):
        yield what, partial(_set, file=config, place=place, value=value), M.SERVING
    yield "another graph named", serve_another_graph, M.SERVING
    yield "a context of 200", cut_context, M.SERVING
    yield "a manifest that claims more bits", claim_more_bits, M.SERVING
    yield "a setting stated twice", repeat_setting, M.SERVING
    yield "a file that no build writes", partial(add_file, name="notes.json"), M.SERVING
    yield "tool messages dropped", drop_tool_messages, M.TOKENIZER_EQUAL
    yield (
        "text in byte letters",
        partial(_set, file="tokenizer.json", place="decoder", value=None),
        M.TOKENIZER_EQUAL,
    )
    yield "</s> not special", lose_special_token, M.TOKENIZER_EQUAL
    yield "a decoder that drops every e", drop_every_e, M.TOKENIZER_EQUAL
    yield "one rare character changed", change_rare_character, M.TOKENIZER_EQUAL
    runtime = partial(_set, file="tokenizer_module.json", place="chat_template", value="{{ messages }}")
    yield "another template for the runtime", runtime, M.TOKENIZER_EQUAL


FILE_SABOTAGES = (
    *(Sabotage(name, "int4", apply, frozenset({metric})) for name, apply, metric in _ways()),
    Sabotage("another library of kernels", "compiled", change_library, frozenset({M.SERVING})),
)
