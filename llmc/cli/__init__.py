"""The command line: options, messages and exit codes. Every command calls one function of llmc."""

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import typer

from llmc.cli.app import app
from llmc.cli.signals import Stopped, catch_signals
from llmc.cli.streams import guard_streams
from llmc.errors import ExitCode, LlmcError
from llmc.progress import printable
from llmc.scratch import own_scratch

# Exit code of an unexpected exception, the same as Python's own.
_INTERNAL = 1
# Number of new objects that starts the garbage collector.
_OBJECTS = 3_000_000


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `llmc` with these arguments, by default the arguments of the process, and exit.

    Only this function turns errors into messages on stderr and an exit code.
    """
    state: dict[str, object] = {}
    # Importing and tracing create millions of long-lived objects; repeated garbage collection over them takes
    # a fifth of a build.
    gc.set_threshold(_OBJECTS)
    with catch_signals() as stopped:
        code = _run(arguments, state, stopped)
    raise SystemExit(code)


def _run(arguments: Sequence[str] | None, state: dict[str, object], stopped: Stopped) -> int:
    """Run a command and report the error that ended it."""
    try:
        code = app(
            args=list(arguments) if arguments is not None else None,
            prog_name="llmc",
            standalone_mode=False,
            obj=state,
        )
        if code == ExitCode.INTERRUPTED:  # typer's answer to KeyboardInterrupt
            return _say(stopped.words, None, stopped.exit_code)
    except LlmcError as error:
        if state.get("debug"):
            traceback.print_exc()
        return _say(error.fact, error.hint, error.exit_code)
    except typer.TyperException as error:
        return _say(error.format_message(), "llmc --help, llmc COMMAND --help", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _say(stopped.words, None, stopped.exit_code)
    except Exception as error:  # noqa: BLE001 - the last place that can report it
        if state.get("debug"):
            traceback.print_exc()
        if isinstance(error, MemoryError):
            return _say("out of memory", "close other programs, or use a larger machine", ExitCode.RESOURCES)
        return _say(
            f"internal error: {type(error).__name__}: {error}",
            "run again as `llmc --debug …` for a traceback, and report it",
            _INTERNAL,
        )
    return int(code or 0)


def program() -> NoReturn:
    """Run `main` and end the process at once, without destroying the objects of torch and transformers.

    Functions registered to run at exit are called, and output is flushed, as at any other exit.
    """
    guard_streams()
    own_scratch(_tidy)
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except LlmcError as error:
        code = code or int(error.exit_code)
    sys.stderr.flush()
    os._exit(code)


def _tidy(output: Path) -> None:
    from llmc.pipeline.steps.tidy import tidy_output

    tidy_output(output)


def _say(fact: str, hint: str | None, code: int) -> int:
    # A failure to print is either the error reported here, or is reported at the end.
    with suppress(LlmcError):
        sys.stdout.flush()
    red, cyan, plain = ("\033[31m", "\033[36m", "\033[0m") if _coloured() else ("", "", "")
    print(f"{red}error:{plain} {printable(fact)}", file=sys.stderr)
    if hint is not None:
        print(f"{cyan}hint:{plain} {printable(hint)}", file=sys.stderr)
    return int(code)


def _coloured() -> bool:
    """Return whether to use colours: only on a terminal, and as https://no-color.org asks."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")
