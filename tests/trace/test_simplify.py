"""The exporter's output, simplified for dynamic shapes."""

import onnx_ir as ir
import pytest

from llmc.trace.simplify import static_shape

BATCH, TOKENS = ir.SymbolicDim("batch"), ir.SymbolicDim("sequence")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ((BATCH, TOKENS, 4, 16), [0, 0, 4, 16]),
        ((BATCH, 4, TOKENS, 16), [0, 4, -1, 16]),
        ((BATCH, 1, TOKENS, 0), None),  # a dimension of 0 would be copied
        ((TOKENS, BATCH, 64), None),
    ],
)
def test_a_reshape_copies_dimensions_or_infers_one(
    target: tuple[int | ir.SymbolicDim, ...], expected: list[int] | None
) -> None:
    assert static_shape((BATCH, TOKENS, 64), target) == expected
