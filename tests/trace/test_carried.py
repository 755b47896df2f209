"""States that travel together in the two tensors that onnxruntime-genai serves for a layer."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from llmc.config import Dtype
from llmc.errors import UnsupportedError
from llmc.graph.interface import StateKind, StateSlot
from llmc.graph.serving import states_obstacle
from llmc.trace import trace_model
from llmc.trace.carried import carry_states
from tests.models import build_tiny_model
from tests.state_store import StateStore
from tests.states import difference


def test_several_convolutions_in_layers_with_attention_have_the_numbers_of_one_pass() -> None:
    model = build_tiny_model(
        "inkling_text",
        num_hidden_layers=2,
        layer_types=["hybrid", "hybrid_sliding"],
        swa_num_key_value_heads=4,
        mlp_layer_types=["dense", "dense"],
    )
    graph = trace_model(model.config, Dtype.FLOAT32)
    assert [(s.layer, s.kind) for s in graph.states] == [
        (layer, kind) for layer in (0, 1) for kind in ("conv", "recurrent")
    ]
    assert states_obstacle(graph.cache, graph.states) is None
    graph.bind(StateStore(model), {})
    assert difference(graph, model, "") <= 1e-4


def _graph(states: Sequence[tuple[int, StateKind, tuple[int, ...]]]) -> tuple[ir.Graph, list[StateSlot]]:
    """A graph that adds 1 to each number of layer 0's states, 2 to those of the next, and so on."""
    inputs, outputs, nodes, slots = [], [], [], []
    for n, (layer, kind, shape) in enumerate(states):
        slot = StateSlot(layer=layer, kind=kind, past=f"past.{n}", present=f"new.{n}", shape=shape)
        past, present = (ir.val(s, ir.DataType.FLOAT, ["batch", *shape]) for s in (slot.past, slot.present))
        step = ir.Node("", "Constant", [], [ir.AttrFloat32("value_float", float(n + 1))], num_outputs=1)
        step.outputs[0].name = f"step.{n}"
        nodes += [step, ir.Node("", "Add", [past, step.outputs[0]], outputs=[present])]
        inputs.append(past)
        outputs.append(present)
        slots.append(slot)
    return ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 23}, name="states"), slots


@pytest.mark.parametrize(
    ("states", "shapes"),
    [
        # Halves of a row, whose layers differ in length and are odd.
        ([(0, "conv", (3, 3)), (2, "conv", (2, 2))], {"conv": (1, 5), "recurrent": (1, 1, 5)}),
        # Two convolutions and a recurrence: the latter stays as it is.
        (
            [(1, "conv", (2, 3)), (1, "conv", (4, 1)), (1, "recurrent", (2, 3, 4))],
            {"conv": (1, 10), "recurrent": (2, 3, 4)},
        ),
        # A recurrence alone.
        ([(0, "recurrent", (2, 3, 4))], {"conv": (1, 12), "recurrent": (1, 1, 12)}),
    ],
)
def test_each_state_gets_its_own_numbers_back(
    states: list[tuple[int, StateKind, tuple[int, ...]]], shapes: dict[str, tuple[int, ...]]
) -> None:
    import onnxruntime as ort

    graph, slots = _graph(states)
    carried = carry_states(graph, (), tuple(slots))
    assert states_obstacle((), carried) is None
    assert {slot.kind: slot.shape for slot in carried} == shapes
    session = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
    fed = {slot.past: np.zeros((2, *slot.shape), np.float32) for slot in carried}
    for _ in range(2):
        found = dict(zip([o.name for o in session.get_outputs()], session.run(None, fed), strict=True))
        fed = {slot.past: found[slot.present] for slot in carried}
    for layer in {slot.layer for slot in slots}:
        row = np.concatenate([fed[s.past].reshape(2, -1) for s in carried if s.layer == layer], axis=1)
        sizes = [(n, int(np.prod(s.shape))) for n, s in enumerate(slots) if s.layer == layer]
        expected = np.concatenate([np.full(size, 2.0 * (n + 1)) for n, size in sizes])
        np.testing.assert_array_equal(row[:, : len(expected)], [expected, expected])
        assert not row[:, len(expected) :].any()


def test_states_that_are_served_stay_as_they_are() -> None:
    graph, slots = _graph([(0, "conv", (3, 3)), (0, "recurrent", (2, 3, 4))])
    assert carry_states(graph, (), tuple(slots)) == tuple(slots)


def test_states_of_different_types_are_refused() -> None:
    graph, slots = _graph([(0, "conv", (3, 3)), (0, "conv", (3, 3))])
    graph.inputs[1].dtype = ir.DataType.FLOAT16
    with pytest.raises(UnsupportedError, match="layer 0 keeps states of different types"):
        carry_states(graph, (), tuple(slots))
