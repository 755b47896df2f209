"""Kernels of the operators with a state of fixed size, beside the recurrence written out in float64."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from llmc.backends.compiled.isa import InstructionSet
from llmc.backends.compiled.obstacles import obstacle
from llmc.graph.domains import DIALECT
from tests.backends.compiled.graphs import Array, GraphBuilder, open_session, usable_sets, write_compiled

SCALE, EARLIER = 0.3, 2
ISA = pytest.mark.parametrize("isa", usable_sets(), ids=lambda isa: isa.name)
#: Padding, real tokens and padding of each row in a step: no padding, on the right, and no token at all.
ROWS = [(0, 11, 0), (0, 6, 5), (0, 1, 10), (0, 0, 11)]
LEFT = [(0, 11, 0), (4, 7, 0)]
#: Steps that are longer than a piece of a step, which has up to 520 tokens.
LONG = [(0, 1100, 0), (0, 600, 500), (0, 512, 588), (0, 400, 700)]
LONG_LEFT = [(0, 1100, 0), (600, 500, 0), (511, 589, 0), (512, 588, 0)]
Rows = Sequence[tuple[int, int, int]]
Feeds = dict[str, Array]


def draw(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class Case:
    """One operator of a graph: its inputs and state at random, and its reference.

    Args:
        reference: From inputs, state and the mask of a step to the output, (batch, sequence, …), and state.
        turned: Inputs and output are (batch, features, sequence).
    """

    name: str
    what: str
    feeds: Callable[[int, int], Feeds]
    state: Callable[[int], Array]
    reference: Callable[[Feeds, Array, Array], tuple[Array, Array]]
    turned: bool = False


@dataclass
class Cases:
    """A graph of operators that share the mask, and their cases."""

    builder: GraphBuilder = field(default_factory=GraphBuilder)
    cases: list[Case] = field(default_factory=list)
    outputs: list[ir.Value] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mask = self.builder.value("attention_mask", ["batch", "total"], ir.DataType.INT64)
        self.builder.inputs.append(self.mask)

    def name(self) -> str:
        return f"case{len(self.cases)}"

    def add(
        self, op: str, inputs: list[ir.Value | None], state: list[int], out: ir.Value, **attributes: object
    ) -> None:
        """Add an operator; `inputs` lack its state, input 3, and the mask, its last."""
        name = self.name()
        past, present = (self.builder.value(f"{name}.{n}", ["batch", *state]) for n in ("past", "present"))
        self.builder.inputs.append(past)
        values = [*inputs[:3], past, *inputs[3:], self.mask]
        node = ir.node(op, values, attributes, domain=DIALECT, outputs=[out, present], name=name)  # type: ignore[arg-type]
        self.builder.nodes.append(node)
        self.outputs.append(present)

    def write(self, folder: Path, isa: InstructionSet) -> None:
        self.names = [str(value.name) for value in self.outputs]
        made = write_compiled(self.builder.finish(self.outputs), folder, isa)
        assert (made.regions, made.outside) == (1, ())

    def check(self, session: Any, lengths: Sequence[int], rows: Rows) -> None:
        """Run the tokens of `rows` in steps of these lengths, after some earlier tokens."""
        step = np.array([np.repeat([0, 1, 0], counts) for counts in rows])
        mask = np.concatenate([np.ones((len(rows), EARLIER), np.int64), step], axis=1)
        feeds = {f"{c.name}.{n}": x for c in self.cases for n, x in c.feeds(*step.shape).items()}
        first = {c.name: c.state(len(rows)) for c in self.cases}
        turned = {f"{c.name}.{n}" for c in self.cases if c.turned for n in ("x", "out")}
        found: dict[str, list[Array]] = {n: [] for n in self.names}
        states, start = {f"{n}.past": x for n, x in first.items()}, 0
        for length in lengths:
            stop = start + length
            cut = {n: x[:, :, start:stop] if n in turned else x[:, start:stop] for n, x in feeds.items()}
            results = session.run(self.names, cut | states | {"attention_mask": mask[:, : EARLIER + stop]})
            for name, result in zip(self.names, results, strict=True):
                found[name].append(np.moveaxis(result, 2, 1) if name in turned else result)
            states = {f"{c.name}.past": found[f"{c.name}.present"][-1] for c in self.cases}
            start = stop
        for case in self.cases:
            own = {n: feeds[f"{case.name}.{n}"].astype(np.float64) for n in case.feeds(1, 1)}
            output, state = case.reference(own, first[case.name], step)
            size = max(1.0, float(np.abs(output).max()))
            together = np.concatenate(found[f"{case.name}.out"], axis=1)
            for a, b in (
                (together[step == 1], output[step == 1]),
                (found[f"{case.name}.present"][-1], state),
            ):
                np.testing.assert_allclose(a / size, b / size, atol=1e-5, err_msg=str((case, lengths, rows)))


def add_convolution(
    cases: Cases, channels: int, taps: int, *, silu: bool, biased: bool, turned: bool
) -> None:
    """Add a `CausalConv`, of a graph's input that is (batch, channels, sequence) or has its rows in order."""
    name, builder = cases.name(), cases.builder
    weights, biases = draw(1, channels, 1, taps), draw(2, channels)
    weight = builder.weight(f"{name}.weight", {"values": weights})[0]
    bias = builder.weight(f"{name}.bias", {"values": biases})[0] if biased else None
    rows, columns = ["batch", "sequence", channels], ["batch", channels, "sequence"]
    x, out = (builder.value(f"{name}.{n}", columns if turned else rows) for n in ("x", "out"))
    builder.inputs.append(x)
    source, result = (builder.value(f"{name}.{n}", columns) for n in ("source", "result"))
    perm = ir.AttrInt64s("perm", [0, 2, 1])
    if not turned:
        builder.nodes.append(ir.Node("", "Transpose", [x], [perm], outputs=[source]))
    given, wanted = (x, out) if turned else (source, result)
    cases.add(
        "CausalConv", [given, weight, bias], [channels, taps - 1], wanted, channels=channels, silu=int(silu)
    )
    if not turned:
        builder.nodes.append(ir.Node("", "Transpose", [result], [perm], outputs=[out]))

    def reference(feeds: Feeds, state: Array, mask: Array) -> tuple[Array, Array]:
        tokens = feeds["x"].swapaxes(1, 2) if turned else feeds["x"]
        output, present = np.zeros_like(tokens), state.astype(np.float64)
        for row, t in zip(*np.nonzero(mask), strict=True):
            window = np.concatenate([present[row], tokens[row, t][:, None]], axis=1)
            y = (window * weights[:, 0]).sum(axis=1) + biases * biased
            output[row, t] = y / (1 + np.exp(-y)) if silu else y
            present[row] = window[:, 1:]
        return output, present

    def feeds(batch: int, tokens: int) -> Feeds:
        return {"x": draw(3, batch, *((channels, tokens) if turned else (tokens, channels)))}

    cases.outputs.append(out)
    start = lambda batch: draw(4, batch, channels, taps - 1)  # noqa: E731
    cases.cases.append(Case(name, f"{channels} channels, turned {turned}", feeds, start, reference, turned))


