"""Clean up what killed commands left beside their outputs."""

from pathlib import Path

from llmc.artifact.store.workplace import tidy


def tidy_output(output: Path) -> None:
    """Finish or undo the leftovers of a killed process at an output, unless another process works on it."""
    tidy(output)
