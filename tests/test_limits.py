"""Calls that do not end, or take too much, are found in a child process."""

import pytest

from llmc import limits
from llmc.limits import exceeded_limit


def endless() -> str:
    while True:
        pass


def uninterruptible() -> str:
    return str(len(str(7 ** (7**9))))


def raising() -> str:
    raise ValueError("a template may refuse")


@pytest.mark.parametrize("call", [lambda: "a short text", raising])
def test_a_call_that_ends(call: object) -> None:
    assert exceeded_limit(call) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [endless, uninterruptible])
def test_a_call_that_does_not_end(call: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 1)
    assert exceeded_limit(call) == "does not end within 1 s"  # type: ignore[arg-type]


def test_a_call_that_takes_gigabytes() -> None:
    assert exceeded_limit(lambda: "a" * 10**10) == "needs more than 1 GiB of memory"
    assert exceeded_limit(lambda: "a" * 10**8) == "returns more than 16,777,216 characters"
