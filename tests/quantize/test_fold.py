"""Scaling the channels of activations: where it is possible, and that nothing changes by it."""

from pathlib import Path

import numpy as np
import pytest

from llmc.backends.model_file import write_model
from llmc.config import Dtype
from llmc.graph.verify import verify_graph
from llmc.quantize.fold import find_shared_inputs, scale_channels
from llmc.runtime.static_ort_model import StaticOrtModel
from tests.lowering import lower

IDS = np.arange(3, 20)[None]


def _foldable(model_type: str) -> list[str]:
    """Of the first layer and the head, the first weight that reads each activation which can be scaled."""
    graph, _ = lower(model_type, Dtype.FLOAT32, "pack-shared")
    shared = [s for s in find_shared_inputs(graph) if s.factors]
    names = [s.sources[0].removesuffix(".weight") for s in shared]
    return [n.split(".", 3)[3] if ".0." in n else n for n in names if ".0." in n or "layers" not in n]


@pytest.mark.parametrize(
    ("model_type", "wanted"),
    [
        ("llama", ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj", "lm_head"]),
        ("phi3", ["self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj", "lm_head"]),
        ("opt", ["0.self_attn.q_proj", "0.fc1"]),  # no gate; tied head
        ("olmo2", ["mlp.down_proj", "lm_head"]),  # its norms stand behind the products
    ],
)
def test_where_channels_can_be_scaled(model_type: str, wanted: list[str]) -> None:
    assert _foldable(model_type) == wanted


@pytest.mark.parametrize("model_type", ["llama", "opt", "gemma2"])
def test_scaled_channels_change_nothing(model_type: str, tmp_path: Path) -> None:
    logits = []
    random = np.random.default_rng(0)
    for name in ("plain", "scaled"):
        graph, _ = lower(model_type, Dtype.FLOAT32, "pack-shared")
        before = {n: v.const_value for n, v in graph.graph.initializers.items()}
        if name == "scaled":
            for shared in find_shared_inputs(graph):
                if shared.factors:
                    width = shared.linears[0].in_features
                    scale_channels(shared, random.uniform(0.1, 10, width).astype(np.float32))
            changed = [n for n, v in graph.graph.initializers.items() if v.const_value is not before[n]]
            assert len(changed) >= 8
        verify_graph(graph)
        folder = tmp_path / name
        folder.mkdir()
        write_model(graph.model, folder)
        logits.append(StaticOrtModel(folder, graph.interface(), threads=1).prefill(IDS, steps=0))
    np.testing.assert_allclose(logits[1], logits[0], atol=2e-4)
