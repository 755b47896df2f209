"""Differences of files and of JSON values are told by key, with both values."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmc.validate.file_differences import compare_file, json_differences

BUILT: dict[str, Any] = {"model": {"eos_token_id": [2, 5]}, "search": {"top_k": 50, "do_sample": True}}


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        (
            {"model": BUILT["model"], "search": {"top_k": 1, "do_sample": True}},
            "search.top_k is 1, but 50 in a build",
        ),
        ({"model": BUILT["model"]}, 'search is absent, but {"top_k": 50, "do_sample": true} in a build'),
        ({**BUILT, "more": 1}, "more is 1, but absent in a build"),
        ({**BUILT, "model": {"eos_token_id": [2]}}, "model.eos_token_id is [2], but [2, 5] in a build"),
        ({**BUILT, "model": {"eos_token_id": [2, 6]}}, "model.eos_token_id[1] is 6, but 5 in a build"),
        ({**BUILT, "search": {"top_k": 50, "do_sample": 1}}, "search.do_sample is 1, but true in a build"),
    ],
)
def test_each_difference_has_its_key_and_both_values(stated: Any, told: str) -> None:
    assert list(json_differences(stated, BUILT, "f")) == [f"f: {told}"]


def test_many_differences_are_counted() -> None:
    found = list(json_differences({}, {str(i): i for i in range(9)}, "f"))
    assert len(found) == 6
    assert found[-1] == "f: 4 more places differ"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.json", None, "a.json is missing"),
        ("a.json", "{", "a.json is not JSON: Expecting property name"),
        ("a.json", '{"search": 1, "search": 2}', "a.json: search is given twice, as 1 and 2"),
        ("a.json", json.dumps(BUILT, indent=7), "the bytes of a.json differ from what a build writes"),
        ("a.jinja", "{{ x }}", "a.jinja is not the file of the original"),
    ],
)
def test_a_file_that_differs_is_told(name: str, text: str | None, told: str, tmp_path: Path) -> None:
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / name).write_text(json.dumps(BUILT), encoding="utf-8")
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    (found,) = compare_file(tmp_path / name, tmp_path / "built" / name)
    assert found.startswith(told)


def test_equal_files_have_no_difference(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}", encoding="utf-8")
    assert compare_file(tmp_path / "a.json", tmp_path / "a.json") == []
