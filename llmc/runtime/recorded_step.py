"""Launch a decode step as a CUDA graph: its inputs and outputs keep their addresses from step to step."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.graph.interface import Interface
from llmc.runtime.choice import CHOICE
from llmc.runtime.ort_session import OpenSession

#: Tensors on the device: the cache or the states of a batch, in the interface's order.
Values = tuple[Any, ...]


class RecordedStep:
    """A step of one token for each row, which onnxruntime records at its first run and launches after it.

    The attention mask has a column for each slot of the cache, as onnxruntime-genai gives it: a graph has
    the shapes with which it was recorded. The columns of later tokens are zero. States of fixed size have two
    buffers, which are past and present by turns, with a graph for each order.

    Args:
        opened: A session that can record CUDA graphs.
        interface: Inputs and outputs of the graph.
        cache: The cache of the batch, bound as past and as present.
        batch: Number of rows.
        slots: Slots of the cache.
        number: Number of the first graph; no earlier one of the session has it or the next one.
        chooses: Whether the graph has the output `CHOICE`.
    """

    def __init__(
        self,
        opened: OpenSession,
        interface: Interface,
        cache: Values,
        batch: int,
        slots: int,
        *,
        number: int,
        chooses: bool,
    ) -> None:
        self._opened = opened
        self._number = number
        self._dtypes = {
            spec.name: np.dtype(spec.dtype) for spec in (*interface.inputs, *interface.outputs)
        } | {CHOICE: np.dtype(np.int64)}
        self._mask = np.zeros((batch, slots), self._dtypes["attention_mask"])
        shapes = {"input_ids": (batch, 1), "attention_mask": (batch, slots), "position_ids": (batch, 1)}
        self._inputs = {
            name: self._zeros(name, shape) for name, shape in shapes.items() if name in self._dtypes
        }
        self._outputs = {"logits": self._zeros("logits", (batch, 1, interface.vocabulary))}
        if chooses:
            self._outputs[CHOICE] = self._zeros(CHOICE, (batch, 1, 1))
        self._states: list[Values] = [
            tuple(self._zeros(state.past, (batch, *state.shape)) for state in interface.states)
            for _ in range(2 if interface.states else 1)
        ]
        self._turn = 0
        names = [pair for slot in interface.cache for pair in slot.pairs]
        self._bindings = []
        for turn, past in enumerate(self._states):
            binding = opened.session.io_binding()
            for name, value in self._inputs.items():
                binding.bind_ortvalue_input(name, value)
            for name, value in self._outputs.items():
                binding.bind_ortvalue_output(name, value)
            for pair, value in zip(names, cache, strict=True):
                binding.bind_ortvalue_input(pair[0], value)
                binding.bind_ortvalue_output(pair[1], value)
            for state, old, new in zip(interface.states, past, self._states[turn - 1], strict=True):
                binding.bind_ortvalue_input(state.past, old)
                binding.bind_ortvalue_output(state.present, new)
            self._bindings.append(binding)

    def run(self, feeds: Mapping[str, Array], states: Values, step: str) -> Values:
        """Run the step.

        Args:
            feeds: Inputs by name; the attention mask has the columns of the tokens so far.
            states: The states before it.
            step: Words that describe the step in an error.

        Returns:
            The states after it, in buffers that later steps write to: see `lasting`.

        Raises:
            ParityError: The run failed.
            ResourceError: The device has not enough memory.
        """
        mask = feeds["attention_mask"]
        self._mask[:, : mask.shape[1]], self._mask[:, mask.shape[1] :] = mask, 0
        for name, value in self._inputs.items():
            given = self._mask if name == "attention_mask" else feeds[name]
            value.update_inplace(np.ascontiguousarray(given, self._dtypes[name]))
        if states is not self._states[self._turn]:
            for value, given in zip(self._states[self._turn], states, strict=True):
                value.update_inplace(given)
        self._opened.run(self._bindings[self._turn], step, self._number + self._turn)
        self._turn = (self._turn + 1) % len(self._states)
        return self._states[self._turn]

    def output(self, name: str) -> Array:
        """Return an output of the last run: the logits, or the choice of the device."""
        value: Array = self._outputs[name].numpy()
        return value

    def owns(self, states: Values) -> bool:
        """Return whether later steps write to `states`."""
        return any(states is own for own in self._states)

    def lasting(self, states: Values, interface: Interface) -> Values:
        """Return `states`, or copies of them if later steps write to them."""
        if not self.owns(states):
            return states
        return tuple(
            self._copied(state.past, value) for state, value in zip(interface.states, states, strict=True)
        )

    def release(self) -> None:
        """Free the recorded graphs."""
        for turn in range(len(self._states)):
            self._opened.session.release_captured_graph(self._number + turn)

    def _zeros(self, name: str, shape: Sequence[int]) -> Any:
        return self._opened.value(np.zeros(shape, self._dtypes[name]))

    def _copied(self, name: str, value: Any) -> Any:
        copy = self._zeros(name, value.shape())
        copy.update_inplace(value)
        return copy
