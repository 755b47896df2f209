"""Launch a decode step as a CUDA graph: its inputs and outputs keep their addresses from step to step."""

from collections.abc import Mapping

import numpy as np

from llmc.arrays import Array
from llmc.graph.interface import Interface
from llmc.runtime.choice import CHOICE
from llmc.runtime.ort_session import OpenSession


class RecordedStep:
    """A step of one token for each row, which onnxruntime records at its first run and launches after it.

    The attention mask has a column for each slot of the cache, as onnxruntime-genai gives it: a graph has
    the shapes with which it was recorded. The columns of later tokens are zero.

    Args:
        opened: A session that can record CUDA graphs.
        interface: Inputs and outputs of the graph.
        batch: Number of rows.
        slots: Slots of the cache, which the caller binds to `binding`.
        number: Number of the graph, which no earlier one of the session has.
        chooses: Whether the graph has the output `CHOICE`.
    """

    def __init__(
        self,
        opened: OpenSession,
        interface: Interface,
        batch: int,
        slots: int,
        *,
        number: int,
        chooses: bool,
    ) -> None:
        self._opened = opened
        self._number = number
        dtypes = {spec.name: np.dtype(spec.dtype) for spec in (*interface.inputs, *interface.outputs)}
        self._dtypes = dtypes
        self._mask = np.zeros((batch, slots), dtypes["attention_mask"])
        shapes = {"input_ids": (batch, 1), "attention_mask": (batch, slots), "position_ids": (batch, 1)}
        self.binding = opened.session.io_binding()
        self._inputs = {
            name: opened.value(np.zeros(shape, dtypes[name]))
            for name, shape in shapes.items()
            if name in dtypes
        }
        for name, value in self._inputs.items():
            self.binding.bind_ortvalue_input(name, value)
        self._logits = opened.value(np.zeros((batch, 1, interface.vocabulary), dtypes["logits"]))
        self.binding.bind_ortvalue_output("logits", self._logits)
        if chooses:
            self._choice = opened.value(np.zeros((batch, 1, 1), np.int64))
            self.binding.bind_ortvalue_output(CHOICE, self._choice)

    def run(self, feeds: Mapping[str, Array], step: str, *, choose: bool) -> Array:
        """Run the step.

        Args:
            feeds: Inputs by name; the attention mask has the columns of the tokens so far.
            step: Words that describe the step in an error.
            choose: Whether to return the choice of the device, (batch, 1, 1) int64, instead of logits.

        Returns:
            Logits, (batch, 1, vocabulary) float32.

        Raises:
            ParityError: The run failed.
            ResourceError: The device has not enough memory.
        """
        mask = feeds["attention_mask"]
        self._mask[:, : mask.shape[1]], self._mask[:, mask.shape[1] :] = mask, 0
        for name, value in self._inputs.items():
            given = self._mask if name == "attention_mask" else feeds[name]
            value.update_inplace(np.ascontiguousarray(given, self._dtypes[name]))
        self._opened.run(self.binding, step, self._number)
        if choose:
            chosen: Array = self._choice.numpy()
            return chosen
        logits: Array = self._logits.numpy()
        return logits.astype(np.float32, copy=False)

    def release(self) -> None:
        """Free the recorded graph."""
        self._opened.session.release_captured_graph(self._number)
