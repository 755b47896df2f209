"""Create parsers for command lines that print a program's docstring, and the options that programs share."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from common.sources import NAMES


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Create a parser whose help shows the lines of `description` unchanged."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add the folder for checkpoints and artifacts."""
    parser.add_argument("--cache", type=Path, default=Path("artifacts/benchmarks"))


def add_checkpoint(
    parser: argparse.ArgumentParser, default: str = "demo", names: Sequence[str] = NAMES
) -> None:
    """Add the choice of a checkpoint, and the folder for it."""
    parser.add_argument("--checkpoint", choices=names, default=default)
    add_cache(parser)


def add_timing(parser: argparse.ArgumentParser, steps: int = 48, rounds: int = 7) -> None:
    """Add the number of timed steps, rounds and threads."""
    parser.add_argument("--steps", type=int, default=steps, help="timed tokens after each prompt")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
