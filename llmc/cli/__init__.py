"""The command line: words, colours and exit codes; every command calls one function of llmc."""

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

# An exception that is nobody's intention: the code that Python itself would exit with.
_INTERNAL = 1
# New objects before the collector looks at them.
_OBJECTS = 3_000_000


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `llmc` with these arguments, by default those of the process, and exit.

    The one place where errors become words on stderr and an exit code.
    """
    state: dict[str, object] = {}
    # Importing and tracing make millions of objects that stay: looking through them again and again takes a
    # fifth of a build.
    gc.set_threshold(_OBJECTS)
    with catch_signals() as stopped:
        code = _run(arguments, state, stopped)
    raise SystemExit(code)


def _run(arguments: Sequence[str] | None, state: dict[str, object], stopped: Stopped) -> int:
    """Run a command, and say what ended it."""
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
    except Exception as error:  # noqa: BLE001 - the last place that can turn it into words
        if state.get("debug"):
            traceback.print_exc()
        if isinstance(error, MemoryError):
            return _say(
                "no memory is left", "end other programs, or use a larger machine", ExitCode.RESOURCES
            )
        return _say(
            f"internal error: {type(error).__name__}: {error}",
            "run again as `llmc --debug …` for the traceback, and report it",
            _INTERNAL,
        )
    return int(code or 0)


def program() -> NoReturn:
    """`main`, and out at once: taking torch and transformers apart, object by object, is work for nobody.

    What is registered to run at exit runs, and output is flushed, as at any other end.
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
    from llmc.pipeline.leftovers import tidy_output

    tidy_output(output)


def _say(fact: str, hint: str | None, code: int) -> int:
    # What cannot be printed has been said by the error that is told here, or is told at the end.
    with suppress(LlmcError):
        sys.stdout.flush()
    red, cyan, plain = ("\033[31m", "\033[36m", "\033[0m") if _coloured() else ("", "", "")
    print(f"{red}error:{plain} {printable(fact)}", file=sys.stderr)
    if hint is not None:
        print(f"{cyan}hint:{plain} {printable(hint)}", file=sys.stderr)
    return int(code)


def _coloured() -> bool:
    """By https://no-color.org, and only on a terminal."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")
