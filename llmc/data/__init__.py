"""Provide the texts that ship, our own or in the public domain: for evaluation, calibration and prompts."""

from importlib.resources import files


def eval_text() -> str:
    """Return English prose, dialogue, lists and a little code, for perplexity and KL divergence."""
    return files(__name__).joinpath("eval.txt").read_text(encoding="utf-8")


def calibration_text() -> str:
    """Return the calibration text, which is different from the evaluation text.

    It is English prose, instructions, dialogue, tables, code and openings of old books.
    """
    return files(__name__).joinpath("calibration.txt").read_text(encoding="utf-8")


def prompts() -> tuple[str, ...]:
    """Return short prompts for greedy generation, one per line of prompts.txt."""
    text = files(__name__).joinpath("prompts.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)
