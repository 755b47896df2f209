"""Codes of a checkpoint in the blocks of operators: the values stay what they were."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from llmc.arrays import Array
from llmc.config import WeightScheme
from llmc.errors import CheckpointError
from llmc.graph.weights import (
    CastRows,
    CodeGrid,
    CodeRows,
    ConcatRows,
    Rows,
    ScaledRows,
    StoredRows,
    TensorInfo,
    TransposedRows,
)
from llmc.quantize.blocks import ScaleType, dequantize_blocks
from llmc.quantize.place import QuantizedTensor
from llmc.quantize.stored import StoredMatrix, find_stored, is_stored, origin_notes
from tests.checkpoint.quantized_folders import Codes, draw_codes
from tests.quantize.test_linear import Tensors

RULE = WeightScheme(bits=4, block_size=32, symmetric=False, method="mse")


def stored_rows(codes: Codes, group: int) -> StoredRows:
    """A tensor whose checkpoint has `codes`."""

    def read(start: int, stop: int) -> CodeRows:
        return CodeRows(
            codes.codes[start:stop].astype(np.uint8),
            codes.zeros[start:stop].astype(np.uint8),
            codes.scales[start:stop],
        )

    symmetric = bool((codes.zeros == 1 << (codes.bits - 1)).all())
    grid = CodeGrid(codes.bits, group, symmetric, codes.scales.dtype, read)
    values = codes.values()
    info = TensorInfo("w", values.shape, ir.DataType.FLOAT, lambda: grid)
    return StoredRows(Tensors({"w": values}), info)


def minimum_rows(seed: int, shape: tuple[int, int], bits: int, group: int) -> tuple[StoredRows, Array]:
    """A tensor of code * scale + minimum with float16 scales, one of which is 0, and its values."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, shape).astype(np.uint8)
    scales, shifts = (rng.normal(0, 0.01, (shape[0], shape[1] // group)).astype(np.float16) for _ in "sm")
    scales[1, 0] = 0
    minimums = shifts - scales * np.float16(1 << (bits - 1))
    wide, low = (np.repeat(x.astype(np.float32), group, axis=1) for x in (scales, minimums))
    values = codes * wide + low

    def read(start: int, stop: int) -> CodeRows:
        here = slice(start, stop)
        return CodeRows(codes[here], np.zeros_like(codes[here]), scales[here], minimums[here])

    grid = CodeGrid(bits, group, False, scales.dtype, read, minimums=True)
    info = TensorInfo("m", shape, ir.DataType.FLOAT, lambda: grid)
    return StoredRows(Tensors({"m": values}), info), values


def float_rows(values: Array) -> StoredRows:
    return StoredRows(Tensors({"f": values}), TensorInfo("f", values.shape, ir.DataType.FLOAT))


def pack(rows: Rows) -> tuple[WeightScheme, Array]:
    """The scheme that keeps `rows`, and the values that an operator reads."""
    found = find_stored(rows, RULE, outputs_first=True)
    assert isinstance(found, StoredMatrix)
    return found.scheme, dequantize_blocks(found.pack(np.float32, "w"))


@pytest.mark.parametrize(
    ("inputs", "bits", "group", "symmetric", "stored"),
    [
        (64, 4, 32, False, (4, 32)),
        (64, 4, 32, True, (4, 32)),
        (256, 4, 128, False, (4, 128)),
        (512, 4, 256, False, (4, 128)),  # a group in two blocks
        (96, 4, 48, False, (4, 16)),
        (96, 2, 32, False, (4, 32)),  # codes moved up into a wider type
        (96, 3, 32, True, (4, 32)),
        (64, 5, 32, False, (8, 32)),
        (64, 8, 32, False, (8, 32)),
        (576, 8, 576, True, (8, 64)),  # one scale an output
        (40, 8, 40, True, (8, 16)),  # of which no block is a divisor: the last one is padded
        (80, 4, 32, False, (4, 16)),  # the last group is half a group
    ],
)
def test_values_stay_whatever_the_grid(
    inputs: int, bits: int, group: int, symmetric: bool, stored: tuple[int, int]
) -> None:
    codes = draw_codes(3, (50, inputs), bits=bits, group=group, symmetric=symmetric)
    scheme, values = pack(stored_rows(codes, group))
    assert (scheme.bits, scheme.block_size, scheme.symmetric) == (*stored, symmetric)
    np.testing.assert_array_equal(values, codes.values())


def test_joined_matrices_take_the_finest_blocks_and_widest_codes() -> None:
    parts = [
        draw_codes(2, (16, 128), bits=8, group=32, symmetric=True),
        draw_codes(1, (24, 128), bits=3, group=64),
        draw_codes(3, (8, 128), bits=4, group=128),
    ]
    rows = ConcatRows(tuple(stored_rows(c, g) for c, g in zip(parts, (32, 64, 128), strict=True)))
    scheme, values = pack(CastRows(rows, ir.DataType.FLOAT16))
    assert (scheme.bits, scheme.block_size, scheme.symmetric) == (8, 32, False)
    np.testing.assert_array_equal(values, np.concatenate([c.values() for c in parts]))


@pytest.mark.parametrize("scale_type", [np.float16, np.float32])
def test_minimums_are_kept_as_float_zero_points(scale_type: ScaleType) -> None:
    rows, values = minimum_rows(4, (24, 96), 4, 32)
    found = find_stored(rows, RULE, outputs_first=True)
    assert isinstance(found, StoredMatrix)
    blocks = found.pack(scale_type, "w")
    assert (blocks.scheme.bits, blocks.scheme.block_size, blocks.scheme.symmetric) == (4, 32, False)
    np.testing.assert_allclose(dequantize_blocks(blocks), values, rtol=1e-5, atol=1e-8)
    assert blocks.zero_points is not None
    minimums = (-blocks.zero_points * blocks.scales.astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(minimums, rows.info.codes().read(0, 24).minimums)  # type: ignore[union-attr, misc]


def test_a_part_with_minimums_gives_its_neighbours_float_zero_points() -> None:
    rows, values = minimum_rows(4, (24, 96), 4, 32)
    codes = draw_codes(2, (16, 96), bits=8, group=96, symmetric=True)
    scheme, packed = pack(ConcatRows((stored_rows(codes, 96), rows)))
    assert (scheme.bits, scheme.block_size, scheme.symmetric) == (8, 32, False)
    np.testing.assert_allclose(packed, np.concatenate([codes.values(), values]), rtol=1e-5, atol=1e-8)


def test_a_matrix_turned_twice_is_kept_and_one_turned_once_is_not() -> None:
    codes = draw_codes(1, (32, 64))
    turned = TransposedRows(stored_rows(codes, 32))
    found = find_stored(turned, RULE, outputs_first=False)
    assert isinstance(found, StoredMatrix)
    np.testing.assert_array_equal(dequantize_blocks(found.pack(np.float32, "w")), codes.values())
    assert find_stored(turned, RULE, outputs_first=True) == "its inputs come first"


def test_what_cannot_be_kept_says_why() -> None:
    codes = draw_codes(1, (32, 64))
    kept, plain = stored_rows(codes, 32), float_rows(codes.values())
    scattered = StoredRows(kept.store, TensorInfo("w", (32, 64), ir.DataType.FLOAT, lambda: "in fp8"))
    scaled = ScaledRows(kept, np.full(32, 2, np.float32), 0)
    odd = stored_rows(draw_codes(1, (32, 64), group=8), 8)
    for rows, reason in (
        (plain, None),
        (scattered, "in fp8"),
        (scaled, "its values are scaled or turned before they are stored"),
        (ConcatRows((kept, plain)), "f, which is joined with it, is not quantized"),
        (odd, "groups of 8 inputs are not a multiple of 16"),
    ):
        assert find_stored(rows, RULE, outputs_first=True) == reason
        assert is_stored(rows) == (reason is not None)


def test_scales_are_checked_against_their_type() -> None:
    codes = draw_codes(1, (32, 64), scale_dtype=np.float32)
    codes.scales[5, 1] = 1e6
    found = find_stored(stored_rows(codes, 32), RULE, outputs_first=True)
    assert isinstance(found, StoredMatrix)
    assert found.is_exact(np.float32)
    assert not found.is_exact(np.float16)
    assert np.isfinite(found.pack(np.float32, "w").scales).all()
    with pytest.raises(CheckpointError, match="w has scales that are not finite, or too large for float16"):
        found.pack(np.float16, "w")
    brain = draw_codes(1, (32, 64), scale_dtype=ml_dtypes.bfloat16)
    found = find_stored(stored_rows(brain, 32), RULE, outputs_first=True)
    assert isinstance(found, StoredMatrix)
    assert found.is_exact(np.float32)
    assert not found.is_exact(np.float16)


def test_notes_count_matrices_by_what_became_of_them() -> None:
    origins = (None, "kept", "made floats", "kept")
    tensors = [QuantizedTensor(f"w{i}", "linear", (1, 1), None, 4, o) for i, o in enumerate(origins)]  # type: ignore[arg-type]
    assert list(origin_notes(tensors)) == [
        "codes of the checkpoint: kept for 2 matrices, first w1",
        "codes of the checkpoint: made floats for 1 matrices, first w2",
    ]
