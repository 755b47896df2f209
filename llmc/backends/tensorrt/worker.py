"""Build an engine in a separate process.

TensorRT orders parts of an engine by the addresses of its objects. A fresh process with a fixed hash seed, a
fixed environment, no randomized addresses, newly compiled modules (a module cache would shift addresses) and
one core, so that its threads alternate in the same way, gives the same bytes each time on one installation.
The build also survives if TensorRT crashes the process or the system kills it for its memory.
The parent writes a `Job` as JSON to stdin and reads one line of JSON from stdout: an `Outcome`.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

from llmc.artifact.engine import EngineRecord
from llmc.artifact.manifest import FileDigest
from llmc.backends.tensorrt.engine import build_engine
from llmc.backends.tensorrt.support import EnginePlan, Library
from llmc.children import die_with_parent
from llmc.config import Engine
from llmc.errors import LlmcError, ResourceError, UnsupportedError
from llmc.records import Record

#: Arguments of personality(2): read the current one; no randomized addresses.
_READ_PERSONALITY, _ADDR_NO_RANDOMIZE = 0xFFFFFFFF, 0x0040000
#: Variables that a process needs to find its libraries; any other one would shift addresses.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "CUDA_VISIBLE_DEVICES")
#: How the names of variables begin by which CUDA finds and orders devices; for a build on one of them.
_DEVICES = "CUDA_"
_KINDS: dict[str, type[LlmcError]] = {kind.__name__: kind for kind in (ResourceError, UnsupportedError)}


class Job(Record):
    """The job of the child: what to build in its working directory."""

    library: Library
    sms: tuple[str, ...]
    profiles: tuple[str, ...]
    engine: Engine
    sparse: bool


class Failure(Record):
    """A typed error of the child."""

    kind: str
    fact: str
    hint: str | None


class Outcome(Record):
    """The record and digest of an engine, or why there is none."""

    record: EngineRecord | None = None
    digest: FileDigest | None = None
    failure: Failure | None = None


def build_apart(
    folder: Path, plan: EnginePlan, engine: Engine, *, sparse: bool = False
) -> tuple[EngineRecord, FileDigest]:
    """Call `build_engine` in a separate process.

    Raises:
        ResourceError: The process died, or as for `build_engine`.
        UnsupportedError: As for `build_engine`.
    """
    job = Job(library=plan.library, sms=plan.sms, profiles=plan.profiles, engine=engine, sparse=sparse)
    path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in _ENVIRONMENT or (name.startswith(_DEVICES) and plan.library is Library.TENSORRT)
    }
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-B", "-X", f"pycache_prefix={os.devnull}"),
            *("-c", f"from {__name__} import main; main()"),
        ],
        input=job.model_dump_json(),
        capture_output=True,
        cwd=folder,
        env={**environment, "PYTHONHASHSEED": "0", "PYTHONPATH": path},
        text=True,
        check=False,
    )
    if done.returncode != 0:
        (folder / plan.partial).unlink(missing_ok=True)
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ResourceError(
            f"the process that builds the engine for {', '.join(plan.sms)} ended with {done.returncode}: "
            f"{last[0]}",
            hint="exit code -9 means that the system killed it because memory ran out",
        )
    outcome = Outcome.model_validate_json(done.stdout.splitlines()[-1])
    if outcome.failure is not None:
        raise _KINDS[outcome.failure.kind](outcome.failure.fact, hint=outcome.failure.hint)
    if outcome.record is None or outcome.digest is None:
        raise ResourceError(f"the process that builds the engine for {', '.join(plan.sms)} gave no engine")
    return outcome.record, outcome.digest


def main() -> None:
    """Run the child process."""
    die_with_parent()
    _fix_addresses()
    if sys.platform == "linux":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    job = Job.model_validate_json(sys.stdin.read())
    plan = EnginePlan(job.library, job.sms, job.profiles)
    try:
        record, digest = build_engine(Path(), plan, job.engine, sparse=job.sparse)
        outcome = Outcome(record=record, digest=digest)
    except (ResourceError, UnsupportedError) as error:
        kind = next(name for name, kind in _KINDS.items() if isinstance(error, kind))
        outcome = Outcome(failure=Failure(kind=kind, fact=error.fact, hint=error.hint))
    sys.stdout.write(outcome.model_dump_json() + "\n")


def _fix_addresses() -> None:
    """Restart this process without randomized addresses, if the system allows that."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    current = libc.personality(_READ_PERSONALITY)
    if current == -1 or current & _ADDR_NO_RANDOMIZE:
        return
    if (
        libc.personality(current | _ADDR_NO_RANDOMIZE) != -1
        and libc.personality(_READ_PERSONALITY) != current
    ):
        os.execv(sys.executable, sys.orig_argv)
