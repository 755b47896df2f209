"""A rehearsal against blank logits asks the original all that the artifact's turn will ask."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.artifact.cache import StageCache
from llmc.artifact.verdict import MeasurementStatus
from llmc.validate.blank import BlankSession
from llmc.validate.parity import Parity
from llmc.validate.reference import TorchModel
from llmc.validate.remembered import RememberedModel
from llmc.validate.session import OrtModel

from .decoder import Variant, write_decoder


@pytest.mark.parametrize(
    "variant",
    [Variant(), Variant(logits="last"), Variant(grouped=True, padding="right", logits="last")],
    ids=["all", "last", "right"],
)
def test_nothing_is_left_to_ask(mistral: Any, tokens: np.ndarray, tmp_path: Path, variant: Variant) -> None:
    interface = write_decoder(mistral, tmp_path, variant)
    cache = StageCache(tmp_path / "reference")
    loaded = []

    def load() -> TorchModel:
        loaded.append(1)
        return TorchModel(mistral)

    reference = RememberedModel(load, cache, {"weights": "a"}, 8)
    blank = Parity(BlankSession(interface), reference, tokens, switches=(40,)).measure()
    assert all(m.status is MeasurementStatus.MEASURED for m in blank)
    assert max(m.value for m in blank if m.metric.value.endswith("max_abs")) > 0.1
    assert reference.release() is not None
    model = OrtModel(tmp_path, interface, threads=1, share_buffer=False)
    measured = Parity(model, reference, tokens, switches=(40,)).measure()
    assert all(m.value < 1e-4 for m in measured if m.metric.value.endswith("max_abs"))
    assert loaded == [1]


def test_blank_logits_take_no_memory(mistral: Any, tmp_path: Path) -> None:
    interface = write_decoder(mistral, tmp_path, Variant())
    logits = BlankSession(interface).prefill(np.zeros((3, 1000), np.int64), steps=4)
    assert (logits.shape, logits.dtype, logits.base.nbytes) == ((3, 1000, 256), np.float32, 4)
