"""The tokenizer gate sees vocabularies, decoders, special tokens and templates of another tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmc.artifact.store.codec import TextCodec
from llmc.artifact.text import TextRecord
from llmc.config import Metric
from llmc.data import eval_text, prompts
from llmc.validate.tokens import measure_tokens
from tests.models import save_tiny_tokenizer
from tests.texts import edit, replace_tokenizer


def _measure(folder: Path, original: Any, *, chat: bool = False) -> dict[Metric, float | None]:
    codec = TextCodec(folder, TextRecord(chat=chat))
    found = measure_tokens(folder, codec, None, original, eval_text(), prompts(), "transformers")
    return {m.metric: m.value for m in found}


def _drop_e(data: Any) -> None:
    replace = {"type": "Replace", "pattern": {"String": "e"}, "content": ""}
    data["decoder"] = {"type": "Sequence", "decoders": [data["decoder"], replace]}


def _no_decoder(data: Any) -> None:
    data["decoder"] = None


def _ordinary_end(data: Any) -> None:
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "</s>"]
    data["model"]["vocab"]["<end>"] = data["model"]["vocab"].pop("</s>")


def _rare_character(data: Any) -> None:
    vocabulary = data["model"]["vocab"]
    vocabulary["\u0100"], vocabulary["\u0101"] = vocabulary["\u0101"], vocabulary["\u0100"]


@pytest.mark.parametrize("change", [_drop_e, _no_decoder, _ordinary_end, _rare_character])
def test_a_changed_tokenizer_is_seen(change: Callable[[Any], None], tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    replace_tokenizer(tmp_path, "nfc")
    original = AutoTokenizer.from_pretrained(tmp_path)
    assert _measure(tmp_path, original)[Metric.TOKENIZER_EQUAL] == 1
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    change(data)
    file.write_text(json.dumps(data), encoding="utf-8")
    value = _measure(tmp_path, original)[Metric.TOKENIZER_EQUAL]
    assert value is not None
    assert value < 1


def test_a_template_that_llmc_run_would_leave_out_is_seen(tmp_path: Path) -> None:
    original = AutoTokenizer.from_pretrained(save_tiny_tokenizer(tmp_path))
    assert _measure(tmp_path, original, chat=True)[Metric.CHAT_EQUAL] == 1
    assert _measure(tmp_path, original, chat=False)[Metric.CHAT_EQUAL] == 0


def test_another_template_is_seen(tmp_path: Path) -> None:
    original = AutoTokenizer.from_pretrained(save_tiny_tokenizer(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert _measure(tmp_path, original, chat=True)[Metric.CHAT_EQUAL] != 1


def test_a_template_of_a_model_without_one_is_seen(tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    original = AutoTokenizer.from_pretrained(tmp_path)
    assert _measure(tmp_path, original)[Metric.CHAT_EQUAL] is None
    edit(tmp_path / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    assert _measure(tmp_path, original)[Metric.CHAT_EQUAL] == 0
