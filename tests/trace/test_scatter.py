"""Assignments to parts of a tensor, as torch exports them."""

import warnings
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from llmc.graph.match import find_nodes
from llmc.trace.scatter import drop_whole_copies, join_parts, mask_places
from llmc.trace.simplify import simplify

#: Exchanges the first and the last axis.
_SWAP = [2, 1, 0]


def _copied(*parts: tuple[int, int]) -> ir.Model:
    """A graph that replaces `size` columns of x (2, 3, 8) from `start` on, for one part after the other."""
    values = [ir.val("x", ir.DataType.FLOAT, [2, 3, 8])]
    nodes = []
    result = values[0]
    for number, (start, size) in enumerate(parts):
        columns = ir.val(f"part_{number}", ir.DataType.FLOAT, [2, 3, size])
        values.append(columns)
        places = ir.tensor(np.arange(start, start + size)[:, None])
        index = ir.node("Constant", [], {"value": places}).outputs[0]
        turned = [ir.node("Transpose", [v], {"perm": _SWAP}).outputs[0] for v in (result, columns)]
        scatter = ir.node("ScatterND", [turned[0], index, turned[1]])
        index.shape = ir.Shape([size, 1])
        result = ir.node("Transpose", scatter.outputs, {"perm": _SWAP}).outputs[0]
        result.shape, result.type = values[0].shape, values[0].type
        nodes += [index.producer(), *(t.producer() for t in turned), scatter, result.producer()]
    result.name = "y"
    graph = ir.Graph(values, [result], nodes=[n for n in nodes if n], opset_imports={"": 21}, name="copies")
    return ir.Model(graph, ir_version=10)


def _run(model: ir.Model) -> np.ndarray:
    random = np.random.default_rng(0)
    feeds = {
        str(v.name): random.normal(size=v.shape.numpy()).astype(np.float32)
        for v in model.graph.inputs
        if v.shape
    }
    result: np.ndarray = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)[0]
    return result


@pytest.mark.parametrize("parts", [[(0, 5), (5, 3)], [(5, 3), (0, 5)], [(2, 3), (0, 2), (5, 3)]])
def test_parts_that_cover_an_axis_are_joined(parts: list[tuple[int, int]]) -> None:
    model = _copied(*parts)
    expected = _run(model)
    join_parts(model.graph)
    (joined,) = find_nodes(model.graph, "Concat")
    assert joined.outputs[0].is_graph_output()
    np.testing.assert_array_equal(_run(model), expected)


@pytest.mark.parametrize("parts", [[(0, 5)], [(0, 5), (6, 2)], [(0, 5), (4, 4)], [(5, 3), (0, 3)]])
def test_gaps_and_overlaps_stay(parts: list[tuple[int, int]]) -> None:
    model = _copied(*parts)
    join_parts(model.graph)
    assert not find_nodes(model.graph, "Concat")


def _exported(assign: Callable[[torch.Tensor], None]) -> ir.Model:
    """A graph that assigns to parts of a copy of x (rows, 3, 8)."""

    class Step(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            assign(y)
            return y

    shapes = ({0: torch.export.Dim("rows")},)
    program = torch.export.export(Step(), (torch.ones(2, 3, 8),), dynamic_shapes=shapes, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx = torch.onnx.export(program, optimize=False, opset_version=21, verbose=False)
    assert onnx is not None
    return onnx.model


def _columns(y: torch.Tensor) -> None:
    y[:, :, [1, 6]] = -7.0


def _middle(y: torch.Tensor) -> None:
    y[:, [0, 2]] = -7.0


@pytest.mark.parametrize("assign", [_columns, _middle])
def test_a_number_at_places_of_an_axis_is_a_choice_by_a_mask(assign: Callable[[torch.Tensor], None]) -> None:
    x = np.random.default_rng(0).normal(size=(5, 3, 8)).astype(np.float32)
    expected = torch.from_numpy(x * 2)
    assign(expected)
    model = _exported(assign)
    simplify(model)
    operators = {node.op_type for node in model.graph}
    assert operators == {"Mul", "Where"}
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_array_equal(found, expected.numpy())


def _first_row(y: torch.Tensor) -> None:
    y[[0]] = -7.0


def _sums(y: torch.Tensor) -> None:
    y[:, [0, 2]] += 1.0


@pytest.mark.parametrize("assign", [_first_row, _sums])
def test_other_assignments_stay(assign: Callable[[torch.Tensor], None]) -> None:
    model = _exported(assign)
    before = len(find_nodes(model.graph, "ScatterND"))
    drop_whole_copies(model.graph)
    mask_places(model.graph)
    assert len(find_nodes(model.graph, "ScatterND")) == before
    assert not find_nodes(model.graph, "Where")
