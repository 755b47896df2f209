"""Experts in checkpoints for servers: what they read is calibrated, and what servers join shares a scale."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.served import load_served
from llmc.config import EngineRule, EngineScheme, WeightFormat
from llmc.errors import UnsupportedError
from llmc.plan import plan_build
from llmc.quantize.rounding import fake_quantize
from tests.caches import own_cache
from tests.models import save_tiny_model
from tests.pipeline.test_checkpoint_build import build_folder, tensors_of

EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path_factory.getbasetemp() / "experts-cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of four experts a layer."""
    folder = tmp_path_factory.mktemp("experts")
    return save_tiny_model("qwen3_moe", folder, dtype=torch.bfloat16, tokenizer=True)


def _build(model: Path, output: Path, target: str, rules: tuple[EngineRule, ...] = ()) -> Path:
    planned = plan_build(str(model), target=target, profile="cpu-avx2", output=output, verify=False)
    section = planned.target.checkpoint
    assert section is not None
    text = None if section.calibration is None else section.calibration.model_copy(update={"max_windows": 2})
    changed = section.model_copy(update={"calibration": text, "weights": (*rules, *section.weights)})
    return build_folder(
        planned.model_copy(update={"target": planned.target.model_copy(update={"checkpoint": changed})})
    )


def _scalars(folder: Path, part: str, layer: str = EXPERTS) -> dict[str, float]:
    stored = tensors_of(folder)
    names = [name for name in stored.infos() if name.startswith(layer) and name.endswith(f".{part}")]
    return {name: float(np.asarray(stored.read(name)).reshape(-1)[0]) for name in names}


def _snr(folder: Path, model: Path, name: str) -> float:
    was, now = (open_checkpoint(str(each)).tensors.read(name).astype(np.float64) for each in (model, folder))
    return float(10 * np.log10(np.square(was).sum() / np.square(was - now).sum()))


@pytest.mark.parametrize(
    ("target", "whole", "given", "least"),
    [
        ("modelopt-nvfp4", "weight_scale_2", "input_scale", 18),
        ("modelopt-fp8", "weight_scale", "input_scale", 28),
        ("vllm-nvfp4", "weight_global_scale", "input_global_scale", 18),
    ],
)
def test_what_servers_join_has_one_scale(
    model: Path, tmp_path: Path, target: str, whole: str, given: str, least: float
) -> None:
    folder = _build(model, tmp_path / "out", target)
    scales = _scalars(folder, whole)
    for expert in range(4):
        gate, up = (scales[f"{EXPERTS}.{expert}.{each}_proj.{whole}"] for each in ("gate", "up"))
        assert gate == up
    inputs = _scalars(folder, given)
    assert len({value for name, value in inputs.items() if "down" in name}) == 1
    assert len({value for name, value in inputs.items() if "down" not in name}) == 1
    assert len(set(inputs.values())) == 2
    for name in ("gate_up_proj", "down_proj"):
        assert _snr(folder, model, f"{EXPERTS}.{name}") > least


@pytest.mark.parametrize("target", ["modelopt-nvfp4", "vllm-nvfp4", "vllm-w8a8"])
def test_the_gate_rounds_what_experts_read(model: Path, tmp_path: Path, target: str) -> None:
    checkpoint = open_checkpoint(str(_build(model, tmp_path / "out", target)))
    exact, rounded = (
        load_served(checkpoint, quantize_activations=quantized).model for quantized in (False, True)
    )
    module = rounded.get_submodule(EXPERTS)
    plain = exact.get_submodule(EXPERTS)
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    chosen = torch.full((5, 1), 2)
    weights = torch.ones(5, 1)
    with torch.inference_mode():
        found, unrounded = (each(rows, chosen, weights) for each in (module, plain))
    whole = _scalars(checkpoint.path, "input_scale")
    whole |= {k: 1 / v for k, v in _scalars(checkpoint.path, "input_global_scale").items()}
    scales = {name.rpartition(".")[0]: value for name, value in whole.items()}

    def product(x: torch.Tensor, name: str, matrix: str) -> Any:
        weight = torch.from_numpy(checkpoint.tensors.read(f"{EXPERTS}.{name}")[2].astype(np.float32))
        if target == "vllm-w8a8":
            scale = x.abs().amax(-1, keepdim=True) / 127
            return (x / scale).round() * scale @ weight.T
        peak = scales[f"{EXPERTS}.2.{matrix}"] * 6 * 448
        return fake_quantize(x, WeightFormat.NVFP4, peak) @ weight.T

    gate, up = product(rows, "gate_up_proj", "gate_proj").chunk(2, -1)
    expected = product(torch.nn.functional.silu(gate) * up, "down_proj", "down_proj")
    error, moved = ((each - expected).square().mean() for each in (found, unrounded))
    assert error < 0.02 * moved  # a code on a tie may fall the other way


def test_stacks_of_a_layer_need_one_scheme(model: Path, tmp_path: Path) -> None:
    other = EngineRule(match="*experts.down_proj", scheme=EngineScheme(format="fp8", activations="dynamic"))
    with pytest.raises(UnsupportedError, match=r"compute .*gate_up_proj and .*down_proj by one method"):
        _build(model, tmp_path / "out", "vllm-w8a8", rules=(other,))
