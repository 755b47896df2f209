"""Functions that change a graph, each on a graph of a few nodes."""

import numpy as np
import onnx_ir as ir
import pytest

from llmc.arrays import Array
from llmc.errors import GraphError
from llmc.graph.dialect import EXPERTS, experts
from llmc.graph.domains import DIALECT, MICROSOFT
from llmc.graph.edit import (
    Site,
    add_constant,
    add_initializer,
    add_weight,
    drop_dead,
    drop_unused_functions,
    name_constant,
    replace_node,
    require_opset,
    set_value,
    take_over,
)
from llmc.graph.model import LAYER
from llmc.graph.weights import LazyWeight


class Ones:
    """Rows of ones."""

    shape, dtype, sources = (2, 3), ir.DataType.FLOAT, ("ones",)

    def rows(self, start: int, stop: int) -> Array:
        return np.ones((stop - start, 3), np.float32)


@pytest.fixture
def graph() -> ir.Graph:
    """x (2, 3) -> Neg in layer 4 -> y."""
    x = ir.val("x", ir.DataType.FLOAT, [2, 3])
    node = ir.node("Neg", [x], name="neg", metadata_props={LAYER: "4", "module": "mlp"})
    y = set_value(node.outputs[0], "y", [2, 3], ir.DataType.FLOAT)
    return ir.Graph([x], [y], nodes=[node], opset_imports={"": 21}, name="graph")


def test_a_new_node_is_named_typed_and_placed(graph: ir.Graph) -> None:
    neg = graph.node("neg")
    made = Site(graph, neg).emit(
        "QuickGelu", [graph.inputs[0]], "a", domain=MICROSOFT, attributes={"alpha": 1.0}, like=neg.outputs[0]
    )
    assert list(graph) == [made, neg]
    assert (made.name, made.outputs[0].name, made.outputs[0].dtype) == ("a/QuickGelu", "a", ir.DataType.FLOAT)
    assert made.outputs[0].shape == neg.outputs[0].shape
    assert made.metadata_props == {LAYER: "4"}
    assert graph.opset_imports == {"": 21, MICROSOFT: 1}


def test_metadata_can_be_given_and_further_outputs_are_left_out(graph: ir.Graph) -> None:
    site = Site(graph, graph.node("neg"), metadata={"module": "mlp"})
    made = site.emit("Split", [graph.inputs[0]], "a", shape=[1, 3], dtype=ir.DataType.FLOAT, outputs=2)
    assert made.metadata_props == {"module": "mlp"}
    assert [output.name for output in made.outputs] == ["a", ""]
    assert site.emit("Abs", made.outputs[:1], "b").outputs[0].shape is None


def test_a_new_node_can_stand_after_its_place_by_a_name_of_its_own(graph: ir.Graph) -> None:
    neg = graph.node("neg")
    made = Site(graph, neg, after=True).emit("Abs", neg.outputs, "a", node_name="again")
    assert list(graph) == [neg, made]
    assert (made.name, made.outputs[0].name) == ("again", "a")


def test_a_value_takes_the_place_of_another(graph: ir.Graph) -> None:
    neg = graph.node("neg")
    old = neg.outputs[0]
    made = Site(graph, neg).emit("Abs", graph.inputs, "a").outputs[0]
    take_over(old, made)
    assert graph.outputs[0] is made
    assert (made.name, made.shape, made.type, old.name) == ("y", ir.Shape([2, 3]), old.type, None)
    drop_dead(graph)
    assert [node.op_type for node in graph] == ["Abs"]


def test_nodes_take_the_place_of_another_with_its_metadata(graph: ir.Graph) -> None:
    first = ir.node("Abs", graph.inputs)
    last = ir.node("Sqrt", first.outputs)
    replace_node(graph, graph.node("neg"), [first, last])
    assert list(graph) == [first, last]
    assert (last.name, last.outputs[0].name, graph.outputs[0]) == ("neg", "y", last.outputs[0])
    assert first.metadata_props == last.metadata_props == {LAYER: "4", "module": "mlp"}


def test_equal_constants_are_one_initializer(graph: ir.Graph) -> None:
    one = add_constant(graph, np.array([1, 2], np.int64), "axes")
    assert add_constant(graph, np.array([1, 2], np.int64), "axes") is one
    assert str(one.name).startswith("axes_")
    others = [np.array([1, 3], np.int64), np.array([[1, 2]], np.int64), np.array([1, 2], np.int32)]
    assert len({one.name, *(add_constant(graph, other, "axes").name for other in others)}) == 4


def test_a_named_constant_is_made_once(graph: ir.Graph) -> None:
    one = name_constant(graph, "axis", np.array([1], np.int64))
    assert name_constant(graph, "axis", np.array([2], np.int64)) is one
    assert graph.initializers["axis"] is one
    assert (one.dtype, one.shape) == (ir.DataType.INT64, ir.Shape([1]))


def test_one_name_holds_one_weight(graph: ir.Graph) -> None:
    rows = Ones()
    one = add_weight(graph, "w", rows)
    assert isinstance(one.const_value, LazyWeight)
    assert add_weight(graph, "w", rows) is one
    with pytest.raises(GraphError, match="two weights would be called w"):
        add_weight(graph, "w", Ones())


def test_dead_nodes_and_initializers_go(graph: ir.Graph) -> None:
    factor = add_initializer(graph, ir.tensor(np.ones(3, np.float32), name="factor"))
    site = Site(graph, graph.node("neg"))
    product = site.emit("Mul", [graph.inputs[0], factor], "product").outputs[0]
    site.emit("Abs", [product], "abs")
    drop_dead(graph)
    assert [node.op_type for node in graph] == ["Neg"]
    assert not graph.initializers


def test_functions_that_no_node_calls_go_with_their_domain(graph: ir.Graph) -> None:
    model = ir.Model(graph, ir_version=10, functions=[experts(biases=False)])
    graph.opset_imports[DIALECT] = 1
    x = graph.inputs[0]
    made = Site(graph, graph.node("neg")).emit(EXPERTS, [x] * 5, "experts", domain=DIALECT)
    drop_unused_functions(model)
    assert (list(model.functions), graph.opset_imports) == ([made.op_identifier()], {"": 21, DIALECT: 1})
    graph.remove(made, safe=True)
    drop_unused_functions(model)
    assert (list(model.functions), graph.opset_imports) == ([], {"": 21})


def test_an_opset_is_raised_with_its_ir_version_and_never_lowered(graph: ir.Graph) -> None:
    model = ir.Model(graph, ir_version=10)
    require_opset(model, 23)
    assert (graph.opset_imports[""], model.ir_version) == (23, 11)
    require_opset(model, 21)
    assert graph.opset_imports[""] == 23
