"""Codes of matrices as formats get them."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from llmc.backends.checkpoint.coded import expert_matrix
from llmc.backends.checkpoint.formats.base import unsigned_codes
from llmc.config import CheckpointFormat
from llmc.graph.files import FilePart
from llmc.graph.weights import StoredRows, TensorInfo
from llmc.quantize.place import ExpertsAs
from tests.backends.checkpoint.coded import Tensors, blocks, values


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_has_scale_1_and_the_code_of_zero(bits: int, symmetric: bool) -> None:
    weights = np.random.default_rng(0).normal(0, 0.02, (8, 64)).astype(ml_dtypes.bfloat16)
    weights[2, 32:] = 0
    rows = StoredRows(Tensors({"w": weights}), TensorInfo("w", (8, 64), ir.DataType.BFLOAT16))
    form = CheckpointFormat.COMPRESSED_TENSORS
    stored = ExpertsAs(blocks(bits, 32, symmetric=symmetric))
    coded = expert_matrix("w", rows, FilePart("w", expert=0), stored, (rows,), form)
    codes = coded.read()
    assert codes.scales[2, 1] == 1
    zero = 1 << (bits - 1) if codes.zero_points is None else codes.zero_points[2, 1]
    assert (unsigned_codes(coded, codes)[2, 32:] == zero).all()
    assert np.abs(values(coded) - weights.astype(np.float32)).max() < 0.08 / 2**bits * 2
    assert not values(coded)[2, 32:].any()
