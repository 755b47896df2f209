"""Command lines: a parser that prints a program's docstring, and the options that several programs have."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from common.sources import NAMES


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help has the lines of `description` as they are."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_cache(parser: argparse.ArgumentParser) -> None:
    """The folder that checkpoints and artifacts are kept in."""
    parser.add_argument("--cache", type=Path, default=Path("artifacts/benchmarks"))


def add_checkpoint(
    parser: argparse.ArgumentParser, default: str = "demo", names: Sequence[str] = NAMES
) -> None:
    """One of the checkpoints, and the folder that it is kept in."""
    parser.add_argument("--checkpoint", choices=names, default=default)
    add_cache(parser)


def add_timing(parser: argparse.ArgumentParser, steps: int = 48, rounds: int = 7) -> None:
    """How often what is timed, and on how many threads."""
    parser.add_argument("--steps", type=int, default=steps, help="timed tokens after each prompt")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
