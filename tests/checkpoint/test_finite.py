"""NaN and infinity in the files are refused where the rows are read."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.finite import FiniteCheck, is_finite
from llmc.errors import CheckpointError
from tests.checkpoint.tiny_gguf import GGMLQuantizationType, write_gguf
from tests.models import save_tiny_model

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "kind", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]
)
def test_every_type(kind: type) -> None:
    info = ml_dtypes.finfo(kind)
    fine = np.array([[info.max, info.min], [0.0, -0.0]], kind)
    assert is_finite(fine)
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        assert not is_finite(np.where(np.eye(2, dtype=bool), np.array(bad, kind), fine))
    assert is_finite(np.full(3, -1, np.int32))
    assert is_finite(np.empty((0, 4), kind))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_damaged_row_is_named(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    file = save_tiny_model("llama", tmp_path, dtype=dtype) / "model.safetensors"
    tensors = load_file(file)
    tensors[NAME][70, 3] = value
    save_file(tensors, file)
    store = open_checkpoint(str(tmp_path)).tensors
    assert len(store.read(NAME, 0, 70)) == 70
    with pytest.raises(CheckpointError, match=f"{NAME} in the files holds NaN or infinity in row 70"):
        store.read(NAME, 64, 80)


def test_a_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.full((96, 64), np.nan, np.float32)
    monkeypatch.setattr(
        "tests.checkpoint.tiny_gguf.tensor_values", lambda name, shape: np.resize(values, shape)
    )
    file = write_gguf(tmp_path / "tiny.gguf", kind=GGMLQuantizationType.F32)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight in the files holds NaN"):
        open_checkpoint(str(file)).tensors.read(NAME)


def test_rows_are_checked_once_from_the_first_on() -> None:
    check, broken = FiniteCheck(), np.array([[np.nan]], np.float32)
    check.check("a", 0, np.ones((4, 1), np.float32))
    check.check("a", 3, broken)
    check.check("b", 4, np.ones((4, 1), np.float32))
    with pytest.raises(CheckpointError, match="in row 4"):
        check.check("b", 4, broken)
