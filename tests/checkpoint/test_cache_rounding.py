"""Rounding of keys and values by the scales of a folder, and what damaged scales do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.cache_rounding import CacheRounding
from llmc.checkpoint.served import LoadedFolder, load_served
from tests.models import save_tiny_model

IDS = torch.from_numpy(np.random.default_rng(0).integers(3, 250, (1, 40)))
NAMES = {"compressed-tensors": ("k_scale", "v_scale"), "modelopt": ("k_proj.k_scale", "v_proj.v_scale")}
Scales = dict[int, tuple[float, float]]


def fp8_folder(folder: Path, form: str, scales: Scales) -> Path:
    """A llama whose down projection of layer 0 is in fp8, with a cache in fp8."""
    save_tiny_model("llama", folder, dtype=torch.float32, tokenizer=True)
    tensors = load_file(folder / "model.safetensors")
    module = "model.layers.0.mlp.down_proj"
    weight = tensors.pop(f"{module}.weight")
    scale = weight.abs().max() / 448
    tensors[f"{module}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
    flat = form == "compressed-tensors"
    tensors[f"{module}.weight_scale"] = scale.reshape(1) if flat else scale
    for layer, pair in scales.items():
        for name, value in zip(NAMES[form], pair, strict=True):
            tensor = torch.tensor([value] if flat else value)
            tensors[f"model.layers.{layer}.self_attn.{name}"] = tensor
    if not flat:
        tensors[f"{module}.input_scale"] = torch.tensor(0.01)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    if flat:
        group = {"targets": [module], "weights": fp8, "format": "float-quantized"}
        declared: dict[str, Any] = {"config_groups": {"group_0": group}, "format": "float-quantized"}
        declared |= {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
        declared |= {"ignore": ["lm_head"], "kv_cache_scheme": fp8}
    else:
        cache = {"dynamic": False, "num_bits": 8, "type": "float"}
        declared = {"quant_algo": "FP8", "quant_method": "modelopt", "kv_cache_scheme": cache}
        declared["ignore"] = [
            name.removesuffix(".weight")
            for name, each in tensors.items()
            if name.endswith(".weight") and each.ndim == 2 and module not in name and "embed" not in name
        ]
    fields["quantization_config"] = declared
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def load(folder: Path, *, rounded: bool) -> LoadedFolder:
    checkpoint = open_checkpoint(str(folder))
    return load_served(checkpoint, quantize_activations=False, quantize_cache=rounded)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def peaks_of(folder: Path) -> Scales:
    cache = DynamicCache()
    with torch.inference_mode():
        load(folder, rounded=False).model(input_ids=IDS, cache=cache, use_cache=True)
    pairs = [(float(each.keys.abs().max()), float(each.values.abs().max())) for each in cache.layers]
    return dict(enumerate(pairs))


@pytest.mark.parametrize("form", NAMES)
def test_what_is_stored_is_rounded_by_the_scales_of_its_layer(form: str, tmp_path: Path) -> None:
    scales = {0: (0.01, 0.02), 1: (0.015, 0.0125), 2: (0.02, 0.01)}
    folder = fp8_folder(tmp_path, form, scales)
    loaded = load(folder, rounded=True)
    assert loaded.cache is not None
    assert loaded.cache.scales == {n: pytest.approx(pair) for n, pair in scales.items()}
    assert "llmc rounds keys and values of 3 layers to fp8" in loaded.note
    assert not loaded.problems
    cache = DynamicCache()
    with torch.inference_mode():
        once = loaded.model(input_ids=IDS, cache=cache, use_cache=True).logits
    for number, layer in enumerate(cache.layers):
        for tensor, scale in zip((layer.keys, layer.values), scales[number], strict=True):
            codes = tensor / np.float32(scale)
            assert torch.allclose(codes, codes.to(torch.float8_e4m3fn).float(), rtol=1e-6)
    plain = logits(load(folder, rounded=False).model)
    apart = float((once - plain).abs().max())
    assert apart > 1e-5
    assert torch.allclose(logits(loaded.model), once, atol=1e-5)  # without a cache of the caller's own


def test_damaged_scales_are_seen_by_the_values_of_a_text(tmp_path: Path) -> None:
    folder = fp8_folder(tmp_path, "compressed-tensors", dict.fromkeys(range(3), (1.0, 1.0)))
    right = {n: (keys / 448, values / 448) for n, (keys, values) in peaks_of(folder).items()}
    loaded = load(folder, rounded=True)
    assert loaded.cache is not None

    def worst(scales: Scales) -> float:
        assert loaded.cache is not None
        loaded.cache.scales, loaded.cache.peaks = scales, {}
        logits(loaded.model)
        return max(loaded.cache.ratios().values())

    assert worst(right) < 1.2
    for damage in (0.5, 2.0):
        assert worst(right | {1: (right[1][0] * damage, right[1][1])}) > 1.7
    assert worst({n: pair for n, pair in right.items() if n != 1}) > 10  # 1 in its place


def test_missing_scales_are_problems(tmp_path: Path) -> None:
    folder = fp8_folder(tmp_path, "modelopt", {0: (0.01, 0.01), 1: (0.01, 0.01)})
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.v_proj.v_scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder, rounded=True).problems == (
        "the folder has no model.layers.0.self_attn.v_proj.v_scale, for which servers take 1",
        "the folder has no scales of the KV cache of layer 2",
    )


def test_a_scale_of_1_is_used_for_a_layer_without() -> None:
    keys = torch.tensor([[[[500.0, 1.03]]]])
    first, _ = CacheRounding({}).round(0, keys, keys)
    assert first.flatten().tolist() == [448.0, 1.0]
