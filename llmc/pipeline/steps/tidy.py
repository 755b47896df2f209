"""What killed commands left beside their outputs."""

from pathlib import Path

from llmc.artifact.store.workplace import tidy


def tidy_output(output: Path) -> None:
    """Finish or undo what a killed process left of an output, unless another one is at work on it."""
    tidy(output)
