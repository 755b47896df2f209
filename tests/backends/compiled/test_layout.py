"""Operators that move, repeat or reduce features in a region, beside ONNX Runtime's own."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from llmc.backends.compiled.isa import InstructionSet
from llmc.backends.compiled.obstacles import obstacle
from llmc.backends.model_file import write_model
from tests.backends.compiled.graphs import (
    MICROSOFT,
    Array,
    GraphBuilder,
    open_session,
    quantized,
    usable_sets,
    write_compiled,
)

Dims = list[int | str]
FLAT = "3*batch*sequence"


class LayoutBuilder(GraphBuilder):
    """A graph whose operators are all outputs, with a product: without one, no region is made."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = self.given("heads", ["batch", "sequence", 3, 32])
        self.single = self.given("single", ["batch", "sequence", 1])
        self.turned = self.given("turned", ["batch", 24, "sequence"])
        self.positions = self.value("positions", ["batch", "sequence"], ir.DataType.INT64)
        self.inputs.append(self.positions)
        self.rows = self.input("rows", 32)
        weights = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
        self.outputs = [self.matmul(self.rows, quantized(weights, 4, 32, True), "product")]

    def given(self, name: str, dims: Dims) -> ir.Value:
        self.inputs.append(self.value(name, dims))
        return self.inputs[-1]

    def constant(self, numbers: list[int] | int | Array) -> ir.Value:
        array = np.array(numbers, np.int64) if isinstance(numbers, (list, int)) else numbers
        value = ir.val(f"constant{len(self.weights)}", const_value=ir.tensor(array))
        self.weights.append(value)
        return value

    def put(
        self, op: str, inputs: list[ir.Value], *shapes: Dims, domain: str = "", **attributes: object
    ) -> list[ir.Value]:
        outs = [self.value(f"{op}{len(self.outputs) + i}", dims) for i, dims in enumerate(shapes)]
        self.nodes.append(ir.node(op, inputs, attributes, domain=domain, outputs=outs))  # type: ignore[arg-type]
        self.outputs += outs
        return outs


def tokens(*features: int) -> Dims:
    return ["batch", "sequence", *features]


def add_parts(b: LayoutBuilder) -> None:
    """Parts and joins, of whole rows and of each head, of widths below and above a vector's."""
    first, second = b.put("Split", [b.heads, b.constant([5, 27])], tokens(3, 5), tokens(3, 27), axis=3)
    (middle,) = b.put("Slice", [b.heads, *map(b.constant, ([3], [20], [-1], [1]))], tokens(3, 17))
    b.put("Slice", [b.heads, *map(b.constant, ([-2], [99], [2]))], tokens(2, 32))
    b.put("Gather", [b.heads, b.constant(-1)], tokens(3), axis=3)
    b.put("Gather", [b.heads, b.constant([-2, -1])], tokens(2, 32), axis=2)
    b.put("Concat", [first, middle, second], tokens(3, 49), axis=-1)
    (flat,) = b.put("Reshape", [first, b.constant([0, 0, 15])], tokens(15))
    b.put("Concat", [flat, b.rows], tokens(47), axis=2)


def add_shapes(b: LayoutBuilder) -> None:
    """Other groups of features, rows flattened over tokens, and the exchange of tokens and features."""
    (flat,) = b.put("Reshape", [b.heads, b.constant([-1, 32])], [FLAT, 32])
    (normed,) = b.put(
        "SimplifiedLayerNormalization",
        [flat, *b.weight("norm", {"scale": np.full(32, 2, np.float32)})],
        [FLAT, 32],
        epsilon=1e-6,
        axis=-1,
    )
    (total,) = b.put("ReduceSum", [flat, b.constant([-1])], [FLAT, 1])
    (product,) = b.put("Mul", [normed, total], [FLAT, 32])
    b.put(
        "Squeeze",
        [b.put("ReduceMean", [b.heads, b.constant([3])], tokens(3, 1))[0], b.constant([3])],
        tokens(3),
    )
    b.put("Sigmoid", [product], [FLAT, 32])
    b.put("Unsqueeze", [b.rows, b.constant([2])], tokens(1, 32))
    low, high = b.put(
        "Split", [b.turned, b.constant([7, 17])], ["batch", 7, "sequence"], ["batch", 17, "sequence"], axis=1
    )
    column = b.weight("column", {"numbers": np.arange(7, dtype=np.float32)[:, None]})[0]
    (scaled,) = b.put("Mul", [low, column], ["batch", 7, "sequence"])
    b.put("Transpose", [scaled], tokens(7), perm=[0, 2, 1])
    (joined,) = b.put("Concat", [high, low], ["batch", 24, "sequence"], axis=1)
    b.put("Transpose", [joined], tokens(24), perm=[0, 2, 1])
    b.put("Transpose", [b.rows], ["batch", 32, "sequence"], perm=[0, 2, 1])


