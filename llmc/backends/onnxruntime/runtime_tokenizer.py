"""Write and test tokenizer_module.json, with which onnxruntime-genai overrides tokenizer_config.json.

The runtime (onnxruntime-extensions, operators/tokenizer/tokenizer_jsconfig.hpp) reads tokenizer_config.json
with stricter types than transformers writes, and then overrides its keys by those of tokenizer_module.json.
transformers does not read that file, so the runtime's form of the settings can be stored beside the
checkpoint's own. Observed with onnxruntime-genai 0.18:

- `tokenizer_class` chooses the algorithm from a fixed list of names; a few names change it further.
- `add_bos_token` and `add_eos_token`, where both are stated, decide what `add_special_tokens` adds.
- `chat_template` must be a string.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmc.artifact.manifest import MODEL
from llmc.artifact.provenance import tool_versions
from llmc.artifact.store.cache import StageCache, content_key, default_cache_folder
from llmc.artifact.store.folder import digest_file
from llmc.backends.onnxruntime import tokenizer_worker
from llmc.backends.onnxruntime.genai import GENAI_CONFIG
from llmc.backends.onnxruntime.tokenizer_worker import Answers, TokenizerQuestion
from llmc.errors import ParityError
from llmc.graph.domains import OPSET, STANDARD
from llmc.runtime.libraries import load_genai

RUNTIME_SETTINGS = "tokenizer_module.json"
#: Classes of the runtime to try after the tokenizer's own: plain BPE, BPE after NFC, Unigram.
CLASSES = ("TokenizersBackend", "Qwen2Tokenizer", "XLMRobertaTokenizer")
#: Largest size in bytes of the cache of answers.
_CACHE_BYTES = 256 << 20
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def write_runtime_settings(
    folder: Path, tokenizer: Any, name: str, template: str | None, *, before: bool, after: bool
) -> Path:
    """Write tokenizer_module.json beside the tokenizer's files.

    Args:
        tokenizer: The original's, loaded by transformers.
        name: Class that the file names.
        template: Chat template of a plain conversation; None if there is none.
        before: Whether the beginning-of-sequence token precedes a text.
        after: Whether the end-of-sequence token follows it.
    """
    settings: dict[str, object] = {key: getattr(tokenizer, key) or "" for key in _SPECIAL}
    settings |= {
        "tokenizer_class": name,
        "chat_template": template or "",
        "add_bos_token": before,
        "add_eos_token": after,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1e30,
        "tiktoken_file": "",
    }
    path = folder / RUNTIME_SETTINGS
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


def stated_class(folder: Path) -> str | None:
    """Return the class that tokenizer_module.json names; None if the file or the class is missing."""
    try:
        stated = json.loads((folder / RUNTIME_SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = stated.get("tokenizer_class") if isinstance(stated, dict) else None
    return name if isinstance(name, str) else None


def try_runtime_tokenizer(folder: Path, question: TokenizerQuestion) -> Answers:
    """Ask the runtime about a tokenizer without its model, using a model of one operator.

    Answers are cached by the files, the question and the version of the runtime: a process that reads a
    vocabulary of 262,144 tokens takes seconds, and a model is built for several targets.

    Args:
        folder: The tokenizer's files; the model is in a folder inside until this function returns.

    Raises:
        ParityError: As for `ask_runtime`.
    """
    cache = StageCache(default_cache_folder() / "tokenizers", _CACHE_BYTES)
    own = [Path(__file__), Path(str(tokenizer_worker.__file__))]
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    facts = {
        "files": {file.name: digest_file(file).sha256 for file in (*files, *own)},
        "question": asdict(question),
        "tools": tool_versions(),
    }
    key = content_key("runtime tokenizer", facts)
    cached = cache.get(key)
    if cached is not None:
        return Answers.read(question, json.loads(cached))
    with TemporaryDirectory(dir=folder) as inside:
        _write_minimal_model(Path(inside), folder)
        data = tokenizer_worker.ask_runtime(Path(inside), question)
    cache.put(key, json.dumps(data).encode())
    return Answers.read(question, data)


def open_runtime_tokenizer(folder: Path) -> Any:
    """Open the `onnxruntime_genai.Tokenizer` of an artifact's files, without loading the artifact's graph.

    Raises:
        ResourceError: onnxruntime-genai is not installed.
        ParityError: It cannot read the tokenizer.
    """
    og = load_genai()
    with TemporaryDirectory() as apart:
        _write_minimal_model(Path(apart), folder)
        try:
            return og.Tokenizer(og.Model(apart))
        except RuntimeError as error:  # the only type that the bindings raise
            raise ParityError(
                f"onnxruntime-genai {og.__version__} cannot read the tokenizer of {folder}: {error}"
            ) from error


def _write_minimal_model(folder: Path, tokenizer: Path) -> None:
    """Write a decoder of one token and one layer, and a genai_config.json with another folder's tokenizer.

    Args:
        tokenizer: Folder of the tokenizer's files, relative to which the runtime finds them from `folder`.
    """
    import numpy as np
    import onnx_ir as ir

    def value(name: str, kind: ir.DataType, *shape: int | str) -> ir.Value:
        return ir.val(name, kind, shape)

    def node(operator: str, inputs: list[ir.Value], output: ir.Value, **attributes: int) -> ir.Node:
        return ir.node(operator, inputs, attributes, outputs=[output])

    floats, integers = ir.DataType.FLOAT, ir.DataType.INT64
    ids = value("input_ids", integers, "batch", "sequence")
    mask = value("attention_mask", integers, "batch", "total")
    past = [value(f"past_key_values.0.{part}", floats, "batch", 1, "past", 1) for part in ("key", "value")]
    present = [value(f"present.0.{part}", floats, "batch", 1, "past", 1) for part in ("key", "value")]
    cast, logits = value("cast", floats, "batch", "sequence"), value("logits", floats, "batch", "sequence", 1)
    axis = ir.Value(name="axis", const_value=ir.tensor(np.array([2], np.int64), name="axis"))
    nodes = [
        node("Cast", [ids], cast, to=ir.DataType.FLOAT.value),
        node("Unsqueeze", [cast, axis], logits),
        *(node("Identity", [old], new) for old, new in zip(past, present, strict=True)),
    ]
    graph = ir.Graph(
        [ids, mask, *past],
        [logits, *present],
        nodes=nodes,
        initializers=[axis],
        opset_imports={STANDARD: OPSET},
        name="tokenizer",
    )
    ir.save(ir.Model(graph, ir_version=10), folder / MODEL)
    decoder = {
        "session_options": {"provider_options": []},
        "filename": MODEL,
        "head_size": 1,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "inputs": {
            "input_ids": ids.name,
            "attention_mask": mask.name,
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": logits.name,
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": "decoder",
        "vocab_size": 1,
        "context_length": 8,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tokenizer_dir": os.path.relpath(tokenizer.resolve(), folder.resolve()),
        "decoder": decoder,
    }
    config = {"model": model, "search": {"max_length": 8}}
    (folder / GENAI_CONFIG).write_text(json.dumps(config), encoding="utf-8")
