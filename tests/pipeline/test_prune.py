"""Pruning as a part of a build: what is left, what is refused, and that verify makes the same again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file, save_file

from llmc.artifact.manifest import PRUNING
from llmc.artifact.store.folder import open_artifact
from llmc.checkpoint import Checkpoint, open_checkpoint
from llmc.config import BuildPlan, CalibrationText, Gate, Metric, NeuronPruning, Pruning, Target
from llmc.errors import ConfigError, ParityError, UnsupportedError
from llmc.pipeline import build, inspect, verify
from llmc.pipeline.steps.prune import Pruned, prune
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.prune.sparse import is_sparse
from tests.caches import own_cache
from tests.models import EOS, save_tiny_model
from tests.notes import Notes

TEXT = CalibrationText(window_tokens=64, max_windows=8)
NEURONS = NeuronPruning(fraction=0.25, multiple=8)
REASON = "a tiny random model in float32"
GATES = tuple(
    Gate(metric=metric, max=1e-3, reason=REASON)
    for metric in (Metric.PREFILL_MAX_ABS, Metric.DECODE_MAX_ABS, Metric.CHUNKS_MAX_ABS)
)
SNR = Gate(metric=Metric.WEIGHTS_SNR, min=100, reason=REASON)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CACHE", own_cache(tmp_path_factory.mktemp("cache")))
        yield


def _plan(model: Path, output: Path, target: str = "cpu-fp32", **recipe: Any) -> BuildPlan:
    profile = "h100-sxm" if target.startswith("tensorrt") else "local"
    plan = plan_build(str(model), target=target, profile=profile, output=output)
    recipe = {"calibration": TEXT, "repair": True, **recipe}
    pruned = {"prune": Pruning.model_validate(recipe), "gates": (*GATES, SNR)}
    return plan.model_copy(update={"target": plan.target.model_copy(update=pruned)})


def _prune(folder: Path, model_type: str, decided: Any = None, **recipe: Any) -> tuple[Checkpoint, Pruned]:
    model = save_tiny_model(model_type, folder / model_type, tokenizer=True, eos_token_id=EOS)
    checkpoint = open_checkpoint(str(model))
    target = _plan(model, folder / "out", **recipe).target
    return checkpoint, prune(checkpoint, target, SilentProgress(), decided)


def _logits(model: Any) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = model(torch.arange(5, 45)[None]).logits.numpy()
    return logits


@pytest.mark.parametrize(("model_type", "groups"), [("qwen2", 1), ("phi3", 1), ("gpt_neox", 0)])
def test_units_that_are_gone_are_as_if_nothing_read_them(
    model_type: str, groups: int, tmp_path: Path
) -> None:
    checkpoint, made = _prune(tmp_path, model_type, mlp=NEURONS, kv_groups=groups, repair=False)
    assert made.record is not None
    assert made.record.neurons == (96, 72)
    before = checkpoint.fill_reference()
    for name, kept in made.decisions.items():
        weight = before.get_parameter(name)
        width = 1 if len(kept) == 72 else weight.shape[1] // 2
        mask = torch.zeros(weight.shape[1] // width, dtype=torch.bool)
        mask[torch.from_numpy(kept)] = True
        weight.mul_(mask.repeat_interleave(width))
    after = made.checkpoint.fill_reference()
    np.testing.assert_allclose(_logits(after), _logits(before), atol=2e-4)


def test_repair_brings_the_model_nearer(tmp_path: Path) -> None:
    checkpoint, plain = _prune(tmp_path, "llama", mlp=NEURONS, repair=False)
    _, repaired = _prune(tmp_path, "llama", mlp=NEURONS)
    original = _logits(checkpoint.fill_reference())
    errors = [np.abs(_logits(p.checkpoint.fill_reference()) - original).mean() for p in (plain, repaired)]
    assert errors[1] < errors[0]


def test_a_build_keeps_what_was_decided_and_verify_takes_it(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    output = tmp_path / "out"
    result = build(_plan(model, output, layers=1, mlp=NEURONS, kv_groups=1), SilentProgress())
    assert result.failure() is None, result.render()
    manifest = open_artifact(output).manifest
    told = manifest.pruned
    assert told is not None
    assert (len(told.dropped), told.layers, told.neurons, told.kv_groups) == (1, 3, (96, 72), (2, 1))
    assert told.parameters < 0.8 * manifest.model.parameters
    assert len(manifest.interface.cache) == 2
    assert told.render() in result.render()
    assert told.render() in inspect(str(output)).render()
    assert "nats per token" in (output / "reports/parity.json").read_text()
    assert "influence" in (output / "reports/pruning.json").read_text()
    assert verify(output, None, (), SilentProgress(), own_gates=True).failure() is None
    decided = load_file(output / PRUNING)
    assert set(decided) == {
        "layers",
        *(
            f"model.layers.{i}.{part}.weight"
            for i in (0, 1)
            for part in ("mlp.down_proj", "self_attn.o_proj")
        ),
    }
    name = "model.layers.0.mlp.down_proj.weight"
    gone = np.setdiff1d(np.arange(96), decided[name])
    decided[name] = np.sort(np.append(decided[name][1:], gone[0]))
    save_file(decided, output / PRUNING)
    assert "weights.snr_db" in str(
        verify(output, None, (), SilentProgress(), own_gates=True, every=True).failure()
    )
    save_file({k: v for k, v in decided.items() if k != "layers"}, output / PRUNING)
    with pytest.raises(ParityError, match="the artifact does not say which 2 of 3 layers stay"):
        verify(output, None, (), SilentProgress(), own_gates=True, every=True)


def test_decisions_of_another_machine_are_taken_as_they_are(tmp_path: Path) -> None:
    _, first = _prune(tmp_path, "llama", mlp=NEURONS)
    decided = dict(first.decisions)
    name = "model.layers.2.mlp.down_proj.weight"
    decided[name] = np.arange(72)
    _, again = _prune(tmp_path, "llama", decided, mlp=NEURONS)
    assert {n: kept.tolist() for n, kept in again.decisions.items()} == {
        n: kept.tolist() for n, kept in decided.items()
    }
    up = "model.layers.2.mlp.up_proj.weight"
    assert (again.checkpoint.tensors.read(up) == first.checkpoint.tensors.inner.read(up)[:72]).all()  # type: ignore[attr-defined]


def test_weights_of_an_engine_are_sparse(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model", tokenizer=True, eos_token_id=EOS)
    plan = _plan(model, tmp_path / "out", "tensorrt-fp16", sparsity="2:4")
    assert plan.target.engine is not None
    sizes = {"kv_capacity": 128, "prefill": {"least": 1, "typical": 16, "most": 64}}
    engine = plan.target.engine.model_validate({**plan.target.engine.model_dump(), **sizes})
    target = plan.target.model_copy(update={"engine": engine})
    notes = Notes()
    result = build(plan.model_copy(update={"target": target}), notes)
    assert result.failure() is None, result.render()
    assert result.manifest.pruned is not None
    assert result.manifest.pruned.sparse == 21
    weights = [
        v.const_value.numpy()
        for v in ir.load(tmp_path / "out/model.onnx").graph.initializers.values()
        if v.const_value is not None and "_proj" in str(v.name)
    ]
    assert len(weights) == 21
    assert all(is_sparse(w) or is_sparse(w.T) for w in weights)


@pytest.mark.parametrize(
    ("model_type", "recipe", "error", "message"),
    [
        ("llama", {"layers": 3}, ConfigError, "3 layers are to be dropped, but the model has 3"),
        (
            "llama",
            {"kv_groups": 2},
            ConfigError,
            "2 heads of keys and values are to be dropped, but each layer has 2",
        ),
        (
            "llama",
            {"mlp": NeuronPruning(fraction=0.8, multiple=64)},
            ConfigError,
            "of 96 neurons without a fraction of 0.8, in multiples of 64, nothing would be left",
        ),
        (
            "llama",
            {"mlp": NeuronPruning(fraction=0.01, multiple=32)},
            ConfigError,
            "in multiples of 32, all would be left",
        ),
        (
            "mixtral",
            {"mlp": NEURONS},
            UnsupportedError,
            "layer 0 has 0 projections whose neurons can be separated",
        ),
        (
            "gpt_neox",
            {"kv_groups": 1},
            UnsupportedError,
            r"gpt_neox config cannot state the pruned model: .*\(192, 64\) by the config, but \(144, 64\)",
        ),
        (
            "llama",
            {"layers": 1, "calibration": CalibrationText(window_tokens=64, max_windows=2)},
            ConfigError,
            "the calibration text has 128 tokens; at least 256",
        ),
    ],
)
def test_what_cannot_be_pruned_says_why(
    model_type: str, recipe: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        _prune(tmp_path, model_type, **recipe)


def test_a_target_prunes_something_that_its_backend_can_use() -> None:
    with pytest.raises(ValueError, match="give at least one of layers, mlp, kv_groups and sparsity"):
        Pruning(calibration=TEXT, repair=True)
    plan = plan_build("demo", target="cpu-fp32", profile="local")
    sparse = {"prune": {"calibration": TEXT.model_dump(), "repair": True, "sparsity": "2:4"}}
    with pytest.raises(ValueError, match="backend onnxruntime has no kernels for sparsity 2:4"):
        Target.model_validate({**plan.target.model_dump(mode="python"), **sparse})
