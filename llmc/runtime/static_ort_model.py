"""Run an artifact with a KV cache of fixed length with onnxruntime on the CPU.

It represents an engine that is built from the same file: it measures the graph, not the engine's kernels.
bfloat16 and NVFP4 are computed in other types (`computable`).
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.graph.interface import TOKEN_COUNTS, WRITE_INDICES, Interface
from llmc.runtime.computable import computable
from llmc.runtime.ort_session import open_session
from llmc.runtime.signature import compare_signature, require_shape
from llmc.runtime.slots import shorten, shorten_graph
from llmc.runtime.static_session import StaticSession

#: Dequantize weights once when the session is created instead of in every step.
_FOLD_WEIGHTS = {"session.disable_quant_qdq": "1"}


class StaticOrtModel(StaticSession):
    """An onnxruntime session with the static KV cache of one batch.

    Args:
        folder: Directory with model.onnx.
        interface: Inputs and outputs of the graph; the session's own has float32 instead of bfloat16.
        threads: Number of intra-op threads; None for onnxruntime's default.
        most: Largest number of new tokens per row in one run, as for an engine's prefill; None for any
            number.
        exact: Whether to compute in float32, with weights as stored and unrounded activations.
        slots: Slots of the KV cache, fewer than the graph has; None for the graph's own number.

    Raises:
        ConfigError: model.onnx is missing in `folder`, or its cache has no fixed length.
        ResourceError: onnxruntime is not installed.
        ParityError: onnxruntime cannot load the graph, or its inputs and outputs differ from the interface.
    """

    def __init__(
        self,
        folder: Path,
        interface: Interface,
        *,
        threads: int | None,
        most: int | None = None,
        exact: bool = False,
        slots: int | None = None,
    ) -> None:
        with computable(folder, interface, exact=exact) as (folder, interface, done):
            edit = None
            if slots is not None and interface.max_length is not None and slots < interface.max_length:
                edit = partial(shorten_graph, interface=interface, slots=slots)
                interface = shorten(interface, slots)
            self._opened = open_session(folder, threads, _FOLD_WEIGHTS, edit=edit, arena=False)
        self._session, where = self._opened.session, self._opened.where
        super().__init__(interface, f"{where}, {done}" if done else where, most=most)
        compare_signature("input", interface.inputs, self._session.get_inputs())
        compare_signature("output", interface.outputs, self._session.get_outputs())
        dtypes = {spec.name: np.dtype(spec.dtype) for spec in interface.inputs}
        self._slots = [
            (past, present, (slot.kv_heads, self.capacity, width), dtypes[past])
            for slot in interface.cache
            for past, present, width in (
                (slot.past_key, slot.present_key, slot.key_width),
                (slot.past_value, slot.present_value, slot.value_width),
            )
        ]
        self._cache: tuple[Any, ...] = ()

    def _clear(self, batch: int) -> None:
        self._cache = tuple(
            self._opened.value(np.zeros((batch, *shape), dtype)) for *_, shape, dtype in self._slots
        )

    def _run(self, input_ids: Array, written: Array, real: Array) -> Array:
        batch, sequence = input_ids.shape
        binding = self._session.io_binding()
        feeds = {"input_ids": input_ids, WRITE_INDICES: written}
        if any(spec.name == TOKEN_COUNTS for spec in self.interface.inputs):
            feeds[TOKEN_COUNTS] = real
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value, np.int64))
        for (past, present, *_), value in zip(self._slots, self._cache, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_output(present, "cpu")
        binding.bind_output("logits", "cpu")
        self._opened.run(binding, f"batch {batch}, sequence {sequence}, slots {written}")
        *cache, logits = binding.get_outputs()
        for (_, present, shape, _), value in zip(self._slots, cache, strict=True):
            require_shape(present, value.shape(), (batch, *shape))
        self._cache = tuple(cache)
        positions = 1 if self.interface.logits == "last" else sequence
        shape = logits.shape()
        require_shape("logits", shape, (batch, positions, shape[-1] if len(shape) == 3 else -1))
        values: Array = logits.numpy()
        return values.astype(np.float32, copy=False)
