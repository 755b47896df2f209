"""Try in a child process what CUDA artifacts need, so that a crash in a library is one more answer.

The child writes a `Step` as a line of JSON after each trial. If it dies, the next trial killed it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from llmc.children import die_with_parent
from llmc.errors import LlmcError, ResourceError, first_lines
from llmc.gpu import gpus
from llmc.records import Record
from llmc.runtime.failures import failed_call
from llmc.runtime.libraries import MissingLibraryError, library_names, load_library_of
from llmc.runtime.product import PRODUCT_BOUND, product_error

SESSION, GENERATOR = "onnxruntime on cuda", "onnxruntime-genai on cuda"
_SECONDS = 120.0


class Step(Record):
    """One thing that was tried.

    Args:
        name: File name of a library, `SESSION` or `GENERATOR`.
        fault: What is wrong; None if nothing is.
        hint: What can be done about it.
        missing: Whether it is a library that was found nowhere.
    """

    name: str
    fault: str | None = None
    hint: str | None = None
    missing: bool = False


def try_cuda() -> tuple[Step, ...]:
    """Load the CUDA libraries, compute on a visible GPU, and load onnxruntime-genai's library for CUDA.

    Returns:
        The steps in their order, up to one that ended the process; `SESSION` only where a GPU is visible.
    """
    command = [sys.executable, "-P", "-c", f"from {__name__} import main; main()"]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired as error:
        steps = _parse(str(error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""))
        name = _after(steps)
        return *steps, Step(name=name, fault=f"{name} does not load within {_SECONDS:.0f} s")
    steps = _parse(done.stdout)
    if done.returncode == 0:
        return steps
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    name = _after(steps)
    return *steps, Step(name=name, fault=f"{name} ends its process with {done.returncode}: {last[0]}")


def _parse(output: str) -> tuple[Step, ...]:
    return tuple(Step.model_validate_json(line) for line in output.splitlines() if line)


def _after(steps: tuple[Step, ...]) -> str:
    """Return the name of the step that comes after those."""
    names = [name for name, _ in _trials()]
    return names[min(len(steps), len(names) - 1)]


def main() -> None:
    """Run the child process."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # so that libraries print nothing among the answers
    for name, trial in _trials():
        answers.write(_try(name, trial).model_dump_json() + "\n")
        answers.flush()


def _try(name: str, trial: Callable[[], None]) -> Step:
    try:
        trial()
    except LlmcError as error:
        missing = isinstance(error, MissingLibraryError)
        return Step(name=name, fault=error.fact, hint=error.hint, missing=missing)
    except Exception as error:  # noqa: BLE001 - whatever a runtime raises is the answer
        return Step(name=name, fault=failed_call(error) or first_lines(error))
    return Step(name=name)


def _trials() -> Iterator[tuple[str, Callable[[], None]]]:
    for name, distribution in library_names():
        yield name, lambda name=name, distribution=distribution: load_library_of(name, distribution)  # type: ignore[misc]
    if _has_gpu():
        yield SESSION, compute_on_cuda
    yield GENERATOR, load_generator


def _has_gpu() -> bool:
    """Return whether a GPU is visible; the driver's own fault is a finding of its own."""
    try:
        return bool(gpus())
    except ResourceError:
        return False


def compute_on_cuda() -> None:
    """Compute on the first GPU.

    Raises:
        ResourceError: CUDA cannot be used, or the result is wrong.
    """
    error = product_error()
    if not error <= PRODUCT_BOUND:
        raise ResourceError(
            f"a product of two matrices is off by {error:.3g} on the GPU",
            hint="no figure measured on this GPU can be believed",
        )


def load_generator() -> None:
    """Load onnxruntime-genai's library for CUDA.

    Raises:
        ResourceError: It is missing, or does not load.
    """
    spec = importlib.util.find_spec("onnxruntime_genai")
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else Path()
    name = "onnxruntime-genai-cuda.dll" if sys.platform == "win32" else "libonnxruntime-genai-cuda.so"
    if not (folder / name).is_file():
        raise ResourceError(
            "the installed onnxruntime-genai has no library for CUDA",
            hint="pip uninstall -y onnxruntime-genai && pip install onnxruntime-genai-cuda",
        )
    try:
        ctypes.CDLL(str(folder / name))
    except OSError as error:
        raise ResourceError(f"{name} does not load: {error}") from error
