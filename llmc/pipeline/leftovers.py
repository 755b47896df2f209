"""What killed commands left beside their outputs."""

from pathlib import Path


def tidy_output(output: Path) -> None:
    """Finish or undo what a killed process left of an output, unless another one is at work on it."""
    from llmc.artifact.workplace import tidy

    tidy(output)
