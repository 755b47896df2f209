"""Compilers found and missing, libraries cached, failures with the compiler's own words."""

import stat
from pathlib import Path

import pytest

from llmc.backends.compiled import toolchain
from llmc.backends.compiled.toolchain import TranslationUnit, compile_library, find_compiler
from llmc.errors import ExitCode, ResourceError

SOURCES = {
    "a.cpp": '#include "b.h"\nextern "C" int answer() { return ANSWER; }\n',
    "b.h": "#define ANSWER 42\n",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))


def test_no_compiler_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLMC_CXX", raising=False)
    with pytest.raises(
        ResourceError, match=r"need a C\+\+ compiler, but neither ziglang nor c\+\+, g\+\+"
    ) as caught:
        find_compiler()
    assert caught.value.exit_code is ExitCode.RESOURCES
    assert "pip install 'llmc[compile]'" in str(caught.value.hint)


def test_a_stated_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CXX", "/nowhere/c++ -x")
    with pytest.raises(ResourceError, match=r"/nowhere/c\+\+ cannot be started: No such file"):
        find_compiler()


def test_a_stated_compiler_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CXX", "sh -c 'exit 1'")
    with pytest.raises(ResourceError, match="compiler sh -c 'exit 1' does not report its version: no output"):
        find_compiler()


def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stated compiler is the system's, behind a script that notes each call."""
    import ctypes

    monkeypatch.delenv("LLMC_CXX", raising=False)
    real, log = find_compiler(), tmp_path / "calls"
    script = tmp_path / "cxx"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {" ".join(real.command)} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("LLMC_CXX", str(script))
    compiler = find_compiler()
    units, flags = (TranslationUnit("a.cpp", ("-O1",)),), ("-fPIC",)
    library = compile_library(compiler, SOURCES, units, flags)
    (tmp_path / "a.so").write_bytes(library)
    assert ctypes.CDLL(str(tmp_path / "a.so")).answer() == 42
    calls = len(log.read_text().splitlines())
    assert compile_library(compiler, SOURCES, units, flags) == library
    assert len(log.read_text().splitlines()) == calls
    changed = {**SOURCES, "b.h": "#define ANSWER 43\n"}
    assert compile_library(compiler, changed, units, flags) != library
    assert len(log.read_text().splitlines()) > calls


def test_a_failure_has_the_compilers_words_and_the_command() -> None:
    with pytest.raises(
        ResourceError, match=r"failed with code 1: .* -c a\.cpp -o a\.cpp\.o(.|\n)*ANSWER"
    ) as caught:
        compile_library(
            find_compiler(), {"a.cpp": SOURCES["a.cpp"], "b.h": ""}, (TranslationUnit("a.cpp"),), ()
        )
    assert caught.value.exit_code is ExitCode.RESOURCES
