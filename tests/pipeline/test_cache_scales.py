"""Checkpoints for servers with a KV cache in fp8: what is written, declared, measured and refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmc.checkpoint.safetensors import SafetensorsStore
from llmc.config import BuildPlan, CacheType, CalibrationText, CheckpointFormat
from llmc.errors import UnsupportedError
from llmc.pipeline import build
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.caches import own_cache
from tests.models import save_tiny_model

TEXT = CalibrationText(window_tokens=32, max_windows=8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path_factory.getbasetemp() / "scales-cache"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16, tokenizer=True)


def plan(model: Path, output: Path, target: str) -> BuildPlan:
    """A build on a short calibration text."""
    planned = plan_build(str(model), target=target, profile="cpu-avx2", output=output, verify=False)
    assert planned.target.checkpoint is not None
    section = planned.target.checkpoint.model_copy(update={"calibration": TEXT})
    return planned.model_copy(update={"target": planned.target.model_copy(update={"checkpoint": section})})


def scales_of(folder: Path) -> dict[str, float]:
    store = SafetensorsStore.open(folder)
    names = [name for name in store.infos() if name.endswith((".k_scale", ".v_scale"))]
    return {name: float(np.asarray(store.read(name)).reshape(-1)[0]) for name in names}


def test_every_format_has_the_same_scales_under_its_names(llama: Path, tmp_path: Path) -> None:
    found = []
    for target, keys, values in (
        ("vllm-fp8-kv8", "k_scale", "v_scale"),
        ("modelopt-fp8-kv8", "k_proj.k_scale", "v_proj.v_scale"),
    ):
        build(plan(llama, tmp_path / target, target), SilentProgress())
        scales = scales_of(tmp_path / target)
        layers = [f"model.layers.{n}.self_attn" for n in range(3)]
        assert set(scales) == {f"{layer}.{part}" for layer in layers for part in (keys, values)}
        found.append([scales[f"{layer}.{part}"] for layer in layers for part in (keys, values)])
        declared = json.loads((tmp_path / target / "config.json").read_text())["quantization_config"]
        assert declared["kv_cache_scheme"]["num_bits"] == 8
    assert found[0] == found[1]
    assert len(set(found[0])) == 6


def test_scales_of_the_original_are_replaced(llama: Path, tmp_path: Path) -> None:
    """A checkpoint that a server had a cache in fp8 for has other scales, and maybe of other names."""
    source = tmp_path / "source"
    source.mkdir()
    for file in llama.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.k_scale"] = torch.tensor([7.0])
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(7.0)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    build(plan(source, tmp_path / "out", "vllm-fp8-kv8"), SilentProgress())
    scales = scales_of(tmp_path / "out")
    assert len(scales) == 6
    assert 7.0 not in scales.values()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache": "int8"}, "asks for a KV cache in int8"),
        ({"format": "awq"}, "format awq has no scales of a KV cache"),
    ],
)
def test_what_servers_do_not_read_is_refused(
    llama: Path, tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    planned = plan(llama, tmp_path / "out", "vllm-w4a16-g64")
    section = planned.target.checkpoint
    assert section is not None
    form = CheckpointFormat(changes.get("format", "compressed-tensors"))
    fields = {"kv_cache": CacheType(changes.get("kv_cache", "fp8"))}
    target = planned.target.model_copy(
        update={**fields, "checkpoint": section.model_copy(update={"format": form})}
    )
    with pytest.raises(UnsupportedError, match=message):
        build(planned.model_copy(update={"target": target}), SilentProgress())
    assert not (tmp_path / "out").exists()
