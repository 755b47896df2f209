"""The C++ text of a region's program."""

import numpy as np
import pytest

from llmc.backends.compiled.program import float_literal


@pytest.mark.parametrize(
    ("value", "literal"),
    [(1.0, "1.0f"), (-0.5, "-0.5f"), (1e-5, "1e-05f"), (float(np.float32(1e-5)), "1e-05f"), (3e20, "3e+20f")],
)
def test_a_number_has_one_literal_however_it_was_read(value: float, literal: str) -> None:
    assert float_literal(value) == literal
