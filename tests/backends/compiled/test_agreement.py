"""What Python and the kernels both state: where a header says otherwise, a program does not compile."""

import pytest

from llmc.backends.compiled import lower
from llmc.backends.compiled.lower import compile_source
from llmc.backends.compiled.toolchain import find_compiler
from llmc.errors import ResourceError
from tests.backends.compiled.graphs import usable_sets

_compile_library = lower.compile_library


def compile_with(monkeypatch: pytest.MonkeyPatch, header: str, before: str, after: str) -> bytes:
    """Compile an empty program, without glue.cpp, after a replacement in a copy of a header."""

    def planted(compiler, sources, units, flags):  # type: ignore[no-untyped-def]
        assert sources[header].count(before) == 1
        changed = {**sources, header: sources[header].replace(before, after)}
        return _compile_library(compiler, changed, [u for u in units if u.name == "model.cpp"], flags)

    monkeypatch.setattr(lower, "compile_library", planted)
    return compile_source("", usable_sets()[0], find_compiler())


def test_the_kernels_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_with(monkeypatch, "program.h", "kSameTokens = 8", "kSameTokens = 4 + 4")


@pytest.mark.parametrize(
    ("header", "before", "after", "message"),
    [
        ("vector.h", "kLanes = 16", "kLanes = 32", "kLanes of vector.h is not LANES of program.py, 16"),
        (
            "program.h",
            "kSameTokens = 8",
            "kSameTokens = 16",
            "kSameTokens of program.h is not SAME_TOKENS of program.py, 8",
        ),
        (
            "program.h",
            "kSlots = ~2, kChosen = ~3",
            "kSlots = ~3, kChosen = ~2",
            "kSlots of program.h is not ~2, which program.py writes for it",
        ),
        (
            "cache.h",
            "int64_t bytes = D + 4",
            "int64_t bytes = D + 8",
            "bytes of ByteRows of cache.h is not its numbers and SCALE_BYTES of interface.py, 4",
        ),
        (
            "program.h",
            "cos, sin, window;",
            "sin, cos, window;",
            "cos does not follow lengths in Op of program.h, as MEMBERS of program.py lists Op",
        ),
        (
            "program.h",
            "const char* name;\n  const Region*",
            "int64_t more; const char* name;\n  const Region*",
            "Domain of program.h does not begin with name, as MEMBERS of program.py lists Domain",
        ),
        (
            "program.h",
            "int32_t choice;",
            "int32_t more, choice;",
            "choice does not follow chosen in Region of program.h, as MEMBERS of program.py lists Region",
        ),
        (
            "program.h",
            "int32_t offset = 0;",
            "int32_t offset = 0, more = 0;",
            "Ref of program.h does not end with offset, as MEMBERS of program.py lists Ref",
        ),
    ],
    ids=["lanes", "tokens", "dimension", "scale", "swapped", "first", "inserted", "appended"],
)
def test_a_disagreement_does_not_compile(
    header: str, before: str, after: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResourceError, match="failed with code 1") as caught:
        compile_with(monkeypatch, header, before, after)
    assert message in str(caught.value)
