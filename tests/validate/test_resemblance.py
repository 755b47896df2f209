"""Codes of GPTQ are roundings of their matrix; scales, blocks and rows that were changed are not."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest

from llmc.config import WeightScheme
from llmc.quantize.blocks import dequantize_blocks
from llmc.quantize.methods.gptq import quantize_gptq
from llmc.validate.resemblance import describe_stranger
from llmc.validate.stored import Stored


@dataclass(frozen=True)
class _Matrix:
    values: np.ndarray
    dtype: ir.DataType = ir.DataType.FLOAT
    sources: tuple[str, ...] = ("w",)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop]


def _stored(values: np.ndarray) -> Stored:
    return Stored(values.shape, lambda start, stop: values[start:stop], 32)


@pytest.fixture(scope="module", params=[4, 8])
def rounded(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """A matrix, and what GPTQ makes of it on correlated inputs."""
    random = np.random.default_rng(0)
    weights = random.standard_t(5, (96, 128)).astype(np.float32)
    inputs = (random.standard_normal((512, 128)) @ random.standard_normal((128, 128))).astype(np.float32)
    scheme = WeightScheme(bits=request.param, block_size=32, symmetric=False, method="gptq")
    blocks = quantize_gptq(weights, inputs.T @ inputs, scheme, np.float16, "w")
    return weights, dequantize_blocks(blocks)


def test_codes_of_gptq_are_a_rounding(rounded: tuple[np.ndarray, np.ndarray]) -> None:
    assert describe_stranger(_Matrix(rounded[0]), _stored(rounded[1])) is None


def _zero_block(values: np.ndarray) -> None:
    values[7, 32:64] = 0


def _other_row(values: np.ndarray) -> None:
    values[7] = values[8]


def _wide_scales(values: np.ndarray) -> None:
    values *= 1.03


def _narrow_scales(values: np.ndarray) -> None:
    values *= 0.9


def _infinite(values: np.ndarray) -> None:
    values[3, 3] = np.inf


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_zero_block, "has a gain of 0.00 in block 1 of row 7"),
        (_other_row, "of row 7, where a rounding has 1"),
        (_wide_scales, "a rounding that loses"),
        (_narrow_scales, "a rounding that loses"),
        (_infinite, "has values that are not finite"),
    ],
)
def test_changes_are_told(
    change: Callable[[np.ndarray], None], said: str, rounded: tuple[np.ndarray, np.ndarray]
) -> None:
    weights, values = rounded
    changed = values.copy()
    change(changed)
    assert said in str(describe_stranger(_Matrix(weights), _stored(changed)))


def test_zeros_stay_zeros() -> None:
    zeros = np.zeros((4, 32), np.float32)
    assert describe_stranger(_Matrix(zeros), _stored(zeros)) is None
    assert "is not zero" in str(describe_stranger(_Matrix(zeros), _stored(zeros + 1)))
