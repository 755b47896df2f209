"""Experts that are quantized on the tokens that each of them receives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc.checkpoint.skeleton import build_hollow
from llmc.errors import CheckpointError
from llmc.quantize import calibrate_experts
from llmc.quantize.blocks import dequantize_blocks
from llmc.quantize.calibrate import Calibration, Calibrator
from llmc.quantize.calibrate_experts import ExpertCalibrator
from llmc.quantize.encode import quantize_blocks
from llmc.quantize.methods.gptq import quantize_gptq
from tests.models import build_tiny_model
from tests.quantize.reference import Array, scheme
from tests.state_store import StateStore

KIND = scheme(4, 32, True, "gptq")
ROUNDED = KIND.model_copy(update={"method": KIND.method.uncalibrated()})
WINDOWS = np.random.default_rng(0).integers(3, 250, (6, 48))
UP, DOWN = (f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))


def _run(model: Any, folder: Path) -> Calibration:
    layers = tuple(f"model.layers.{i}" for i in range(len(model.model.layers)))
    experts = {n: KIND for n, p in model.named_parameters() if p.ndim == 3}
    hollow = build_hollow(model.config)
    calibrator = Calibrator(hollow, layers, StateStore(model), {}, {}, np.float32, folder, experts=experts)
    return calibrator.run(WINDOWS, lambda _: None)


def _shrunk(rows: Array) -> Array:
    tokens, features = rows.shape
    hessian, share = rows.T @ rows, features / (features + tokens)
    return (1 - share) * hessian + share * np.diag(np.diag(hessian))


@pytest.mark.parametrize("spool", [1 << 28, 1 << 10])
def test_an_expert_is_quantized_by_its_own_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spool: int
) -> None:
    monkeypatch.setattr(calibrate_experts, "_SPOOL", spool)
    model = build_tiny_model("qwen3_moe")
    model.set_attn_implementation("eager")
    found = _run(model, tmp_path).experts
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    module = model.get_submodule("model.layers.0.mlp.experts")
    module.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    with torch.inference_mode():
        for row in WINDOWS:
            model(input_ids=torch.from_numpy(row[None]))
    states, chosen = (torch.cat(each) for each in zip(*seen, strict=True))
    for expert in range(4):
        rows = states[(chosen == expert).any(-1)].numpy()
        assert found.tokens[UP][expert] == len(rows) == found.tokens[DOWN][expert]
        weights = module.gate_up_proj[expert].detach().numpy()
        expected = quantize_gptq(weights, _shrunk(rows), KIND, np.float32, "w")
        blocks = found.blocks(UP, expert, (32, 64), 64)
        assert blocks is not None
        same = np.isclose(dequantize_blocks(blocks), dequantize_blocks(expected)[32:], atol=1e-4)
        assert same.mean() > 0.95  # sums in another order may turn a tie


def test_an_expert_with_few_tokens_is_rounded_without_them(tmp_path: Path) -> None:
    module = torch.nn.Module()
    generator = torch.Generator().manual_seed(0)
    module.w = torch.nn.Parameter(torch.randn(3, 8, 64, generator=generator), requires_grad=False)
    original = module.w.numpy().copy()
    calibrator = ExpertCalibrator({"layer.w": KIND}, np.float32, tmp_path)
    with calibrator.watch("layer", module):
        torch.nn.functional.linear(torch.randn(80, 64, generator=generator), module.w[0])
        torch.nn.functional.linear(torch.randn(3, 64, generator=generator), module.w[1])
    data = calibrator.conclude()
    assert list(data["layer.w.expert_tokens"]) == [80, 3, 0]
    assert {key for key in data if key.endswith("codes")} == {"layer.w.0.expert_codes"}
    for expert in (1, 2):
        rounded = dequantize_blocks(quantize_blocks(original[expert], ROUNDED, np.float32, "w"))
        assert np.array_equal(module.w[expert].numpy(), rounded)
    assert not np.array_equal(module.w[0].numpy(), original[0])


def test_a_note_says_how_many_tokens_experts_received(tmp_path: Path) -> None:
    model = build_tiny_model("mixtral")
    experts = _run(model, tmp_path).experts
    (note,) = experts.describe()
    assert note.startswith("experts: 24 of 24 matrices are calibrated, on ")
    (few,) = replace(experts, tokens={UP: np.array([500, 63])}).describe()
    assert few.startswith("experts: 1 of 2 matrices are calibrated, on 500 to 500 tokens each (median 500)")
    assert few.endswith("the others received fewer than 64 tokens, and are rounded without them")


def test_inputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    module = torch.nn.Module()
    module.w = torch.nn.Parameter(torch.ones(1, 4, 32), requires_grad=False)
    calibrator = ExpertCalibrator({"layer.w": KIND}, np.float32, tmp_path)
    rows: Array = np.full((64, 32), np.nan, np.float32)
    with calibrator.watch("layer", module):
        torch.nn.functional.linear(torch.from_numpy(rows), module.w[0])
    with pytest.raises(CheckpointError, match=r"inputs of layer\.w\[0\]"):
        calibrator.conclude()
