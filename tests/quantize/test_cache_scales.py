"""Scales of a KV cache: the peaks of what layers store, against the cache of the whole model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from llmc.arrays import Array
from llmc.checkpoint.skeleton import build_hollow
from llmc.config import Dtype
from llmc.errors import CheckpointError, UnsupportedError
from llmc.graph.model import Graph
from llmc.graph.serial import load_graph
from llmc.quantize.cache_scales import (
    CachePeaks,
    CacheWalk,
    cache_scale_of,
    cache_scales,
    mark_cache,
    plan_cache,
)
from tests.caches import shared_trace
from tests.models import build_tiny_model
from tests.state_store import StateStore

WINDOWS = np.random.default_rng(0).integers(3, 250, (6, 48))


def _walk(model: Any, folder: Path, windows: Array = WINDOWS) -> dict[int, CachePeaks]:
    layers = tuple(f"model.layers.{i}" for i in range(model.config.num_hidden_layers))
    walk = CacheWalk(build_hollow(model.config), layers, StateStore(model), {}, folder)
    return walk.run_peaks(windows, lambda _: None)


def _graph(model_type: str) -> tuple[Graph, Any]:
    config = build_tiny_model(model_type).config
    return load_graph(shared_trace(config, Dtype.FLOAT32)), config


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_peaks_are_those_of_the_cache_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    model = build_tiny_model(model_type).eval()
    expected: dict[int, list[float]] = {}
    with torch.inference_mode():
        for row in WINDOWS:
            cache = DynamicCache()
            model(input_ids=torch.from_numpy(row[None]), cache=cache, use_cache=True)
            for number, layer in enumerate(cache.layers):
                seen = expected.setdefault(number, [0.0, 0.0])
                found = [float(each.abs().max()) for each in (layer.keys, layer.values)]
                expected[number] = [max(pair) for pair in zip(seen, found, strict=True)]
    peaks = _walk(model, tmp_path)
    assert list(peaks) == list(expected)
    for number, (keys, values) in expected.items():
        assert peaks[number].keys == pytest.approx(keys, rel=1e-5)
        assert peaks[number].values == pytest.approx(values, rel=1e-5)
    assert _walk(model, tmp_path) == peaks  # from the files


def test_keys_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.k_proj.weight")[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="layer 1 has keys on the calibration text that are not all"):
        _walk(model, tmp_path)


def test_one_window_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = build_tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[255] = torch.nan
    windows = WINDOWS.copy()
    windows[0, 5] = 255
    with pytest.raises(CheckpointError, match="layer 0 has keys on the calibration text that are not all"):
        _walk(model, tmp_path, windows)


def test_scales_span_the_peak_with_8_significant_bits() -> None:
    for peak in np.random.default_rng(0).uniform(1e-3, 400, 50):
        scale = cache_scale_of(peak)
        assert 1 <= 448 * scale / peak < 1 + 2**-7
        assert scale == float(torch.tensor(scale).bfloat16()) == float(torch.tensor(scale).half())
    assert cache_scale_of(0.0) == 1


def test_each_layer_with_a_cache_has_scales_at_its_attention() -> None:
    graph, config = _graph("phi3")
    mark_cache(graph, config, {n: CachePeaks(448.0 * (n + 1), 224.0) for n in range(3)})
    found = [(each.module, each.keys, each.values) for each in cache_scales(graph)]
    assert found == [(f"model.layers.{n}.self_attn", n + 1, 0.5) for n in range(3)]
    with pytest.raises(UnsupportedError, match="layer 2 stored no keys and values"):
        mark_cache(graph, config, {n: CachePeaks(1.0, 1.0) for n in range(2)})


def test_layers_with_states_have_none() -> None:
    graph, config = _graph("qwen3_next")
    layers = [number for number, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert list(plan_cache(graph, config)) == layers
    assert len(layers) < config.num_hidden_layers


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("deepseek_v2", "the model has latent attention"),
        ("mamba", "the model has no KV cache"),
        ("gemma3n_text", "layer 4 reads the keys and values that layer 2 stores"),
    ],
)
def test_caches_without_scales_of_their_own_are_refused(model_type: str, message: str) -> None:
    graph, config = _graph(model_type)
    with pytest.raises(UnsupportedError, match=message):
        plan_cache(graph, config)
