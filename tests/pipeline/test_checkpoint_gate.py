"""Checkpoints for servers are read back twice, and each that was broken on purpose misses the right check."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from llmc.artifact.verdict import CheckStatus, Measurement
from llmc.config import Gate, Metric
from llmc.errors import UnsupportedError
from llmc.pipeline import bench, bisect, build, inspect
from llmc.pipeline import run as run_artifact
from llmc.pipeline import verify as verify_artifact
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.caches import own_cache
from tests.models import save_tiny_model

from .sabotage import copy_artifact, reseal
from .sabotage_checkpoint import (
    FILE,
    Tensors,
    add,
    add_old,
    config,
    exchange,
    flip,
    other_theta,
    other_tokenizer,
    rename,
    scale,
    swap,
    tensors,
    truncate,
)

M = Metric
TEXT = "The river bends twice before the mill; a compiler reads a model and writes a program. " * 40
#: A random model of two layers loses more to few bits than the targets allow a trained one.
LOOSE = (M.TEXT_KL_MEAN, M.TEXT_TOP1, M.TEXT_KL_RATIO, M.WEIGHTS_BLOCK_SNR, M.CACHE_KL_MEAN, M.CACHE_KL_MAX)
TARGETS = (
    *("vllm-w4a16", "vllm-w8a8", "vllm-nvfp4", "gptq-int4", "awq-int4", "modelopt-nvfp4"),
    *("vllm-fp8-kv8", "modelopt-fp8-kv8"),
)
#: Targets of a mixture of experts, by the name of the artifact.
MIXTURES = {"experts": "vllm-w4a16", "experts-nvfp4": "modelopt-nvfp4"}
ATTENTION = "model.layers.1.self_attn."
MLP = "model.layers.0.mlp."

verify = partial(verify_artifact, own_gates=True, budget=4.0, seed=0)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """One model of two layers for every target."""
    root, threads = tmp_path_factory.mktemp("checkpoints"), torch.get_num_threads()
    torch.set_num_threads(1)
    (root / "text").write_text(TEXT, encoding="utf-8")
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "head_dim": 32,
        "num_hidden_layers": 2,
        "layer_types": None,
        "max_position_embeddings": 192,
    }
    model = save_tiny_model("llama", root / "model", dtype=torch.bfloat16, tokenizer=True, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CACHE", own_cache(root / "cache"))
        sizes |= {"moe_intermediate_size": 128, "mlp_only_layers": []}
        mixture = save_tiny_model("qwen3_moe", root / "moe", dtype=torch.bfloat16, tokenizer=True, **sizes)
        built = {}
        for name, source in {**dict.fromkeys(TARGETS, model), **dict.fromkeys(MIXTURES, mixture)}.items():
            plan = plan_build(
                str(source),
                target=MIXTURES.get(name, name),
                profile="local",
                output=root / name,
                verify=False,
            )
            gates: list[Gate] = [gate for gate in plan.target.gates if gate.metric not in LOOSE]
            target = plan.target.model_copy(update={"gates": tuple(gates)})
            built[name] = build(plan.model_copy(update={"target": target}), SilentProgress()).path
        yield built
    torch.set_num_threads(threads)


def measure(
    folder: Path, artifacts: dict[str, Path], *, every: bool = False
) -> tuple[dict[Metric, CheckStatus], dict[Metric, Measurement]]:
    text = artifacts["vllm-w4a16"].parent / "text"
    report = verify(folder, None, (str(text),), SilentProgress(), every=every).report
    checks = {check.metric: check.status for check in report.verdict.checks}
    return checks, {each.metric: each for each in report.measurements}


@pytest.mark.parametrize("name", TARGETS)
def test_a_good_checkpoint_passes(name: str, artifacts: dict[str, Path]) -> None:
    checks, found = measure(artifacts[name], artifacts)
    missed = {m for m, status in checks.items() if status in (CheckStatus.FAIL, CheckStatus.NOT_MEASURED)}
    assert missed == set()
    assert found[M.WEIGHTS_EXACT].detail.endswith("tensors of the files equal those of a build, bit for bit")
    assert found[M.GRAPH].detail == "a checkpoint has no graph"
    where = found[M.PREFILL_MAX_ABS].where
    assert where.startswith("transformers 5.")
    assert ("compressed-tensors 0." in where) == name.startswith("vllm")
    assert ("has no reader of" in where) != name.startswith("vllm")
    largest = found[M.PREFILL_MAX_ABS].value
    assert largest is not None
    assert largest < 1e-4
    assert (M.CACHE_SCALE_RATIO in checks) == name.endswith("kv8")
    if name.endswith("kv8"):
        assert found[M.CACHE_SCALE_RATIO].detail.startswith("scales of 2 layers")
        assert (found[M.CACHE_KL_MEAN].value or 0) > 0


@pytest.mark.parametrize("name", MIXTURES)
def test_a_good_mixture_of_experts_passes(name: str, artifacts: dict[str, Path]) -> None:
    checks, found = measure(artifacts[name], artifacts)
    missed = {m for m, status in checks.items() if status in (CheckStatus.FAIL, CheckStatus.NOT_MEASURED)}
    assert missed == set()
    assert found[M.WEIGHTS_EXACT].detail.endswith("tensors of the files equal those of a build, bit for bit")
    where = found[M.PREFILL_MAX_ABS].where
    assert "with the weights that llmc reads" in where


def test_a_model_that_does_not_fit_is_read_layer_by_layer(
    artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(artifacts["modelopt-nvfp4"], artifacts)[1]
    monkeypatch.setattr("llmc.pipeline.steps.folder.is_large", lambda _: True)
    checks, found = measure(artifacts["modelopt-nvfp4"], artifacts)
    assert CheckStatus.FAIL not in checks.values()
    assert "layer by layer with the weights that llmc reads" in found[M.PREFILL_MAX_ABS].where
    assert "each text in one pass" in found[M.DECODE_MAX_ABS].where
    assert found[M.TEXT_KL_MEAN].value == pytest.approx(whole[M.TEXT_KL_MEAN].value, rel=1e-3)


@dataclass(frozen=True)
class Fault:
    """A change of a good checkpoint, and the first check that it misses.

    Args:
        target: The target of the checkpoint.
        apply: Changes the folder.
        metric: The check.
        said: Words of its detail.
    """

    target: str
    apply: Callable[[Path], None]
    metric: Metric
    said: str


SCALE = f"{MLP}up_proj.weight_scale"
EXPERTS = f"{MLP}experts"
GROUP = ("config_groups", "group_0", "weights")
FAULTS = {
    "scales off by 2 %": Fault("vllm-w4a16", tensors(scale(SCALE, 1.02)), M.WEIGHTS_EXACT, SCALE),
    "one packed word": Fault(
        "vllm-w4a16",
        tensors(flip(f"{ATTENTION}q_proj.weight_packed", 1 << 9)),
        M.WEIGHTS_EXACT,
        "differs in 1 of",
    ),
    "zero points off by one": Fault(
        "gptq-int4", tensors(flip(f"{ATTENTION}k_proj.qzeros", 1)), M.WEIGHTS_EXACT, "qzeros differs in 1 of"
    ),
    "an expert's scale off by 2 %": Fault(
        "experts",
        tensors(scale(f"{EXPERTS}.2.down_proj.weight_scale", 1.02)),
        M.WEIGHTS_EXACT,
        "experts.2.down_proj.weight_scale differs",
    ),
    "two experts swapped": Fault(
        "experts",
        tensors(swap(f"{EXPERTS}.1", f"{EXPERTS}.3")),
        M.WEIGHTS_EXACT,
        "experts.1.down_proj.weight_packed differs",
    ),
    "gate and up of an expert swapped": Fault(
        "experts-nvfp4",
        tensors(swap(f"{EXPERTS}.0.gate_proj", f"{EXPERTS}.0.up_proj")),
        M.WEIGHTS_EXACT,
        "experts.0.gate_proj.weight differs",
    ),
    "an expert's input scale": Fault(
        "experts-nvfp4",
        tensors(scale(f"{EXPERTS}.3.up_proj.input_scale", 1.02)),
        M.WEIGHTS_EXACT,
        "experts.3.up_proj.input_scale differs",
    ),
    "a word of awq": Fault(
        "awq-int4", tensors(flip(f"{MLP}down_proj.qweight", 4)), M.WEIGHTS_EXACT, "qweight differs in 1 of"
    ),
    "a byte of nvfp4": Fault(
        "modelopt-nvfp4",
        tensors(flip(f"{MLP}down_proj.weight", 4)),
        M.WEIGHTS_EXACT,
        "weight differs in 1 of",
    ),
    "the scale of keys": Fault(
        "vllm-fp8-kv8",
        tensors(scale(f"{ATTENTION}k_scale", 1.02)),
        M.WEIGHTS_EXACT,
        f"{ATTENTION}k_scale differs",
    ),
    "keys and values swapped": Fault(
        "vllm-fp8-kv8",
        tensors(exchange(f"{ATTENTION}k_scale", f"{ATTENTION}v_scale")),
        M.WEIGHTS_EXACT,
        f"{ATTENTION}k_scale differs",
    ),
    "scales of another layer": Fault(
        "modelopt-fp8-kv8",
        tensors(exchange(f"{ATTENTION}k_proj.k_scale", "model.layers.0.self_attn.k_proj.k_scale")),
        M.WEIGHTS_EXACT,
        "self_attn.k_proj.k_scale differs",
    ),
    "no scale of values": Fault(
        "modelopt-fp8-kv8",
        tensors(lambda stored: stored.pop(f"{ATTENTION}v_proj.v_scale")),
        M.WEIGHTS_EXACT,
        f"{ATTENTION}v_proj.v_scale is missing",
    ),
    "no declaration of the cache": Fault(
        "vllm-fp8-kv8", config("kv_cache_scheme", value=None), M.SERVING, "kv_cache_scheme"
    ),
    "an input scale": Fault(
        "modelopt-fp8-kv8",
        tensors(scale(f"{MLP}down_proj.input_scale", 1.02)),
        M.WEIGHTS_EXACT,
        "input_scale differs",
    ),
    "layers swapped": Fault(
        "vllm-w4a16",
        tensors(swap("model.layers.0.self_attn.o_proj", f"{ATTENTION}o_proj")),
        M.WEIGHTS_EXACT,
        "o_proj.weight_packed differs",
    ),
    "a norm removed": Fault(
        "vllm-w8a8", tensors(lambda stored: stored.pop("model.norm.weight")), M.WEIGHTS_EXACT, "is missing"
    ),
    "a tensor added": Fault("vllm-w4a16", tensors(add), M.WEIGHTS_EXACT, "is not written by a build"),
    "a tensor renamed": Fault(
        "vllm-w4a16", tensors(rename(SCALE, f"{SCALE}s")), M.WEIGHTS_EXACT, f"{SCALE} is missing"
    ),
    "a truncated file": Fault("vllm-w4a16", truncate, M.WEIGHTS_EXACT, FILE),
    **{
        f"{name} of an earlier folder": Fault(
            "vllm-w8a8", add_old(name), M.WEIGHTS_EXACT, f"{name} is not written by a build"
        )
        for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors")
    },
    "another group size": Fault(
        "vllm-w4a16",
        config(*GROUP, "group_size", value=64),
        M.SERVING,
        "group_size is 64, but 128 in a build",
    ),
    "another symmetry": Fault(
        "vllm-w4a16",
        config(*GROUP, "symmetric", value=False),
        M.SERVING,
        "symmetric is false, but true in a build",
    ),
    "nothing ignored": Fault("vllm-w4a16", config("ignore", value=[]), M.SERVING, "ignore"),
    "other bits": Fault("gptq-int4", config("bits", value=8), M.SERVING, "bits is 8, but 4 in a build"),
    "another rotary base": Fault("gptq-int4", other_theta, M.SERVING, "rope_theta"),
    "another tokenizer": Fault("awq-int4", other_tokenizer, M.TOKENIZER_EQUAL, ""),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_a_broken_checkpoint_misses_the_right_check(
    fault: Fault, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_artifact(artifacts[fault.target], tmp_path / "broken")
    fault.apply(folder)
    reseal(folder)
    checks, found = measure(folder, artifacts)
    assert checks[fault.metric] is CheckStatus.FAIL
    assert fault.said in found[fault.metric].detail


#: Faults that a verification without the build's calibration finds by value.
UNSEEN = {
    "scales off by 2 %": (M.WEIGHTS_EXACT, "has a gain of 1.0"),
    "layers swapped": (M.WEIGHTS_EXACT, "has a gain of"),
    "two experts swapped": (M.WEIGHTS_EXACT, "experts"),
    "an input scale": (M.WEIGHTS_EXACT, "input_scale differs"),
    "no scale of values": (M.WEIGHTS_EXACT, "v_proj.v_scale is missing"),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_faults_of_codes_that_calibration_decided(
    name: str, artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine does not have what calibration observed."""
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    folder = copy_artifact(artifacts[FAULTS[name].target], tmp_path / "broken")
    FAULTS[name].apply(folder)
    reseal(folder)
    checks, found = measure(folder, artifacts)
    metric, said = UNSEEN[name]
    assert checks[metric] is CheckStatus.FAIL
    assert said in found[metric].detail


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_cache_scale_far_off_without_the_calibration(
    factor: float, artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    folder = copy_artifact(artifacts["vllm-fp8-kv8"], tmp_path / "broken")
    tensors(scale(f"{ATTENTION}v_scale", factor))(folder)
    reseal(folder)
    checks, found = measure(folder, artifacts)
    assert checks[M.WEIGHTS_EXACT] is CheckStatus.PASS
    assert checks[M.CACHE_SCALE_RATIO] is CheckStatus.FAIL
    assert "the worst: values of layer 1" in found[M.CACHE_SCALE_RATIO].detail


def test_zero_points_off_by_one_without_the_calibration(
    artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers of symmetric codes may not look at zero points, but calibration does not decide them."""
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))

    def lower(stored: Tensors) -> None:
        for name in [name for name in stored if name.endswith(".qzeros")]:
            stored[name] += 0x11111111

    folder = copy_artifact(artifacts["gptq-int4"], tmp_path / "broken")
    tensors(lower)(folder)
    reseal(folder)
    checks, found = measure(folder, artifacts)
    assert checks[M.WEIGHTS_EXACT] is CheckStatus.FAIL
    assert ".qzeros differs in" in found[M.WEIGHTS_EXACT].detail


def test_what_the_loader_does_not_use_is_named(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """A folder that says too little is read by transformers' loader in another way than by llmc's."""
    folder = copy_artifact(artifacts["vllm-w8a8"], tmp_path / "broken")
    config("ignore", value=["lm_head", "model.layers.0.mlp.up_proj"])(folder)
    reseal(folder)
    checks, found = measure(folder, artifacts, every=True)
    missed = {metric for metric, status in checks.items() if status is CheckStatus.FAIL}
    assert {M.SERVING, M.INTERFACE, M.PREFILL_MAX_ABS} <= missed
    assert "transformers does not read model.layers.0.mlp.up_proj.weight_scale" in found[M.INTERFACE].detail


def test_a_folder_that_transformers_cannot_load(artifacts: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_artifact(artifacts["vllm-w4a16"], tmp_path / "broken")
    config(*GROUP, "symmetric", value=False)(folder)
    reseal(folder)
    checks, found = measure(folder, artifacts, every=True)
    assert checks[M.INTERFACE] is CheckStatus.FAIL
    assert found[M.INTERFACE].detail.startswith("transformers cannot load")


def test_commands_on_a_checkpoint(artifacts: dict[str, Path]) -> None:
    path = artifacts["vllm-w4a16"]
    pieces: list[str] = []
    result = run_artifact(path, "the river", 5, pieces.append, SilentProgress())
    assert 0 < result.tokens <= 5
    assert "".join(pieces) == result.text
    with pytest.raises(UnsupportedError, match="drafts are for artifacts that onnxruntime-genai serves"):
        run_artifact(path, "the river", 5, pieces.append, SilentProgress(), 4)
    with pytest.raises(UnsupportedError, match="llmc bench times a graph, but"):
        bench(path, None, SilentProgress())
    with pytest.raises(UnsupportedError, match="llmc bisect compares the values of a graph"):
        bisect(path, None, SilentProgress())
    inspection = inspect(str(path))
    assert inspection.operators == {}
    assert "operators" not in inspection.render()
