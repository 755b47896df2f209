"""Ask a server about a checkpoint: its worker is started, answers one request, and ends.

`llmc.servers.worker` describes the protocol. A worker is not trusted: what it says is checked for its form
and its sizes, and NaN is left for the gate to judge.
"""

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from pydantic import ValidationError

from llmc.arrays import Array
from llmc.errors import LlmcError, ParityError, ResourceError, UnsupportedError
from llmc.records import Record
from llmc.servers.answer import Answer, Product, Request
from llmc.servers.environment import Server, clean_variables

#: Called with how much is done and the total.
Advance = Callable[[int, int], None]
#: Seconds for a request: starting, loading, and answering. To import vLLM from a cold disk takes a minute.
SECONDS = 1800.0
_END_SECONDS = 10.0
_LINE_BYTES = 64 << 20
_LAST_LINES = 6


class _Version(Record):
    version: str
    where: str


class _Loaded(Record):
    taken: int
    skipped: tuple[str, ...]
    unfilled: tuple[str, ...]
    dtype: str


class _Progress(Record):
    done: int
    total: int


class _Product(Record):
    modules: tuple[str, ...]
    inputs: str
    outputs: str


class _Answer(Record):
    token_ids: tuple[tuple[int, ...], ...] | None
    logits: tuple[str, ...] | None
    log_probabilities: tuple[str, ...] | None
    greedy: tuple[tuple[int, ...], ...] | None
    products: tuple[_Product, ...] | None = None
    graph: str | None
    cache_scales: dict[str, tuple[float, float]] | None = None


class _Failure(Record):
    phase: str
    kind: str
    message: str


_EVENTS: dict[str, type[Record]] = {
    "version": _Version,
    "loaded": _Loaded,
    "progress": _Progress,
    "answer": _Answer,
    "failure": _Failure,
}


@dataclass
class _Heard:
    """The events of a worker so far."""

    version: _Version | None = None
    loaded: _Loaded | None = None
    answer: _Answer | None = None
    failure: _Failure | None = None


def ask(
    server: Server,
    folder: Path,
    request: Request,
    scratch: Path,
    *,
    seconds: float = SECONDS,
    advance: Advance | None = None,
) -> Answer:
    """Start the worker of a server on a checkpoint, and return what it did.

    Args:
        folder: The checkpoint.
        scratch: An empty folder for arrays and an exported graph.
        seconds: The most that everything may take.
        advance: Called with the progress of answering.

    Raises:
        ResourceError: The worker cannot be started, or did not answer in time.
        UnsupportedError: The server cannot load the checkpoint, by its own words.
        ParityError: It failed while it answered, died, or its answer has not the form that was asked for.
    """
    heard = _Heard()
    with _started(server, scratch) as (process, errors):
        deadline = time.monotonic() + seconds
        _send(process, _as_json(folder, request, scratch))
        for line in _lines(process, deadline, server, seconds):
            _hear(heard, line, server, advance)
            if heard.failure is not None:
                raise _failed(server, heard.failure)
            if heard.answer is not None:  # how a server ends is its own affair
                break
        _require_end(process, heard, server, errors, deadline)
    return _read(server, request, heard, scratch)


def _as_json(folder: Path, request: Request, scratch: Path) -> str:
    return json.dumps(
        {
            "folder": str(folder.resolve()),
            "scratch": str(scratch.resolve()),
            "sequences": [list(ids) for ids in request.sequences],
            "prompts": list(request.prompts),
            "continue": [list(ids) for ids in request.continued],
            "new_tokens": request.new_tokens,
            "dtype": request.dtype,
            "threads": request.threads,
            "gpu_only": request.gpu_only,
        }
    )


