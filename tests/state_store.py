"""Running a `Graph` in ONNX Runtime with the weights of a PyTorch model, before a backend has written it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from llmc.graph.model import Graph
from llmc.graph.weights import TensorInfo

if TYPE_CHECKING:
    import torch

    Array = np.ndarray


class StateStore:
    """A model's state_dict as a `WeightStore`."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.arrays = {n: t.detach().numpy() for n, t in model.state_dict().items()}

    def infos(self) -> dict[str, TensorInfo]:
        return {n: TensorInfo(n, a.shape, ir.DataType.from_numpy(a.dtype)) for n, a in self.arrays.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        array = self.arrays[name]
        return array if array.ndim == 0 else array[start:stop]


def run_steps(graph: Graph, ids: Array, mask: Array, positions: Array, prompt: int) -> Array:
    """Prefill of `prompt` tokens, then one decode step per remaining token, with a growing cache.

    Args:
        ids: (batch, length) tokens.
        mask: (batch, length), 0 at padding.
        positions: (batch, length).

    Returns:
        Logits (batch, length, vocabulary).
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    data = ir.to_proto(graph.model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    cache: dict[str, Array] = {}
    for slot in graph.cache:
        cache[slot.past_key] = np.zeros((len(ids), slot.kv_heads, 0, slot.key_width), np.float32)
        cache[slot.past_value] = np.zeros((len(ids), slot.kv_heads, 0, slot.value_width), np.float32)
    for state in graph.states:
        cache[state.past] = np.zeros((len(ids), *state.shape), np.float32)
    logits = []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        feeds = {
            "input_ids": ids[:, start:stop],
            "attention_mask": mask[:, :stop],
            "position_ids": positions[:, start:stop],
            **cache,
        }
        out = dict(
            zip(names, session.run(None, {k: v for k, v in feeds.items() if k in wanted}), strict=True)
        )
        logits.append(out["logits"])
        for slot in graph.cache:
            cache[slot.past_key] = out[slot.present_key]
            cache[slot.past_value] = out[slot.present_value]
        for state in graph.states:
            cache[state.past] = out[state.present]
    return np.concatenate(logits, axis=1)
