"""A few inputs of `benchmarks/fuzz.py`, drawn by a seed; the command reads thousands."""

import sys
from pathlib import Path
from random import Random

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from fuzz import MISTAKES, WRITERS, judge, mutate, mutate_json


@pytest.mark.parametrize(("kind", "count"), [("gguf", 30), ("folders", 40)])
def test_mutated_checkpoints_are_taken_or_refused(kind: str, count: int, tmp_path: Path) -> None:
    bases = WRITERS[kind](tmp_path / "bases")
    for number in range(count):
        path = mutate(kind, bases, tmp_path / "input", Random(f"test {number}"))
        outcome, detail = judge(kind, path)
        assert outcome not in MISTAKES, f"{kind} {number}: {detail}"


def test_a_seed_draws_the_same_mutations() -> None:
    first, second = (mutate_json('{"a": [1, {"b": "c"}]}', Random(7)) for _ in range(2))
    assert first == second != '{"a": [1, {"b": "c"}]}'
