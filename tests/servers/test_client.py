"""The client of servers: what a worker answers, and every way in which one can fail to."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llmc.errors import LlmcError, ParityError, ResourceError, UnsupportedError
from llmc.servers import client
from llmc.servers.answer import Answer, Request
from llmc.servers.client import ask
from llmc.servers.environment import Server

PROGRAM = Path(__file__).with_name("stand_in.py")
REQUEST = Request(sequences=((1, 2, 3), (7, 7)), prompts=("ab", "c"), continued=((4, 5),), new_tokens=3)


def stand_in(how: str) -> Server:
    return Server("vllm", "9.1", (sys.executable, "-P", str(PROGRAM), how))


def answer(how: str, folder: Path, seconds: float = 60.0) -> Answer:
    return ask(stand_in(how), folder, REQUEST, folder, seconds=seconds)


def test_an_answer_has_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "packages that the server must not find")
    seen: list[tuple[int, int]] = []
    found = ask(stand_in("well"), tmp_path, REQUEST, tmp_path, advance=lambda *step: seen.append(step))
    assert (found.version, found.where, found.dtype, found.taken) == ("9.1", "CPU", "bfloat16", 12)
    assert found.token_ids == ((1, 2), (3,))
    assert found.greedy == ((6, 7, 8),)
    assert found.logits is not None
    assert found.log_probabilities is not None
    assert [each.shape for each in found.logits] == [(2, 32), (1, 32)]
    assert [each.shape for each in found.log_probabilities] == [(2,), (1,)]
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("refuse", UnsupportedError, "vllm 9.1 cannot load the checkpoint: ValueError: Unknown quantization"),
        ("die", ParityError, "ended with signal 9 while loading the checkpoint: terminate called after"),
        ("die-late", ParityError, "ended with exit code 3 while answering: without a message"),
        ("fail-late", ParityError, "failed while it answered: RuntimeError: no kernel"),
        ("babble", ParityError, "does not speak the protocol: b'Loading weights: 100%'"),
        ("short", ParityError, "l0.npy with shape (1, 32) and type float32 for 2 positions"),
        ("fewer", ParityError, "gave 0 texts for 1"),
        ("broken", ResourceError, "vllm 9.1 does not start: ImportError: No module named 'vllm'"),
        ("unloaded", ParityError, "answered without loading the checkpoint"),
        ("double", ParityError, "l0.npy with shape (2, 32) and type float64 for 2 positions"),
        ("long", ParityError, "gave tokens [6, 7, 8, 9] for 3 new ones"),
        ("beyond", ParityError, "gave token 32 of 32"),
        ("prompts", ParityError, "gave 1 encoded prompts for 2"),
        ("rows", ParityError, "gave 1 rows of outputs for 2 of inputs"),
        ("outside", ParityError, "gave no array ../outside.npy: "),
    ],
)
def test_a_bad_server_is_an_error_that_quotes_it(
    how: str, kind: type[LlmcError], words: str, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    np.save(tmp_path / "outside.npy", np.zeros((2, 32), np.float32))
    with pytest.raises(kind) as caught:
        answer(how, scratch)
    assert words in str(caught.value)


def test_a_server_that_hangs_is_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ResourceError, match=r"vllm 9\.1 gave no answer within 1 s"):
        answer("silent", tmp_path, seconds=1.0)
    assert time.monotonic() - began < 9


def test_no_child_of_a_server_is_left(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="gave no answer"):
        answer("child", tmp_path, seconds=3.0)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 9
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    """Whether a process exists that is more than an exit code that nobody has read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_line_without_an_end_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_LINE_BYTES", 1024)
    with pytest.raises(ParityError, match="writes a line without an end"):
        answer("endless", tmp_path)


def test_a_server_that_does_not_end_has_answered(tmp_path: Path) -> None:
    began = time.monotonic()
    assert answer("linger", tmp_path).taken == 12
    assert time.monotonic() - began < 9


def test_what_a_server_does_not_start_with_is_told(tmp_path: Path) -> None:
    server = Server("vllm", "9.1", (str(tmp_path / "python"), "-P", str(PROGRAM), "well"))
    with pytest.raises(ResourceError, match="cannot be started: No such file") as caught:
        ask(server, tmp_path, REQUEST, tmp_path)
    assert caught.value.hint == "llmc servers install vllm"


def test_nan_is_left_to_the_gate(tmp_path: Path) -> None:
    found = answer("nan", tmp_path)
    assert found.logits is not None
    assert np.isnan(found.logits[0]).sum() == 1


def test_skipped_tensors_are_named(tmp_path: Path) -> None:
    assert answer("skip", tmp_path).skipped == ("model.layers.0.mlp.up_proj.weight",)


@pytest.mark.parametrize("name", ["nothing.onnx", "../stolen.onnx"])
def test_a_graph_lies_in_the_folder_for_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "stolen.onnx").touch()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(ParityError, match="exported no graph"):
        ask(stand_in(f"graph={name}"), tmp_path, REQUEST, scratch)
