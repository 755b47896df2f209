"""Calibration layer by layer, against the whole model in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc.calibration import walk
from llmc.checkpoint.skeleton import build_hollow
from llmc.config import WeightScheme
from llmc.errors import CheckpointError, ConfigError
from llmc.quantize.blocks import dequantize_blocks
from llmc.quantize.calibrate import Calibration, Calibrator
from llmc.quantize.methods.gptq import quantize_gptq
from tests.models import build_tiny_model
from tests.quantize.reference import Array, scheme
from tests.state_store import StateStore

KIND = scheme(4, 32, False, "gptq")
WINDOWS = np.random.default_rng(0).integers(3, 250, (6, 48))
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
LAYERS = tuple(f"model.layers.{i}" for i in range(3))


class Watched(StateStore):
    """Notes what is read, and may break off."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.reads: list[str] = []
        self.breaks_at = ""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        if self.breaks_at and name.startswith(self.breaks_at):
            raise KeyboardInterrupt
        self.reads.append(name)
        return super().read(name, start, stop)


def _schemes(model: Any) -> dict[str, WeightScheme]:
    named = [n for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    return dict.fromkeys([*named, "model.embed_tokens.weight"], KIND)


def _calibrator(model: Any, store: StateStore, folder: Path) -> Calibrator:
    hollow = build_hollow(model.config)
    return Calibrator(hollow, LAYERS, store, TIED, _schemes(model), np.float32, folder)


def _run(model: Any, folder: Path, windows: Array = WINDOWS) -> Calibration:
    return _calibrator(model, StateStore(model), folder).run(windows, lambda _: None)


def _weights(calibration: Calibration, model: Any) -> dict[str, Array]:
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    joined = {n: calibration.join([n], shapes[n], KIND) for n in _schemes(model)}
    return {n: dequantize_blocks(b) for n, b in joined.items() if b is not None}


def _inputs_of(model: Any, name: str) -> Array:
    """What a module is given, (tokens, features) float64."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.inference_mode():
        for row in WINDOWS:
            model(input_ids=torch.from_numpy(row[None]))
    handle.remove()
    rows: Array = torch.cat(seen).double().numpy()
    return rows


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_each_matrix_sees_the_quantized_ones_before_it(model_type: str, tmp_path: Path) -> None:
    model = build_tiny_model(model_type, tie_word_embeddings=True)
    model.set_attn_implementation("eager")
    found = _weights(_run(model, tmp_path), model)
    assert set(found) == set(_schemes(model))
    # Inputs come from what was quantized before, in layers before and in the same one; the rest is in float.
    for name, before in (
        ("self_attn.q_proj", "model.layers.0."),
        ("mlp.up_proj", "model.layers.1.self_attn."),
    ):
        for changed, weight in found.items():
            if changed.startswith(before):
                model.get_parameter(changed).data.copy_(torch.from_numpy(weight))
        inputs = _inputs_of(model, f"model.layers.1.{name}")
        weight = model.get_parameter(f"model.layers.1.{name}.weight").detach().numpy()
        blocks = quantize_gptq(weight, inputs.T @ inputs, KIND, np.float32, name)
        # Scales are fitted to sums over tokens, which the other way adds in another order.
        same = np.isclose(dequantize_blocks(blocks), found[f"model.layers.1.{name}.weight"], rtol=1e-4)
        assert same.mean() >= 0.99


def test_windows_run_one_by_one_where_their_activations_are_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_tiny_model("llama", tie_word_embeddings=True)
    together = _weights(_run(model, tmp_path / "together"), model)
    widest = max(max(p.shape) for n, p in model.named_parameters() if "layers" in n and p.ndim > 1)
    scores = model.config.num_attention_heads * WINDOWS.shape[1]
    monkeypatch.setattr(walk, "TOGETHER_BYTES", 4 * WINDOWS.size * max(widest, scores) - 1)
    alone = _calibrator(model, StateStore(model), tmp_path / "alone")
    lengths: list[tuple[int, ...]] = []
    alone.model.register_forward_pre_hook(
        lambda _, args, named: lengths.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    found = _weights(alone.run(WINDOWS, lambda _: None), model)
    assert set(lengths) == {(1, WINDOWS.shape[1])}
    # A matrix of the first layer that reads what no matrix before it changes has the same codes.
    first = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_allclose(found[first], together[first], rtol=1e-4, atol=1e-6)


def test_a_killed_calibration_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = build_tiny_model("llama", tie_word_embeddings=True)
    whole = _weights(_run(model, tmp_path / "whole"), model)
    store = Watched(model)
    store.breaks_at = "model.layers.2."
    with pytest.raises(KeyboardInterrupt):
        _calibrator(model, store, tmp_path / "killed").run(WINDOWS, lambda _: None)
    store.breaks_at, store.reads, notes = "", [], []
    found = _weights(_calibrator(model, store, tmp_path / "killed").run(WINDOWS, notes.append), model)
    assert notes == ["2 of 3 layers were calibrated before"]
    assert not [n for n in store.reads if n.startswith(("model.layers.0.", "model.layers.1."))]
    assert found.keys() == whole.keys()
    for name, weight in whole.items():
        np.testing.assert_array_equal(found[name], weight)


def test_no_more_than_one_layer_is_in_memory(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    calibrator = _calibrator(model, StateStore(model), tmp_path)
    calibrator.run(WINDOWS, lambda _: None)
    held = [
        n for n, p in calibrator.model.named_parameters() if not p.is_meta and n.startswith("model.layers.")
    ]
    assert held == []


def test_another_scheme_or_shape_is_not_joined(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    calibration = _run(model, tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    both = [f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up")]
    joined = calibration.join(both, (192, 64), KIND)
    assert joined is not None
    assert joined.codes.shape == (192, 2, 16)
    assert calibration.join([name], (96, 64), scheme(4, 64, False, "gptq")) is None
    assert calibration.join([name], (64, 96), KIND) is None
    assert calibration.join(["model.norm.weight"], (1, 64), KIND) is None


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the calibration text has 96 tokens; at least 256 are needed"):
        _run(build_tiny_model("llama"), tmp_path, WINDOWS[:2])


def test_a_damaged_weight_is_named(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    model.get_parameter("model.layers.1.input_layernorm.weight").data[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"inputs of model\.layers\.1\.self_attn\.q_proj\.weight"):
        _run(model, tmp_path)


def test_the_head_does_not_run_if_only_layers_are_quantized(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    expected = _weights(_run(model, tmp_path / "all"), model)
    hollow = build_hollow(model.config)
    calls: list[str] = []
    hollow.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    schemes = {n: s for n, s in _schemes(model).items() if n.startswith(LAYERS)}
    calibrator = Calibrator(hollow, LAYERS, StateStore(model), TIED, schemes, np.float32, tmp_path / "layers")
    found = _weights(calibrator.run(WINDOWS, lambda _: None), model)
    assert calls == []
    assert found.keys() == schemes.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
