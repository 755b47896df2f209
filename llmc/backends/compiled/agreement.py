"""Write the static_asserts that keep generated programs and llmc/kernels in agreement."""

from collections.abc import Iterator
from itertools import pairwise

from llmc.backends.compiled.pack import GROUP
from llmc.backends.compiled.program import CHOSEN, LANES, MEMBERS, MOST_DIMS, PER_TOKEN, SAME_TOKENS, SYMBOLS
from llmc.graph.interface import SCALE_BYTES

_INCLUDES = ("cache.h", "program.h")
#: Names in program.h of output dimensions that a step determines.
_DIMENSIONS = {
    "kBatch": SYMBOLS["batch"],
    "kSequence": SYMBOLS["sequence"],
    "kSlots": SYMBOLS["total"],
    "kChosen": CHOSEN,
    "kPerToken": f"~{PER_TOKEN}",
}


def agreement_text() -> str:
    """Write the static_asserts that a generated program begins with when it is compiled.

    They are not part of the program's digest, which identifies what is computed.
    """
    asserts = [*_constants(), *(text for struct in MEMBERS for text in _members(struct))]
    includes = "".join(f'#include "{name}"\n' for name in _INCLUDES)
    lines = "".join(f'static_assert({condition},\n              "{fact}");\n' for condition, fact in asserts)
    return f"{includes}\nnamespace llmc {{\n{lines}}}  // namespace llmc\n"


def _constants() -> Iterator[tuple[str, str]]:
    """Compare constants: yields conditions, each with a description of the violation."""
    yield f"kLanes == {LANES}", f"kLanes of vector.h is not LANES of program.py, {LANES}"
    yield f"kMostDims == {MOST_DIMS}", f"kMostDims of program.h is not MOST_DIMS of program.py, {MOST_DIMS}"
    yield f"kLanes == {GROUP}", f"kLanes of vector.h is not GROUP of pack.py, {GROUP}"
    yield (
        f"kSameTokens == {SAME_TOKENS}",
        f"kSameTokens of program.h is not SAME_TOKENS of program.py, {SAME_TOKENS}",
    )
    right = f"its numbers and SCALE_BYTES of interface.py, {SCALE_BYTES}"
    for size in ("elements", "bytes"):
        yield f"ByteRows<64>::{size} == 64 + {SCALE_BYTES}", f"{size} of ByteRows of cache.h is not {right}"
    for name, value in _DIMENSIONS.items():
        yield f"{name} == {value}", f"{name} of program.h is not {value}, which program.py writes for it"


def _members(struct: str) -> Iterator[tuple[str, str]]:
    """Compare the members of a struct: the first, the last, and that each follows the one before it."""
    first, *_, last = members = MEMBERS[struct]
    listed = f"as MEMBERS of program.py lists {struct}"
    yield f"offsetof({struct}, {first}) == 0", f"{struct} of program.h does not begin with {first}, {listed}"
    for before, after in pairwise(members):
        between = f"offsetof({struct}, {after}) - offsetof({struct}, {before}) - sizeof({struct}::{before})"
        yield (
            f"{between} < alignof(decltype({struct}::{after}))",
            f"{after} does not follow {before} in {struct} of program.h, {listed}",
        )
    behind = f"sizeof({struct}) - offsetof({struct}, {last}) - sizeof({struct}::{last})"
    yield f"{behind} < alignof({struct})", f"{struct} of program.h does not end with {last}, {listed}"
