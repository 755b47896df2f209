"""Text that ships with the package, all of it written for llmc: for evaluation, calibration, and prompts."""

from importlib.resources import files


def eval_text() -> str:
    """English prose, dialogue, lists and a little code, for perplexity and KL divergence."""
    return files(__name__).joinpath("eval.txt").read_text(encoding="utf-8")


def calibration_text() -> str:
    """English prose, instructions, dialogue, tables and code; no part of the evaluation text."""
    return files(__name__).joinpath("calibration.txt").read_text(encoding="utf-8")


def prompts() -> tuple[str, ...]:
    """Short prompts for greedy generation, one per line of prompts.txt."""
    text = files(__name__).joinpath("prompts.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)
