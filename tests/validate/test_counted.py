"""Progress of the levels: the runs that a plan foretells are those that are made."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.runtime.ort_model import OrtModel
from llmc.validate.counted import Counted
from llmc.validate.parity import Parity
from llmc.validate.reference import TorchModel
from llmc.validate.served_attention import measure_cache

from .decoder import Variant, write_decoder
from .levels import plan_of


@pytest.mark.parametrize(
    "variant",
    [Variant(), Variant(grouped=True, padding="right", logits="last")],
    ids=["padded on any side", "on the right"],
)
def test_the_runs_of_the_levels_are_counted(
    mistral: Any, tokens: np.ndarray, tmp_path: Path, variant: Variant
) -> None:
    reference = TorchModel(mistral)
    model = OrtModel(tmp_path, write_decoder(mistral, tmp_path, variant), threads=1, share_buffer=False)
    plan, told = plan_of(model.interface, tokens, window=reference.window, compiled=True), list[Any]()
    counted = Counted(model, plan.runs_of_levels, lambda done, total: told.append((done, total)))
    Parity(counted, reference, plan).measure()
    assert told == [(n + 1, plan.runs_of_levels) for n in range(plan.runs_of_levels)]
    told.clear()
    measure_cache(Counted(model, plan.runs_of_cache, lambda *now: told.append(now)), reference, plan)
    assert 0.9 * plan.runs_of_cache < len(told) <= plan.runs_of_cache
