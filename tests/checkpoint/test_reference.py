"""Models of llmc's own reader are those of `from_pretrained`, whole and with weights read when needed."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

from llmc.checkpoint import Checkpoint, open_checkpoint
from llmc.checkpoint.reference import fill_model
from llmc.errors import CheckpointError
from tests.checkpoint.tiny_gguf import write_gguf
from tests.models import MODEL_TYPES, save_tiny_model

#: Weights that lie elsewhere in memory are summed in another order.
ROUNDING = {"rtol": 0.0, "atol": 2e-6}


@pytest.mark.parametrize("block", [256 << 20, 4096])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_equal_logits_in_prefill_and_over_the_cache(
    model_type: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers in blocks of a few outputs as well."""
    monkeypatch.setattr("llmc.checkpoint.reference.BLOCK_BYTES", block)
    checkpoint = open_checkpoint(str(save_tiny_model(model_type, tmp_path)))
    whole, streamed = checkpoint.load_reference(), checkpoint.stream_reference({})
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        for model_ids in (ids, ids[:, :1]):
            a, b = whole(input_ids=model_ids), streamed(input_ids=model_ids)
            torch.testing.assert_close(b.logits, a.logits, rtol=0.0, atol=1e-5)
        a, b = (m(input_ids=ids[:, :1], cache=o.cache) for m, o in ((whole, a), (streamed, b)))
        torch.testing.assert_close(b.logits, a.logits, **ROUNDING)


@pytest.mark.parametrize("model_type", ["mamba", "bamba", "nemotron_h", "lfm2"])
def test_parameters_that_another_module_uses_are_read(model_type: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model(model_type, tmp_path)))
    whole, streamed = checkpoint.load_reference(), checkpoint.stream_reference({})
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        a, b = (model(input_ids=ids).logits for model in (whole, streamed))
    torch.testing.assert_close(b, a, **ROUNDING)
    assert all(parameter.is_meta for parameter in streamed.parameters())


def assert_equals_from_pretrained(checkpoint: Checkpoint) -> None:
    """Every parameter, every buffer, and what is tied."""
    theirs, ours = checkpoint.load_reference(), checkpoint.fill_reference()
    for kind in ("named_parameters", "named_buffers"):
        expected = dict(getattr(theirs, kind)(remove_duplicate=False))
        actual = dict(getattr(ours, kind)(remove_duplicate=False))
        assert set(actual) == set(expected)
        for name, value in expected.items():
            assert actual[name].dtype == value.dtype
            assert torch.equal(actual[name], value), name
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    assert not ours.training
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        torch.testing.assert_close(
            ours(input_ids=ids, use_cache=False).logits,
            theirs(input_ids=ids, use_cache=False).logits,
            rtol=0.0,
            atol=0.0,
        )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_equals_from_pretrained(model_type: str, tmp_path: Path) -> None:
    assert_equals_from_pretrained(open_checkpoint(str(save_tiny_model(model_type, tmp_path))))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3moe", "gpt2", "lfm2"])
def test_equals_from_pretrained_of_a_gguf(architecture: str, tmp_path: Path) -> None:
    assert_equals_from_pretrained(open_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", architecture))))


def test_a_parameter_that_the_files_lack(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_tiny_model("llama", tmp_path, tie_word_embeddings=True)))
    with pytest.raises(CheckpointError, match=r"the files lack lm_head\.weight, which the model has"):
        fill_model(checkpoint.config, checkpoint.tensors, {})


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
