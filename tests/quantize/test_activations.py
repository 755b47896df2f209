"""Ranges and peaks of activations, layer by layer, against the whole model in memory."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from llmc.calibration.walk import LayerWalk
from llmc.checkpoint.skeleton import build_hollow
from llmc.config import Dtype, EngineRule, EngineScheme, WeightFormat
from llmc.errors import CheckpointError, ParityError, UnsupportedError
from llmc.quantize.activations import (
    SMOOTHING,
    Activations,
    ActivationTask,
    InputPlan,
    plan_inputs,
    read_activations,
    read_smoothing,
    write_smoothing,
)
from llmc.quantize.rounding import fake_quantize
from tests.lowering import lower
from tests.models import build_tiny_model
from tests.state_store import StateStore

WINDOWS = np.random.default_rng(0).integers(3, 250, (6, 48))
LAYERS = tuple(f"model.layers.{i}" for i in range(3))
STATIC = EngineRule(scheme=EngineScheme(format=WeightFormat.INT8, activations="static"))
Array = np.ndarray


def _walk(model: Any, plans: tuple[InputPlan, ...], folder: Path) -> Activations:
    walk = LayerWalk(build_hollow(model.config), LAYERS, StateStore(model), {}, folder)
    task = ActivationTask(plans, {}, LAYERS, len(WINDOWS))
    return read_activations(walk.run(WINDOWS, task, lambda _: None))


def _plans(model_type: str = "llama", rule: EngineRule = STATIC) -> tuple[InputPlan, ...]:
    graph, _ = lower(model_type, Dtype.FLOAT16, "pack-shared")
    return plan_inputs(graph, (rule,))


def _seen(model: Any, name: str, what: str) -> Array:
    """Every input or output of a module, (tokens, features)."""
    found = []

    def hook(_: Any, args: Any, result: Any) -> None:
        tensor = args[0] if what == "input" else result[0] if isinstance(result, tuple) else result
        found.append(tensor.reshape(-1, tensor.shape[-1]))

    handle = model.get_submodule(name).register_forward_hook(hook)
    with torch.inference_mode():
        for row in WINDOWS:
            model(input_ids=torch.from_numpy(row[None]))
    handle.remove()
    rows: Array = torch.cat(found).numpy()
    return rows


def test_plans_name_the_weights_that_share_an_activation() -> None:
    plans = {plan.sources[0].split(".", 3)[-1]: plan for plan in _plans() if ".1." in plan.sources[0]}
    assert list(plans) == [
        "self_attn.q_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.down_proj.weight",
    ]
    assert [len(plan.sources) for plan in plans.values()] == [3, 1, 2, 1]
    assert [plan.foldable for plan in plans.values()] == [True, False, True, True]
    assert {plan.kind for plan in plans.values()} == {WeightFormat.INT8}


def test_tokens_with_scales_of_their_own_lose_less(tmp_path: Path) -> None:
    dynamic = EngineRule(scheme=EngineScheme(format=WeightFormat.INT8, activations="dynamic"))
    plans = _plans(rule=dynamic)
    assert all(plan.by_token for plan in plans)
    assert not any(plan.by_token for plan in _plans())
    model = build_tiny_model("llama")
    by_token = _walk(model, plans, tmp_path / "token").ranges
    for name, fixed in _walk(model, _plans(), tmp_path / "whole").ranges.items():
        assert by_token[name].snr_db > fixed.snr_db - 0.5


def test_ranges_and_peaks_are_those_of_the_model(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    model.set_attn_implementation("eager")
    found = _walk(model, _plans(), tmp_path)
    assert len(found.ranges) == 4 * 3 + 1
    for name in (
        "model.layers.1",
        "model.layers.2.mlp.down_proj",
        "model.norm",
        "model.embed_tokens",
        "lm_head",
    ):
        np.testing.assert_allclose(found.peaks[name], np.abs(_seen(model, name, "output")).max(), rtol=1e-5)
    down = found.ranges["model.layers.1.mlp.down_proj.weight"]
    inputs = _seen(model, "model.layers.1.mlp.down_proj", "input")
    divided = inputs if down.smoothing is None else inputs / down.smoothing
    np.testing.assert_allclose(down.peak, np.abs(divided).max(), rtol=1e-5)
    kept = fake_quantize(torch.from_numpy(divided), WeightFormat.INT8, down.peak).numpy()
    noise = (np.square(kept - divided).sum(axis=1) / np.square(divided).sum(axis=1)).mean()
    assert abs(-10 * np.log10(noise) - down.snr_db) < 0.5  # the walk looks at some of the tokens
    head = np.abs(_seen(model, "lm_head", "input")).max(axis=0)
    smoothing = found.ranges["lm_head.weight"].smoothing
    np.testing.assert_allclose(
        found.ranges["lm_head.weight"].peak,
        (head if smoothing is None else head / smoothing).max(),
        rtol=1e-5,
    )


def test_a_loud_channel_is_divided(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    model.get_parameter("model.layers.1.input_layernorm.weight").data[7] *= 300
    plan = tuple(p for p in _plans() if p.sources[0] == "model.layers.1.self_attn.q_proj.weight")
    (found,) = _walk(model, plan, tmp_path / "foldable").ranges.values()
    assert found.smoothing is not None
    assert found.smoothing.argmax() == 7
    assert found.snr_db > 25
    fixed = tuple(InputPlan(p.sources, p.kind, False) for p in plan)
    (plain,) = _walk(model, fixed, tmp_path / "fixed").ranges.values()
    assert plain.smoothing is None
    # A scale that spans the loud channel leaves nothing of the others, which matter to the products as much.
    assert plain.peak > 10 * found.peak


def test_activations_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    model.get_parameter("model.layers.1.input_layernorm.weight").data[3] = torch.inf
    with pytest.raises(CheckpointError, match=r"inputs of model\.layers\.1\.self_attn\.q_proj\.weight"):
        _walk(model, _plans(), tmp_path)


def test_a_model_that_does_not_run_is_refused(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    hollow = build_hollow(model.config)
    hollow.model.rotary_emb = None
    walk = LayerWalk(hollow, LAYERS, StateStore(model), {}, tmp_path)
    with pytest.raises(UnsupportedError, match="the model cannot be run layer by layer: TypeError"):
        walk.run(WINDOWS, ActivationTask((), {}, LAYERS, 6), lambda _: None)


def test_fp4_takes_the_nearest_code_as_the_type_defines_it() -> None:
    values = np.linspace(-6, 6, 1600, dtype=np.float32)
    rows = np.concatenate([np.stack([np.full(1600, 6, np.float32), values]).T.reshape(-1, 2)] * 8, axis=1)
    found = fake_quantize(torch.from_numpy(rows), WeightFormat.NVFP4, 6 * 448).numpy()
    np.testing.assert_array_equal(found[:, 1], values.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


def test_fp4_scales_are_rounded_to_fp8() -> None:
    rows = np.abs(np.random.default_rng(0).normal(size=(8, 64))).astype(np.float32)
    peak = float(rows.max())
    found = fake_quantize(torch.from_numpy(rows), WeightFormat.NVFP4, peak).numpy()
    whole = np.float32(peak / (6 * 448))
    blocks = rows.reshape(8, 4, 16)
    scale = (blocks.max(axis=2, keepdims=True) / 6 / whole).astype(ml_dtypes.float8_e4m3fn)
    real = scale.astype(np.float32) * whole
    codes = np.clip(blocks / real, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_allclose(found, (codes * real).reshape(8, 64), rtol=1e-6)


def test_smoothing_is_kept_beside_the_graph(tmp_path: Path) -> None:
    found = _walk(build_tiny_model("llama"), _plans(), tmp_path / "walk")
    write_smoothing(tmp_path, found.smoothing)
    again = read_smoothing(tmp_path)
    assert again.keys() == {n for n, r in found.ranges.items() if r.smoothing is not None}
    (tmp_path / SMOOTHING).write_bytes(b"no")
    with pytest.raises(
        ParityError, match="which states the scaling of the artifact's weights, cannot be read"
    ):
        read_smoothing(tmp_path)
