"""The token that begins a text stands there once, wherever a text is tokenized.

Nearly every tokenizer that people publish puts one there, and the tiny tokenizer of the other tests does not.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from llmc.artifact.store.cache import StageCache
from llmc.artifact.store.codec import TextCodec
from llmc.artifact.text import TextRecord
from llmc.checkpoint import open_checkpoint
from llmc.config import CalibrationText
from llmc.data import eval_text
from llmc.evaluation import shipped_text
from llmc.pipeline.gate.run import Run
from llmc.pipeline.steps.calibrate import prepare
from llmc.pipeline.steps.original import tokenize
from llmc.pipeline.tune.workbench import Workbench
from llmc.progress import SilentProgress
from llmc.validate.tokens import measure_tokens
from tests.caches import own_cache
from tests.texts import around, save_model

BEGIN, END = 1, 2
INTERFACE: Any = SimpleNamespace(max_length=64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose tokenizer puts one token before a text and one after it."""
    return around(save_model(tmp_path / "model"), "<s> $A </s>")


def _once(rows: Any) -> bool:
    """Whether each row begins with the token, and has it nowhere else."""
    array = np.asarray(rows)
    return bool((array[:, 0] == BEGIN).all()) and not (array[:, 1:] == BEGIN).any()


@pytest.mark.parametrize(
    ("single", "before"),
    [("$A", ()), ("<s> $A", (1,)), ("<s> $A </s>", (1,)), ("$A </s>", ()), ("<pad> <s> $A", (0, 1))],
)
def test_the_text_and_what_stands_before_it_are_apart(
    single: str, before: tuple[int, ...], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(around(save_model(tmp_path), single))
    ids, found = tokenize(tokenizer, "the quick fox")
    assert found == before
    assert tokenizer.decode(ids) == "the quick fox"
    assert not set(ids.tolist()) & {0, BEGIN, END}


def test_a_prompt_begins_as_with_transformers(folder: Path) -> None:
    original = AutoTokenizer.from_pretrained(folder)
    plain, chat = (TextCodec(folder, TextRecord(chat=chat)) for chat in (False, True))
    ids = original("the fox")["input_ids"]
    assert (ids[0], ids[-1]) == (BEGIN, END)
    assert plain.encode("the fox") == plain.encode_prompt("the fox", None) == ids
    rendered = chat.encode_prompt("the fox", lambda messages: f"<s>{messages[0]['content']}")
    assert rendered == ids[:-1]
    assert chat.encode_prompt("the fox", None) == ids


@pytest.mark.parametrize("single", ["$A </s>", "<s> <s> $A </s>"], ids=["dropped", "doubled"])
def test_the_gate_sees_another_beginning(single: str, folder: Path, tmp_path: Path) -> None:
    original = AutoTokenizer.from_pretrained(folder)
    other = around(save_model(tmp_path / "other"), single)
    for place, equal in ((folder, 1.0), (other, 0.0)):
        codec = TextCodec(place, TextRecord())
        found = measure_tokens(place, codec, None, original, eval_text()[:500], ("Name three rivers.",), "")
        assert found[0].value == equal


def test_windows_of_the_gate_begin_once(folder: Path) -> None:
    checkpoint = SimpleNamespace(
        tokenizer=lambda: AutoTokenizer.from_pretrained(folder), reference_bytes=lambda: 1000
    )
    subject: Any = SimpleNamespace(checkpoint=checkpoint, interface=INTERFACE)
    run = Run(subject, eval_text(), SilentProgress())
    assert BEGIN not in run.tokens
    assert _once(run.windows.tokens)
    assert _once(run.all_windows.tokens)


def test_windows_of_tuning_begin_once(folder: Path, tmp_path: Path) -> None:
    none: Any = None
    bench = Workbench(
        open_checkpoint(str(folder)), none, none, shipped_text(), tmp_path, StageCache(tmp_path / "c", 0), ()
    )
    bench.__dict__["reference"] = SimpleNamespace(manifest=SimpleNamespace(interface=INTERFACE))
    assert _once(bench._windows.tokens)


def test_calibration_text_begins_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    text = CalibrationText(window_tokens=32, max_windows=4)
    assert _once(prepare(open_checkpoint(str(folder)), text, "test", {}).windows)
