"""Kernels under the compiler's sanitizers, in a program of their own."""

import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from llmc.backends.compiled.toolchain import find_compiler
from tests.backends.compiled.graphs import usable_sets


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_kernels_are_clean(sanitizers: str, tmp_path: Path) -> None:
    program = tmp_path / "sanitized"
    source = Path(__file__).with_name("sanitized.cpp")
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-w",
        "-pthread",
        f"-fsanitize={sanitizers}",
        "-fno-sanitize-recover=all",
    ]
    flags += usable_sets()[0].flags
    command = [
        *find_compiler().command,
        *flags,
        f"-I{files('llmc') / 'kernels'}",
        str(source),
        "-o",
        str(program),
    ]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    answer = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stderr, answer.stdout) == (0, "", "0\n")
