"""A model whose weights are read when they are needed computes what the whole model does."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.checkpoint import open_checkpoint
from tests.models import save_tiny_model

#: Weights that lie elsewhere in memory are summed in another order.
ROUNDING = {"rtol": 0.0, "atol": 2e-6}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_equal_logits_in_prefill_and_over_the_cache(model_type: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model(model_type, tmp_path)))
    whole, streamed = checkpoint.load_reference(), checkpoint.stream_reference({})
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        for model_ids in (ids, ids[:, :1]):
            a, b = whole(input_ids=model_ids), streamed(input_ids=model_ids)
            torch.testing.assert_close(b.logits, a.logits, **ROUNDING)
        a, b = (
            m(input_ids=ids[:, :1], past_key_values=o.past_key_values) for m, o in ((whole, a), (streamed, b))
        )
        torch.testing.assert_close(b.logits, a.logits, **ROUNDING)


def test_no_weight_stays_and_values_can_be_put_in_their_place(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model("llama", tmp_path, tie_word_embeddings=True)))
    name = "model.layers.1.mlp.up_proj.weight"
    other = 2 * checkpoint.tensors.read(name).astype(np.float32)
    streamed = checkpoint.stream_reference({name: other})
    whole = checkpoint.load_reference()
    whole.get_parameter(name).data *= 2
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        torch.testing.assert_close(
            streamed(input_ids=ids).logits, whole(input_ids=ids).logits, rtol=0, atol=0
        )
    gc.collect()
    assert {p.device.type for p in streamed.parameters()} == {"meta"}
    assert checkpoint.reference_bytes() == sum(4 * p.numel() for p in whole.parameters())
