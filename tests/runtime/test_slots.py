"""A graph with fewer slots gives the logits of the graph with all of them."""

from pathlib import Path

import numpy as np
import pytest

from llmc.config import Dtype
from llmc.errors import ConfigError
from llmc.runtime.static_ort_model import StaticOrtModel
from tests.lowering import CAPACITY, write_lowered

IDS = np.random.default_rng(1).integers(3, 250, (2, 24))
MASK = np.arange(16) < np.array([[16], [9]])


def _logits(model: StaticOrtModel) -> np.ndarray:
    first = model.prefill(IDS[:, :16], MASK.astype(np.int64), steps=4)[:, -1:]
    return np.concatenate([first, *(model.decode(IDS[:, 16 + n : 17 + n]) for n in range(4))], axis=1)


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        ("llama", Dtype.FLOAT16),
        ("mistral", Dtype.FLOAT32),
        ("mistral", Dtype.BFLOAT16),
        ("gemma2", Dtype.FLOAT16),
    ],
)
def test_logits_are_those_of_all_slots(model_type: str, dtype: Dtype, tmp_path: Path) -> None:
    interface = write_lowered(tmp_path, model_type, dtype)
    whole = StaticOrtModel(tmp_path, interface, threads=1)
    short = StaticOrtModel(tmp_path, interface, threads=1, slots=20)
    assert (whole.capacity, short.capacity) == (CAPACITY, 20)
    np.testing.assert_allclose(_logits(short), _logits(whole), atol=2e-2 if dtype is Dtype.FLOAT16 else 1e-5)
    with pytest.raises(ConfigError):
        short.decode(IDS[:, :1])
