"""An artifact with a KV cache of fixed length as onnxruntime runs it on the CPU.

It stands for an engine that is parsed from the very same file: what is measured here is the graph, not the
engine's kernels. bfloat16 and NVFP4 are computed in other types (`computable`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import ConfigError, ParityError
from llmc.graph.interface import TOKEN_COUNTS, WRITE_INDICES, Interface
from llmc.validate.computable import computable
from llmc.validate.session import compare_signature, open_session, require_shape

Array = np.ndarray

#: Dequantize weights once, when the session is made, not in every step.
_FOLD_WEIGHTS = {"session.disable_quant_qdq": "1"}


@dataclass(frozen=True)
class StaticState:
    """A point to come back to: real tokens of each row, (batch,) int64, and the cache's tensors."""

    written: Array
    cache: tuple[Any, ...]


class StaticOrtModel:
    """One onnxruntime session with the static KV cache of one batch.

    A row's slots are filled from 0 on; pads stand on the right and are overwritten by what comes next.

    Args:
        folder: Directory with model.onnx.
        interface: What the graph takes and gives; afterwards float32 stands for bfloat16 in it.
        threads: Intra-op threads; None leaves it to onnxruntime.

    Raises:
        ConfigError: There is no model.onnx in `folder`, or its cache has no fixed length.
        ResourceError: onnxruntime is not installed.
        ParityError: onnxruntime cannot load the graph, or its inputs and outputs are not the
            interface's.
    """

    def __init__(self, folder: Path, interface: Interface, *, threads: int | None) -> None:
        capacity = interface.max_length
        if not interface.static_cache or capacity is None:
            raise ConfigError(f"the KV cache of {folder} has no fixed length")
        with computable(folder, interface) as (folder, interface, done):
            self._ort, self._session, where = open_session(folder, threads, entries=_FOLD_WEIGHTS)
        self.where = f"{where}, {done}" if done else where
        self.interface = interface
        self.capacity = capacity
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
        self._state = StaticState(np.zeros(0, np.int64), ())

    def prefill(self, input_ids: Array, mask: Array | None = None, *, steps: int) -> Array:
        """Run a prompt from an empty cache.

        Args:
            input_ids: (batch, sequence) int64.
            mask: (batch, sequence) int64, 1 where a token is real, pads on the right; None if all are.
            steps: Decode steps that will follow.

        Returns:
            Logits, (batch, sequence or 1, vocabulary) float32.

        Raises:
            ConfigError: Prompt and steps exceed the cache.
            ParityError: The run failed, or an output has another shape than the interface says.
        """
        batch, sequence = input_ids.shape
        self._require_slots(sequence + steps)
        cache = tuple(
            self._ort.OrtValue.ortvalue_from_numpy(np.zeros((batch, *shape), dtype))
            for *_, shape, dtype in self._slots
        )
        lengths = np.full(batch, sequence, np.int64) if mask is None else mask.sum(axis=1)
        return self._run(input_ids, StaticState(np.zeros(batch, np.int64), cache), lengths)

    def decode(self, tokens: Array) -> Array:
        """Run further tokens of every row, one or several.

        Args:
            tokens: (batch, sequence) int64.

        Returns:
            Logits, (batch, sequence or 1, vocabulary) float32.

        Raises:
            ConfigError: The cache is full.
            ParityError: As for `prefill`.
        """
        batch, sequence = tokens.shape
        self._require_slots(int(self._state.written.max()) + sequence)
        return self._run(tokens, self._state, np.full(batch, sequence, np.int64))

    def state(self) -> StaticState:
        """This point of the sequence, to `restore` later."""
        return self._state

    def restore(self, state: StaticState) -> None:
        """Go back to `state`, taken since the last prefill."""
        self._state = state

    def _require_slots(self, needed: int) -> None:
        if needed > self.capacity:
            raise ConfigError(
                f"the KV cache has {self.capacity} slots and {needed} are needed",
                hint="build with a larger kv_capacity",
            )

    def _run(self, input_ids: Array, before: StaticState, real: Array) -> Array:
        batch, sequence = input_ids.shape
        binding = self._session.io_binding()
        feeds = {"input_ids": input_ids, WRITE_INDICES: before.written}
        if any(spec.name == TOKEN_COUNTS for spec in self.interface.inputs):
            feeds[TOKEN_COUNTS] = real
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value, np.int64))
        for (past, present, *_), value in zip(self._slots, before.cache, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_output(present, "cpu")
        binding.bind_output("logits", "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise ParityError(
                f"onnxruntime failed at batch {batch}, sequence {sequence}, slots {before.written}: {error}"
            ) from error
        *cache, logits = binding.get_outputs()
        for (_, present, shape, _), value in zip(self._slots, cache, strict=True):
            require_shape(present, value.shape(), (batch, *shape))
        self._state = StaticState(before.written + real, tuple(cache))
        positions = 1 if self.interface.logits == "last" else sequence
        shape = logits.shape()
        require_shape("logits", shape, (batch, positions, shape[-1] if len(shape) == 3 else -1))
        values: Array = logits.numpy()
        return values.astype(np.float32, copy=False)
