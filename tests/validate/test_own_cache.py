"""The original as a reference, if it does not return the cache that it changes."""

import numpy as np

from llmc.validate.reference import TorchModel
from tests.models import build_tiny_model


def test_steps_continue_from_a_cache_that_is_not_returned() -> None:
    model = TorchModel(build_tiny_model("recurrent_gemma"))
    ids, positions = np.random.default_rng(0).integers(3, 250, 12), np.arange(8, 12)
    whole = model.logits_at(ids, positions)
    steps = model.logits_at(ids, positions, pieces=(8, 1, 1, 1, 1))
    assert np.abs(steps - whole).max() <= 1e-5
    tokens = model.greedy(ids[:8], 3)
    again = [int(model.logits(np.concatenate([ids[:8], tokens[:n]]), keep=1)[-1].argmax()) for n in range(3)]
    assert tokens.tolist() == again
