"""Functions that read a graph, each on a graph of a few nodes."""

import numpy as np
import onnx_ir as ir
import pytest

from llmc.errors import GraphError
from llmc.graph.domains import MICROSOFT
from llmc.graph.match import (
    array_of,
    behind,
    constant_of,
    count_plain_attention,
    dims_of,
    find_nodes,
    input_of,
    ints_of,
    is_op,
    is_scalar,
    last_dim_of,
    lazy_of,
    made_by,
    only_user,
    operand,
    operand_beside,
    operands,
    part_of,
    permutation_of,
    rank_of,
    scalar_of,
    uncast,
)
from llmc.graph.weights import LazyWeight, WeightGroup


def value(*dims: int | str, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.val("x", dtype, list(dims))


def constant(data: object, dtype: type = np.int64) -> ir.Value:
    return ir.val("constant", const_value=ir.tensor(np.array(data, dtype)))


def made(op: str, *inputs: ir.Value, shape: tuple[int | str, ...] = (), **attributes: object) -> ir.Value:
    node = ir.node(op, list(inputs), attributes)  # type: ignore[arg-type]
    node.outputs[0].shape, node.outputs[0].type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    return node.outputs[0]


def test_producers_and_users() -> None:
    x, y = value(2), value(2)
    total = made("Add", x, y)
    node = total.producer()
    assert node is not None
    assert made_by(total, "Add") is node
    assert made_by(total, "Mul") is None
    assert made_by(None, "Add") is None
    assert is_op(node, "Add")
    assert not is_op(node, "Add", MICROSOFT)
    assert only_user(x) is node
    assert [(a is x, b is y) for a, b in operands(node)] == [(True, True), (False, False)]
    assert operand_beside(node, x) is y
    assert operand_beside(node, y) is x
    assert [input_of(node, index) for index in range(3)] == [x, y, None]


def test_an_operand_that_must_be_there() -> None:
    x = value(2)
    node = ir.node("Clip", [x, None], name="clip")
    assert operand(node, 0) is x
    for index in (1, 2):
        with pytest.raises(GraphError, match=f"Clip clip has no input {index}"):
            operand(node, index)


def test_nodes_are_found_in_graph_order_and_seen_through() -> None:
    x = value(2, 3)
    turned = made("Transpose", x, perm=[1, 0])
    last = made("Transpose", turned, perm=[1, 0])
    nodes = [turned.producer(), last.producer()]
    graph = ir.Graph([x], [last], nodes=nodes)  # type: ignore[arg-type]
    assert find_nodes(graph, "Transpose") == nodes
    assert find_nodes(graph, "Transpose", MICROSOFT) == []
    assert behind(turned, "Transpose") is x
    assert behind(last, "Cast") is last


def test_a_value_that_is_an_output_or_read_twice_has_no_only_user() -> None:
    x = value(2)
    square = made("Mul", x, x)
    assert only_user(x) is square.producer()
    ir.Graph([x], [x, square], nodes=[square.producer()])  # type: ignore[list-item]
    assert only_user(x) is None
    made("Neg", square)
    made("Abs", square)
    assert only_user(square) is None


def test_constants_are_data_of_the_graph_and_not_weights() -> None:
    node = ir.node("Constant", [], {"value_ints": [3, 4]})
    assert ints_of(node.outputs[0]) == [3, 4]
    assert ints_of(constant([0.5], np.float32)) is None
    group = WeightGroup(("w",), dict)
    lazy = LazyWeight(name="w", dtype=ir.DataType.FLOAT, shape=(1,), group=group, key="value")
    assert constant_of(ir.val("w", const_value=lazy)) is None
    assert lazy_of(ir.val("w", const_value=lazy)) is lazy
    with pytest.raises(GraphError, match="constant is not a weight of the checkpoint"):
        lazy_of(constant([1]))
    assert array_of(constant([1, 2])).tolist() == [1, 2]  # type: ignore[union-attr]
    assert array_of(value(1)) is array_of(None) is None
    assert constant_of(value(1)) is None
    assert constant_of(None) is None


@pytest.mark.parametrize(("data", "number"), [(2.0, 2.0), ([[2.0]], 2.0), ([1.0, 2.0], None)])
def test_scalars(data: object, number: float | None) -> None:
    found = constant(data, np.float32)
    assert scalar_of(found) == number
    assert is_scalar(found, 2.0) == (number is not None)
    assert not is_scalar(found, 2.1)


def test_shapes() -> None:
    assert dims_of(value("batch", 3)) == ["batch", 3]
    assert (last_dim_of(value("batch", 3)), rank_of(value("batch", 3))) == (3, 2)
    assert last_dim_of(value(3, "width")) is None
    unknown = ir.val("unknown", ir.DataType.FLOAT)
    assert (dims_of(unknown), last_dim_of(unknown), rank_of(unknown)) == ([], None, 0)
    assert (dims_of(None), last_dim_of(None), rank_of(None)) == ([], None, 0)


def test_casts_between_floats_are_seen_through() -> None:
    half, number = value(2, dtype=ir.DataType.FLOAT16), value(2, dtype=ir.DataType.INT64)
    assert uncast(made("Cast", half, to=1)) is half
    cast = made("Cast", number, to=1)
    assert uncast(cast) is cast


def test_permutations_are_those_that_are_stated() -> None:
    stated, plain = made("Transpose", value(2, 3), perm=[1, 0]), made("Transpose", value(2, 3))
    assert [permutation_of(v.producer()) for v in (stated, plain)] == [[1, 0], None]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bounds", "part"),
    [
        (([1], [3], [1]), (1, 1, 3, 1)),
        (([-2], [99], [-1], [2]), (1, 6, 8, 2)),
        (([0, 0], [1, 1], [0, 1]), None),
    ],
)
def test_slices(bounds: tuple[list[int], ...], part: tuple[int, ...] | None) -> None:
    source = value(4, 8)
    found = part_of(made("Slice", source, *map(constant, bounds)))
    assert (None if found is None else found[1:]) == part
    assert found is None or found[0] is source


def test_outputs_of_a_split() -> None:
    source = value("batch", 8)
    node = ir.node("Split", [source, constant([3, 5])], {"axis": -1}, num_outputs=2)
    for output, width in zip(node.outputs, (3, 5), strict=True):
        output.shape = ir.Shape(["batch", width])
    assert [part_of(v) for v in node.outputs] == [(source, 1, 0, 3, 1), (source, 1, 3, 8, 1)]
    node.outputs[0].shape = None
    assert part_of(node.outputs[1]) is None


def test_softmaxes_over_keys_are_counted() -> None:
    nodes = []
    for dims in (["batch", 4, "sequence", "total"], ["batch", "sequence", 8]):
        softmax = ir.node("Softmax", [value(*dims)])
        softmax.outputs[0].shape = ir.Shape(dims)
        nodes.append(softmax)
    graph = ir.Graph([], [], nodes=nodes, opset_imports={"": 21})
    assert count_plain_attention(graph) == 1
