"""What is read of vLLM's answer about ranks; a script of the tests' own answers in its place."""

from pathlib import Path

import pytest

from llmc.artifact.ranks import RankLayout
from llmc.errors import ResourceError, UnsupportedError
from llmc.servers.layout import ask_vllm

LAYOUT = '{"names": "vllm 99.0", "tensors": {}, "ranks": [{}, {}]}'


def environment(folder: Path, script: str) -> Path:
    """An environment whose Python states a version, and else runs a script; $6 is the file of the answer."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\ncase "$2" in -c) echo 99.0; exit 0;; esac\n{script}\n')
    python.chmod(0o755)
    return folder


def test_an_answer_is_a_layout(tmp_path: Path) -> None:
    where = environment(tmp_path / "env", f"echo '{LAYOUT}' > \"$6\"")
    assert ask_vllm(tmp_path, 2, where) == RankLayout(names="vllm 99.0", tensors={}, ranks=({}, {}))


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ("echo w is computed by mul >&2; exit 3", UnsupportedError, "w is computed by mul"),
        ("echo OSError: no config >&2; exit 1", ResourceError, "over 2 ranks: OSError: no config"),
        ("kill -9 $$", ResourceError, "without a message"),
        ('echo "{" > "$6"', ResourceError, "cannot be read"),
        ("exit 0", ResourceError, "cannot be read"),
        ("exec sleep 60", ResourceError, "within 1 s"),
    ],
)
def test_a_server_that_gives_no_layout_is_an_error(
    tmp_path: Path, script: str, kind: type[Exception], words: str
) -> None:
    where = environment(tmp_path / "env", script)
    with pytest.raises(kind, match=words):
        ask_vllm(tmp_path, 2, where, seconds=1)