@contextmanager
def _started(server: Server, scratch: Path) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Start a worker, and end it and its children however this context ends."""
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                server.command,
                cwd=scratch,
                env=clean_variables({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            hint = f"llmc servers install {server.name}"
            raise ResourceError(
                f"{server.name} cannot be started: {error.strerror}: {server.command[0]}", hint=hint
            ) from error
        try:
            yield process, errors
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the process group to end, and kill what is left of it."""
    for signum, patience in ((signal.SIGTERM, _END_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is not None and signum == signal.SIGTERM:
            continue
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()


def _send(process: subprocess.Popen[bytes], line: str) -> None:
    if process.stdin is not None:
        with suppress(BrokenPipeError):  # the worker has died, which is told when its output ends
            process.stdin.write(line.encode() + b"\n")
            process.stdin.close()


def _lines(
    process: subprocess.Popen[bytes], deadline: float, server: Server, seconds: float
) -> Iterator[bytes]:
    """Yield the lines that a worker writes until it closes its output.

    Raises:
        ResourceError: It did not close it in time.
        ParityError: A line has no end.
    """
    stream, rest = process.stdout, b""
    if stream is None:
        return
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                raise ResourceError(
                    f"{server.name} {server.version} gave no answer within {seconds:.0f} s",
                    hint="--server-seconds gives it more time",
                )
            data = os.read(stream.fileno(), 1 << 16)
            if not data:
                break
            *complete, rest = (rest + data).split(b"\n")
            if len(rest) > _LINE_BYTES:
                raise ParityError(f"the worker of {server.name} writes a line without an end")
            yield from complete
    if rest:
        yield rest


def _hear(heard: _Heard, line: bytes, server: Server, advance: Advance | None) -> None:
    try:
        values = json.loads(line)
        name = values.pop("event")
        event = _EVENTS[name].model_validate(values)
    except (ValueError, KeyError, AttributeError, TypeError, ValidationError) as error:
        raise ParityError(
            f"the worker of {server.name} does not speak the protocol: {line[:80]!r}"
        ) from error
    if isinstance(event, _Progress):
        if advance is not None:
            advance(event.done, event.total)
    else:
        setattr(heard, name, event)


def _failed(server: Server, failure: _Failure) -> LlmcError:
    lines = [line.strip() for line in failure.message.splitlines() if line.strip()]
    words = f"{failure.kind}: {' '.join(lines[:3])}" if lines else failure.kind
    if failure.phase == "start":
        return ResourceError(
            f"{server.name} {server.version} does not start: {words}",
            hint=f"llmc servers install {server.name}",
        )
    if failure.phase == "load":
        return UnsupportedError(f"{server.name} {server.version} cannot load the checkpoint: {words}")
    return ParityError(f"{server.name} {server.version} failed while it answered: {words}")


def _require_end(
    process: subprocess.Popen[bytes], heard: _Heard, server: Server, errors: IO[bytes], deadline: float
) -> None:
    """Require that a worker that closed its output had answered.

    Raises:
        ParityError: It had not; the error has the last lines of its standard error.
    """
    if heard.answer is not None:
        return
    code: Any = "no exit code"
    with suppress(subprocess.TimeoutExpired):
        code = process.wait(max(0.1, min(_END_SECONDS, deadline - time.monotonic())))
    how = f"signal {-code}" if isinstance(code, int) and code < 0 else f"exit code {code}"
    while_ = "answering" if heard.loaded else "loading the checkpoint" if heard.version else "starting"
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - (1 << 14)))
    last = errors.read().decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
    hint = "exit by signal 9 often means that memory ran out" if code == -signal.SIGKILL else None
    raise ParityError(
        f"{server.name} {server.version} ended with {how} while {while_}: "
        f"{' / '.join(line.strip() for line in last) or 'without a message'}",
        hint=hint,
    )


def _read(server: Server, request: Request, heard: _Heard, scratch: Path) -> Answer:
    """Read the arrays of an answer, and check its form against the request.

    Raises:
        ParityError: It does not fit.
    """
    version, loaded, answer = heard.version, heard.loaded, heard.answer
    if version is None or loaded is None or answer is None:
        raise ParityError(f"the worker of {server.name} answered without loading the checkpoint")

    def require(what: str, given: Sequence[Any] | None, asked: Sequence[Any]) -> None:
        if given is not None and len(given) != len(asked):
            raise ParityError(f"{server.name} gave {len(given)} {what} for {len(asked)}")

    require("encoded prompts", answer.token_ids, request.prompts)
    require("texts", answer.greedy, request.continued)
    require("logits", answer.logits, request.sequences)
    require("log-probabilities", answer.log_probabilities, request.sequences)

    def arrays(names: Sequence[str] | None, axes: int) -> tuple[Array, ...] | None:
        pairs = zip(names or (), request.sequences, strict=False)
        read = tuple(_array(server, scratch, name, len(ids) - 1, axes) for name, ids in pairs)
        return None if names is None else read

    logits = arrays(answer.logits, 2)
    for text in answer.greedy or ():
        if len(text) > request.new_tokens or any(token < 0 for token in text):
            raise ParityError(f"{server.name} gave tokens {list(text[:8])} for {request.new_tokens} new ones")
        if logits and max(text, default=0) >= logits[0].shape[1]:
            raise ParityError(f"{server.name} gave token {max(text)} of {logits[0].shape[1]}")
    return Answer(
        server=server.name,
        version=version.version,
        where=version.where,
        dtype=loaded.dtype,
        taken=loaded.taken,
        skipped=loaded.skipped,
        unfilled=loaded.unfilled,
        token_ids=answer.token_ids,
        logits=logits,
        log_probabilities=arrays(answer.log_probabilities, 1),
        greedy=answer.greedy,
        products=_products(server, scratch, answer.products),
        graph=None if answer.graph is None else _graph(server, scratch, answer.graph),
        cache_scales=answer.cache_scales,
    )


def _graph(server: Server, scratch: Path, name: str) -> Path:
    path = (scratch / name).resolve()
    if not path.is_relative_to(scratch.resolve()) or not path.is_file():
        raise ParityError(f"{server.name} exported no graph {name}")
    return path


def _products(server: Server, scratch: Path, given: Sequence[_Product] | None) -> tuple[Product, ...] | None:
    if given is None:
        return None
    found = []
    for each in given:
        inputs, outputs = (_array(server, scratch, name, None, 2) for name in (each.inputs, each.outputs))
        if len(inputs) != len(outputs) or not len(inputs):
            raise ParityError(
                f"{server.name} gave {len(outputs)} rows of outputs for {len(inputs)} of inputs"
            )
        found.append(Product(each.modules, inputs, outputs))
    return tuple(found)


def _array(server: Server, scratch: Path, name: str, rows: int | None, axes: int) -> Array:
    try:
        array = np.load(scratch / Path(name).name, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ParityError(f"{server.name} gave no array {name}: {error}") from error
    if array.ndim != axes or rows not in (None, len(array)) or array.dtype != np.float32:
        expected = f"{axes} axes" if rows is None else f"{rows} positions"
        raise ParityError(
            f"{server.name} gave {name} with shape {array.shape} and type {array.dtype} for {expected}"
        )
    return np.asarray(array)