@ISA
def test_convolution(isa: InstructionSet, tmp_path: Path) -> None:
    """Without and with bias and SiLU, of widths below, above and no multiple of a vector's and a chunk's."""
    cases = Cases()
    for (channels, taps, silu, biased), turned in itertools.product(
        [(5, 4, True, False), (300, 3, False, True), (16, 2, True, True)], (False, True)
    ):
        add_convolution(cases, channels, taps, silu=silu, biased=biased, turned=turned)
    cases.write(tmp_path, isa)
    alone, two = (open_session(tmp_path, threads) for threads in (1, 2))
    cases.check(alone, [11], ROWS)
    cases.check(two, [1] * 4, [(0, 4, 0)])
    cases.check(two, [1, 7, 2, 1], ROWS)
    cases.check(alone, [3, 8], LEFT)
    cases.check(two, [1100], LONG)
    cases.check(alone, [1100], LONG_LEFT)


@dataclass(frozen=True)
class Heads:
    heads: int
    key_heads: int
    key: int
    value: int


#: More columns than a chunk has; widths below a vector; one head; values of width 1, as in Mamba.
SHAPES = [
    Heads(4, 2, 32, 80),
    Heads(6, 3, 10, 7),
    Heads(1, 1, 16, 16),
    Heads(20, 1, 16, 1),
    Heads(5, 5, 20, 1),
]


def add_attention(cases: Cases, shape: Heads, *, delta: bool, by_channel: bool) -> None:
    name, builder = cases.name(), cases.builder
    widths = dict.fromkeys(("query", "key"), shape.key_heads * shape.key)
    widths |= {"value": shape.heads * shape.value, "decay": shape.heads * (shape.key if by_channel else 1)}
    widths |= {"beta": shape.heads} if delta else {}
    inputs: list[ir.Value | None] = [builder.input(f"{name}.{n}", w) for n, w in widths.items()]
    inputs += [] if delta else [None]
    out = builder.value(f"{name}.out", ["batch", "sequence", shape.heads * shape.value])
    attributes = {"heads": shape.heads, "key_heads": shape.key_heads, "scale": SCALE, "delta": int(delta)}
    cases.add("LinearAttention", inputs, [shape.heads, shape.key, shape.value], out, **attributes)

    def feeds(batch: int, tokens: int) -> Feeds:
        made = {n: draw(i, batch, tokens, w) for i, (n, w) in enumerate(widths.items())}
        made["key"] /= np.sqrt(np.float32(shape.key))
        made["decay"] = -np.abs(made["decay"])
        return made | ({"beta": 1 / (1 + np.exp(made["beta"]))} if delta else {})

    def reference(feeds: Feeds, state: Array, mask: Array) -> tuple[Array, Array]:
        group = shape.heads // shape.key_heads
        keys = (feeds[n].reshape(*mask.shape, -1, shape.key) for n in ("query", "key"))
        query, key = (np.repeat(x, group, axis=2) for x in keys)
        value, decay = (feeds[n].reshape(*mask.shape, shape.heads, -1) for n in ("value", "decay"))
        output, present = np.zeros_like(value), state.astype(np.float64)
        for row, t in zip(*np.nonzero(mask), strict=True):
            s = np.exp(decay[row, t])[..., None] * present[row]
            new = value[row, t]
            if delta:
                new = feeds["beta"][row, t][:, None] * (new - np.einsum("hk,hkv->hv", key[row, t], s))
            present[row] = s + key[row, t][..., None] * new[:, None]
            output[row, t] = SCALE * np.einsum("hk,hkv->hv", query[row, t], present[row])
        return output.reshape(*mask.shape, -1), present

    cases.outputs.append(out)
    start = lambda batch: draw(9, batch, shape.heads, shape.key, shape.value)  # noqa: E731
    what = f"{shape}, delta {delta}, by channel {by_channel}"
    cases.cases.append(Case(name, what, feeds, start, reference))