def add_functions(b: LayoutBuilder) -> None:
    """Operands that are repeated over features, and functions of rows of any width."""
    (size,) = b.put("Mul", [b.heads, b.heads], tokens(3, 32))
    (sums,) = b.put("ReduceSum", [size, b.constant([-1])], tokens(3, 1))
    (roots,) = b.put(
        "Sqrt", [b.put("Add", [sums, b.constant(np.array(1e-6, np.float32))], tokens(3, 1))[0]], tokens(3, 1)
    )
    b.put("Mul", [b.heads, b.put("Reciprocal", [roots], tokens(3, 1))[0]], tokens(3, 32))
    b.put("Mul", [b.rows, b.single], tokens(32))
    rng = np.random.default_rng(1)
    for shape in ((3, 1), (3, 32), (32,), (1, 32)):
        b.put("Add", [b.heads, b.constant(rng.standard_normal(shape).astype(np.float32))], tokens(3, 32))
    (one,) = b.put("Slice", [b.heads, *map(b.constant, ([0], [1], [2]))], tokens(1, 32))
    b.put("Expand", [one, b.constant([1, 1, 3, 1])], tokens(3, 32))
    (narrow,) = b.put("Slice", [b.rows, *map(b.constant, ([1], [22], [2]))], tokens(21))
    (wide,) = b.put("Mul", [narrow, b.constant(np.array(9, np.float32))], tokens(21))
    for op in ("Exp", "Softplus", "Neg", "Sigmoid"):
        b.put(op, [wide], tokens(21))
    limits = [b.constant(np.array(x, np.float32)) for x in (-0.5, 0.75)]
    b.put("Clip", [wide, *limits], tokens(21))
    b.put("Clip", [wide, limits[0]], tokens(21))


def add_rotary(b: LayoutBuilder) -> None:
    """The first elements of each head, in halves and in pairs, at positions that are given."""
    angles = np.outer(np.arange(4000), 0.5 ** np.arange(4)).astype(np.float32)
    tables = [b.constant(np.cos(angles)), b.constant(np.sin(angles))]
    for interleaved in (0, 1):
        b.put(
            "RotaryEmbedding",
            [b.rows, b.positions, *tables],
            tokens(32),
            domain=MICROSOFT,
            num_heads=2,
            rotary_embedding_dim=8,
            interleaved=interleaved,
        )


@pytest.mark.parametrize("isa", usable_sets(), ids=lambda isa: isa.name)
def test_one_region_equals_onnxruntimes_operators(isa: InstructionSet, tmp_path: Path) -> None:
    builder = LayoutBuilder()
    for add in (add_parts, add_shapes, add_functions, add_rotary):
        add(builder)
    names = [str(value.name) for value in builder.outputs]
    graph = builder.finish(builder.outputs)
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    for folder in (plain, compiled):
        folder.mkdir()
    write_model(graph.model, plain)
    made = write_compiled(graph, compiled, isa)
    assert (made.regions, made.outside) == (1, ())
    rng = np.random.default_rng(0)
    for length in (1, 3, 1100):  # the last in three pieces
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
        feeds = {
            "heads": draw(2, length, 3, 32),
            "single": draw(2, length, 1),
            "turned": draw(2, 24, length),
            "positions": rng.integers(0, 4000, (2, length)),
            "rows": draw(2, length, 32),
        }
        expected, found = (open_session(folder).run(names, feeds) for folder in (plain, compiled))
        for name, a, b in zip(names[1:], found[1:], expected[1:], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5, err_msg=f"{name}, {length} tokens")


def test_a_position_beyond_the_tables(tmp_path: Path) -> None:
    builder = LayoutBuilder()
    add_rotary(builder)
    write_compiled(builder.finish(builder.outputs), tmp_path, usable_sets()[0])
    feeds = {"positions": np.array([[4000]]), "rows": np.zeros((1, 1, 32), np.float32)}
    feeds |= {"heads": np.zeros((1, 1, 3, 32), np.float32), "single": np.zeros((1, 1, 1), np.float32)}
    with pytest.raises(Exception, match="a position is beyond the tables of the rotary embedding"):
        open_session(tmp_path).run(None, feeds | {"turned": np.zeros((1, 24, 1), np.float32)})


@pytest.mark.parametrize(
    ("op", "inputs", "output", "attributes", "why"),
    [
        ("Transpose", ["heads"], ["batch", 3, "sequence", 32], {"perm": [0, 2, 1, 3]}, "exchange tokens"),
        ("Expand", ["rows", [1, 2, 1]], ["batch", "total", 32], {}, "does not repeat features"),
        ("ReduceSum", ["heads", [2]], tokens(1, 32), {}, "does not reduce the last dimension"),
        ("Gather", ["heads", [1, 0]], tokens(2, 32), {"axis": 2}, "does not choose neighbouring features"),
        ("Slice", ["rows", [31], [-33], [2], [-1]], tokens(32), {}, "does not cut features"),
        ("Slice", ["rows", [0], [1], [1]], ["batch", 1, 32], {}, "does not cut features"),
        ("Concat", ["rows", "rows"], ["batch", "total", 32], {"axis": 1}, "does not join features"),
        ("Split", ["rows"], ["batch", "total", 32], {"axis": 1}, "have no static width"),
        ("Reshape", ["turned", [0, 0, -1]], tokens(24), {}, "changes more than how features are grouped"),
        ("Mul", ["heads", "rows"], tokens(3, 32), {}, "an operand has another shape"),
        ("Clip", ["rows", "rows"], tokens(32), {}, "its limits are not numbers"),
        ("RotaryEmbedding", ["rows", "rows", "rows", "rows"], tokens(32), {"num_heads": 2}, "its positions"),
    ],
)
def test_what_stays_outside(
    op: str, inputs: list[str | list[int]], output: Dims, attributes: dict[str, object], why: str
) -> None:
    builder = LayoutBuilder()
    given = {str(value.name): value for value in builder.inputs}
    values = [given[x] if isinstance(x, str) else builder.constant(x) for x in inputs]
    domain = MICROSOFT if op == "RotaryEmbedding" else ""
    builder.put(op, values, output, domain=domain, **attributes)
    assert why in str(obstacle(builder.nodes[-1]))
