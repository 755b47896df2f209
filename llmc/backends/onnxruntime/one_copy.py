"""Let operators read weights as the file stores them, so that a session on CUDA has one copy of each.

ONNX Runtime folds what it can compute from weights alone when a session starts, on the host, and loads the
result beside the weight if something else reads that. Two such forms are replaced:

- A product with a transposed matrix, stored (outputs, inputs) as torch does: com.microsoft FusedMatMul takes
  it as it is. An embedding that is also the language-model head is then there once.
- The codes of such an embedding, which a lookup takes in rows and a product in blocks: rows are a view of
  blocks at every step, whose shape is not known before.

A product whose first factor is a matrix, and whose second has a batch, becomes one of rows as well: CUDA
computes it by lists of addresses that the host copies to the device at every step.

Measured on a CPU, FusedMatMul gives the same bits and takes the same time as MatMul; only CUDA gains, since
ONNX Runtime packs weights on a CPU anyway.
"""

import numpy as np
import onnx_ir as ir

from llmc.graph.domains import MICROSOFT
from llmc.graph.edit import Site, add_constant, drop_dead, replace_node, require_domain, take_over
from llmc.graph.linear import as_linear, is_weight
from llmc.graph.match import dims_of, find_nodes, input_of, made_by, permutation_of
from llmc.graph.model import Graph

OPERATOR = "FusedMatMul"
#: Permutation that turns rows (batch, sequence, features) into columns (batch, features, sequence), and back.
_COLUMNS = [0, 2, 1]


def read_as_stored(graph: Graph) -> None:
    """Replace what would be folded to a second copy of a weight."""
    for node in find_nodes(graph.graph, "MatMul"):
        linear = as_linear(node)
        turned = made_by(input_of(node, 1), "Transpose")
        if linear is None or turned is None or permutation_of(turned) != [1, 0]:
            continue
        fused = ir.node(OPERATOR, [node.inputs[0], linear.weight], {"transB": 1}, domain=MICROSOFT)
        replace_node(graph.graph, node, [fused])
        require_domain(graph.graph, MICROSOFT)
    for node in find_nodes(graph.graph, "MatMul"):
        weight, columns = node.inputs
        if weight is not None and columns is not None and is_weight(weight) and _ranks(node) == (2, 3):
            _multiply_rows(graph.graph, node, weight, columns)
    for node in find_nodes(graph.graph, "GatherBlockQuantized", MICROSOFT):
        rows = made_by(input_of(node, 0), "Reshape")
        codes = input_of(rows) if rows is not None else None
        if rows is not None and codes is not None and is_weight(codes):
            rows.replace_input_with(1, _rows_of_codes(graph.graph, rows))
    drop_dead(graph.graph)


def _ranks(node: ir.Node) -> tuple[int, ...]:
    return tuple(len(dims_of(value)) for value in node.inputs)


def _multiply_rows(graph: ir.Graph, node: ir.Node, weight: ir.Value, columns: ir.Value) -> None:
    """Replace W X, with X (batch, inputs, sequence), by the transpose of a product of rows with W."""
    output, site = node.outputs[0], Site(graph, node)
    batch, features, sequence = dims_of(output)
    turned = made_by(columns, "Transpose")
    if turned is not None and permutation_of(turned) == _COLUMNS:
        rows = input_of(turned)
    else:
        shape = [batch, sequence, dims_of(columns)[1]]
        rows = _turn(site, columns, f"{output.name}/rows", shape)
    shape = [batch, sequence, features]
    product = site.emit(
        OPERATOR,
        [rows, weight],
        f"{output.name}/product",
        domain=MICROSOFT,
        attributes={"transB": 1},
        like=output,
        shape=shape,
    )
    take_over(output, _turn(site, product.outputs[0], f"{output.name}/columns", [batch, features, sequence]))


def _turn(site: Site, value: ir.Value, name: str, shape: list[int | str]) -> ir.Value:
    return site.emit(
        "Transpose", [value], name, attributes={"perm": _COLUMNS}, like=value, shape=shape
    ).outputs[0]


def _rows_of_codes(graph: ir.Graph, rows: ir.Node) -> ir.Value:
    """Return the shape (as many rows, all of each), which depends on an input so that nothing is folded."""
    ids = next(v for v in graph.inputs if v.name == "input_ids")
    site, stem = Site(graph, rows), str(rows.outputs[0].name)
    zero, rest = (add_constant(graph, np.array([n], np.int64), "axis") for n in (0, -1))
    count = site.emit(
        "Shape", [ids], f"{stem}/batch", attributes={"start": 0, "end": 1}, shape=[1], dtype=ir.DataType.INT64
    )
    same = site.emit("Mul", [count.outputs[0], zero], f"{stem}/same", like=count.outputs[0])
    return site.emit(
        "Concat",
        [same.outputs[0], rest],
        f"{stem}/shape",
        attributes={"axis": 0},
        shape=[2],
        dtype=zero.dtype,
    ).outputs[0]
