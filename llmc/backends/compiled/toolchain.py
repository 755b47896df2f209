"""Compile C++ sources to a shared library, with a cache of earlier results.

LLMC_CXX names a compiler; otherwise `ziglang` (a complete clang in a wheel) is used if it is installed, else
the system's `c++`, `g++` or `clang++`, or for another architecture than this machine's the cross compiler
that Debian and Fedora call `aarch64-linux-gnu-g++`.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from llmc.artifact.store.cache import StageCache, content_key, default_cache_folder, user_cache_folder
from llmc.artifact.store.substitute import usable_folder
from llmc.children import run_apart
from llmc.errors import ResourceError

_NAMES = ("c++", "g++", "clang++")
_SECONDS = 600.0
_LINK = ("-shared", "-s")
_HINT = "pip install 'llmc[compile]' or install g++ or clang++; LLMC_CXX names another compiler"
#: Newest version of glibc that cross-compiled libraries may require: the version of ONNX Runtime's wheels.
_GLIBC = "2.28"


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Args:
        command: Command that starts it; arguments in GCC's syntax follow.
        version: First line of its output for --version.
    """

    command: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class TranslationUnit:
    """A source file and its own compiler flags."""

    name: str
    flags: tuple[str, ...] = ()


def find_compiler(machine: str | None = None) -> Compiler:
    """Find the compiler for builds.

    Args:
        machine: Architecture to compile for, as `platform.machine` names it on Linux; None for this one.

    Raises:
        ResourceError: There is none, or LLMC_CXX names one that does not run or compiles for another CPU.
    """
    cross = machine is not None and machine != host_machine()
    stated = os.environ.get("LLMC_CXX")
    if stated:
        compiler = _identify(tuple(shlex.split(stated)))
        if machine is not None:
            _require_target(compiler, machine)
        return compiler
    if find_spec("ziglang") is not None:
        target = ("-target", f"{machine}-linux-gnu.{_GLIBC}") if cross else ()
        return _identify((sys.executable, "-P", "-m", "ziglang", "c++", *target))
    names = (f"{machine}-linux-gnu-g++",) if cross else _NAMES
    for name in names:
        if (path := shutil.which(name)) is not None:
            return _identify((path,))
    which = f"a C++ compiler for {machine}" if cross else "a C++ compiler"
    hint = f"pip install 'llmc[compile]' or install {names[0]}; LLMC_CXX names another compiler"
    raise ResourceError(
        f"compiled kernels need {which}, but neither ziglang nor {', '.join(names)} is installed",
        hint=hint if cross else _HINT,
    )


def host_machine() -> str:
    """Return this machine's architecture, by its name in Linux."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def compile_library(
    compiler: Compiler, sources: Mapping[str, str], units: Sequence[TranslationUnit], flags: Sequence[str]
) -> bytes:
    """Compile and link a shared library.

    Args:
        sources: Text by file name, headers included.
        units: The sources to compile, with their own flags.
        flags: Flags of every call.

    Raises:
        ResourceError: The compiler fails; the error has its output and the command.
    """
    facts = {
        "compiler": compiler.version,
        "command": [Path(compiler.command[0]).name, *compiler.command[1:]],
        "sources": dict(sources),
        "units": [[unit.name, *unit.flags] for unit in units],
        "flags": [*flags, *_LINK],
    }
    cache = StageCache(default_cache_folder() / "libraries")
    key = content_key("library", facts)
    cached = cache.get(key)
    if cached is not None:
        return cached
    with tempfile.TemporaryDirectory(prefix="llmc-compile-") as name:
        folder = Path(name)
        for file, text in sources.items():
            (folder / file).write_text(text, encoding="utf-8")
        objects = []
        for unit in units:
            objects.append(f"{unit.name}.o")
            _call(compiler, [*flags, *unit.flags, "-c", unit.name, "-o", objects[-1]], folder)
        _call(compiler, [*flags, *_LINK, *objects, "-o", "library"], folder)
        library = (folder / "library").read_bytes()
    cache.put(key, library)
    return library


def _identify(command: tuple[str, ...]) -> Compiler:
    try:
        answer = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except OSError as error:
        raise ResourceError(
            f"the C++ compiler {command[0]} cannot be started: {error.strerror}", hint=_HINT
        ) from error
    if answer.returncode != 0 or not answer.stdout:
        lines = (answer.stderr or answer.stdout).strip().splitlines()
        raise ResourceError(
            f"the C++ compiler {shlex.join(command)} does not report its version: "
            f"{lines[0] if lines else 'no output'}",
            hint=_HINT,
        )
    return Compiler(command, answer.stdout.splitlines()[0].strip())


def _require_target(compiler: Compiler, machine: str) -> None:
    """Require that a compiler's `-dumpmachine`, which starts with its target architecture, is `machine`."""
    command = [*compiler.command, "-dumpmachine"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    target = answer.stdout.strip()
    if target.partition("-")[0] != machine:
        raise ResourceError(
            f"the C++ compiler {shlex.join(compiler.command)} compiles for {target or 'an unnamed target'}, "
            f"but the profile's CPU is {machine}",
            hint=f"set LLMC_CXX to a compiler for {machine}, or unset it",
        )


def _environment(compiler: Compiler, folder: Path) -> dict[str, str]:
    """Return the process's own variables with temporary files in `folder`, and a writable cache for zig."""
    changed = {"TMPDIR": str(folder)}
    if "ziglang" in compiler.command and "ZIG_GLOBAL_CACHE_DIR" not in os.environ:
        changed["ZIG_GLOBAL_CACHE_DIR"] = str(usable_folder(user_cache_folder() / "zig", own=False))
    return {**os.environ, **changed}


def _call(compiler: Compiler, arguments: Sequence[str], folder: Path) -> None:
    command = [*compiler.command, *arguments]
    try:
        answer = run_apart(command, folder, _SECONDS, _environment(compiler, folder))
    except subprocess.TimeoutExpired as error:
        raise ResourceError(f"{shlex.join(command)} did not end within {_SECONDS:.0f} s") from error
    if answer.returncode != 0:
        raise ResourceError(
            f"{compiler.version} failed with code {answer.returncode}: {shlex.join(command)}\n"
            f"{answer.stderr.strip()}",
            hint="LLMC_CXX names another compiler; cpu-int4 needs none",
        )
