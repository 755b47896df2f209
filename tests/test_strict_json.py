"""JSON that anyone may have written."""

import math

import pytest

from llmc.strict_json import parse_json


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', '{"a": [{"b": -1e999}]}', '{"a": [1.5, NaN]}'])
def test_a_number_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"is -?(nan|inf), which is not a number"):
        parse_json(text)


def test_an_open_range_is_taken() -> None:
    assert parse_json('{"time_step_limit": [0.0, Infinity]}') == {"time_step_limit": [0.0, math.inf]}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, f"[{'1' * 5000}]", b"\xff"])
def test_what_no_parser_takes(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"nested too deeply|digits|utf-8"):
        parse_json(text)


def test_a_key_may_be_repeated_with_its_value_alone() -> None:
    assert parse_json('{"a": 1, "a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="a is given twice, as 1 and 2"):
        parse_json('{"a": 1, "a": 2}')