@ISA
def test_linear_attention(isa: InstructionSet, tmp_path: Path) -> None:
    """With and without the delta rule, with a decay for each head and for each of its key channels."""
    cases = Cases()
    for shape, delta, by_channel in itertools.product(SHAPES, (False, True), (False, True)):
        add_attention(cases, shape, delta=delta, by_channel=by_channel)
    cases.write(tmp_path, isa)
    alone, two = (open_session(tmp_path, threads) for threads in (1, 2))
    cases.check(alone, [11], ROWS)
    cases.check(two, [1] * 4, [(0, 4, 0)])
    cases.check(two, [1, 7, 2, 1], ROWS)
    cases.check(alone, [3, 8], LEFT)
    cases.check(two, [600], [(0, 600, 0), (0, 520, 80), (0, 20, 580), (530, 70, 0)])


def _outside(change: Callable[[ir.Node, GraphBuilder], None], op: str) -> str | None:
    """Return why an operator of `Cases` stays outside after a change."""
    cases = Cases()
    if op == "CausalConv":
        add_convolution(cases, 16, 4, silu=False, biased=True, turned=True)
    else:
        add_attention(cases, Heads(1, 1, 16, 16), delta=True, by_channel=False)
    node = cases.builder.nodes[0]
    change(node, cases.builder)
    cases.builder.finish([value for value in cases.outputs if value.shape is not None])
    return obstacle(node)


def _replace(index: int, dims: list[int | str], kind: ir.DataType = ir.DataType.FLOAT) -> Callable[..., None]:
    def change(node: ir.Node, builder: GraphBuilder) -> None:
        value = builder.value("other", dims, kind)
        builder.inputs.append(value)
        node.replace_input_with(index, value)

    return change


@pytest.mark.parametrize(
    ("op", "change", "why"),
    [
        ("CausalConv", _replace(0, ["batch", "sequence", 16]), "its operand is not one row of channels"),
        ("CausalConv", _replace(1, ["batch", 1, 4]), "its weight or bias is not a float32 tensor"),
        ("CausalConv", _replace(3, ["batch", 16, 3], ir.DataType.FLOAT16), "its state is not float32"),
        ("CausalConv", _replace(3, ["batch", 16, "past"]), "its state is not an input of the graph"),
        ("CausalConv", _replace(4, ["batch", "sequence"], ir.DataType.INT64), "its mask is not that of all"),
        ("LinearAttention", _replace(2, ["batch", 16, "sequence"]), "its query, key, value or decay is not"),
        ("LinearAttention", _replace(5, ["batch", "total", 1]), "its beta is not one row of features"),
        (
            "LinearAttention",
            _replace(3, ["batch", 1, 16, 16], ir.DataType.FLOAT16),
            "its state is not float32",
        ),
    ],
)
def test_what_stays_outside(op: str, change: Callable[..., None], why: str) -> None:
    assert why in str(_outside(change, op))


def test_a_state_that_the_graph_keeps_to_itself() -> None:
    def change(node: ir.Node, builder: GraphBuilder) -> None:
        node.outputs[1].shape = None  # `_outside` leaves it out of the graph's outputs

    assert _outside(change, "CausalConv") == "its state is not an output of the graph"


def test_inputs_of_other_shapes(tmp_path: Path) -> None:
    cases = Cases()
    add_convolution(cases, 16, 4, silu=False, biased=False, turned=True)
    cases.write(tmp_path, usable_sets()[0])
    x, past = np.zeros((2, 16, 3), np.float32), np.zeros((2, 16, 3), np.float32)
    mask, session = np.ones((2, 5), np.int64), open_session(tmp_path)
    feeds = {"case0.x": x, "case0.past": past, "attention_mask": mask}
    session.run(None, feeds)
    with pytest.raises(Exception, match=r"attention_mask has another shape than \(batch, total\)"):
        session.run(None, feeds | {"attention_mask": mask[:, :2]})
    with pytest.raises(Exception, match="a state has another shape than the model was compiled for"):
        session.run(None, feeds | {"case0.past": past[:1]})
