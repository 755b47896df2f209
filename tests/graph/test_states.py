"""The operators with a state of fixed size, as functions, against the recurrence written out."""

import itertools
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest

from llmc.graph import states
from llmc.graph.domains import DIALECT, OPSET, VERSION

BATCH, STEP, TOTAL = 3, 5, 9
HEADS, KEY, VALUE, CHANNELS, TAPS = 4, 6, 3, 5, 4
#: Of three rows: all real, padded on the left, padded on the right of the step.
REAL = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]], np.int64)


def _mask() -> np.ndarray:
    return np.concatenate([np.ones((BATCH, TOTAL - STEP), np.int64), REAL], axis=1)


def run_operator(
    function: ir.Function,
    feeds: dict[str, np.ndarray | None],
    attributes: dict[str, object],
    outputs: list[str],
) -> list[np.ndarray]:
    """Run one node of `function` in onnxruntime; an input of None is absent."""
    import onnxruntime as ort

    given = {n: a for n, a in feeds.items() if a is not None}
    values = {
        n: ir.Value(
            name=n,
            shape=ir.Shape([None] * a.ndim),
            type=ir.TensorType(ir.DataType.INT64 if a.dtype == np.int64 else ir.DataType.FLOAT),
        )
        for n, a in given.items()
    }
    node = ir.Node(
        DIALECT,
        function.name,
        [values.get(n) for n in feeds],
        ir.convenience.convert_attributes(attributes),
        num_outputs=len(outputs),
    )
    for output, name in zip(node.outputs, outputs, strict=True):
        output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        list(values.values()),
        node.outputs,
        nodes=[node],
        name="g",
        opset_imports={"": OPSET, DIALECT: VERSION},
    )
    model = ir.Model(graph, ir_version=10, functions=[function])
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, given))


@pytest.mark.parametrize(("silu", "biased"), [(0, False), (1, True)])
def test_a_convolution_counts_real_tokens_alone(silu: int, biased: bool) -> None:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    feeds = {
        "x": draw(BATCH, CHANNELS, STEP),
        "weight": draw(CHANNELS, 1, TAPS),
        "bias": draw(CHANNELS) if biased else None,
        "past_state": draw(BATCH, CHANNELS, TAPS - 1),
        "attention_mask": _mask(),
    }
    feeds["past_state"][1] = 0  # padding on the left is at the start of a text
    output, present = run_operator(
        states.causal_conv(), feeds, {"channels": CHANNELS, "silu": silu}, ["output", "present_state"]
    )
    for row in range(BATCH):
        past = feeds["past_state"][row]
        for t in np.flatnonzero(REAL[row]):
            window = np.concatenate([past, feeds["x"][row, :, t : t + 1]], axis=1)
            y = (window * feeds["weight"][:, 0]).sum(axis=1) + (feeds["bias"] if biased else 0)
            expected = y / (1 + np.exp(-y)) if silu else y
            np.testing.assert_allclose(output[row, :, t], expected, atol=1e-6)
            past = window[:, 1:]
        np.testing.assert_array_equal(present[row], past)


@dataclass(frozen=True)
class Case:
    delta: bool
    per_channel: bool
    key_heads: int


CASES = [Case(*c) for c in itertools.product((False, True), (False, True), (HEADS, HEADS // 2))]


def linear_inputs(case: Case, seed: int = 0) -> dict[str, np.ndarray | None]:
    """Inputs of a step of `LinearAttention`."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        "query": draw(BATCH, STEP, case.key_heads * KEY),
        "key": draw(BATCH, STEP, case.key_heads * KEY) * 0.5,
        "value": draw(BATCH, STEP, HEADS * VALUE),
        "past_state": draw(BATCH, HEADS, KEY, VALUE),
        "decay": -np.abs(draw(BATCH, STEP, HEADS * (KEY if case.per_channel else 1))),
        "beta": 1 / (1 + np.exp(draw(BATCH, STEP, HEADS))) if case.delta else None,
        "attention_mask": _mask(),
    }


def recurrence(
    case: Case, feeds: dict[str, np.ndarray | None], scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """The outputs of real tokens (zeros elsewhere) and the state, in float64, by token and head."""
    output, present = np.zeros((BATCH, STEP, HEADS, VALUE)), np.zeros((BATCH, HEADS, KEY, VALUE))
    for row, head in itertools.product(range(BATCH), range(HEADS)):
        state = feeds["past_state"][row, head].astype(np.float64)
        key_head = head // (HEADS // case.key_heads)
        for t in np.flatnonzero(REAL[row]):
            part = lambda n, h, w, row=row, t=t: feeds[n][row, t, h * w : (h + 1) * w]  # noqa: E731
            query, key, value = (
                part("query", key_head, KEY),
                part("key", key_head, KEY),
                part("value", head, VALUE),
            )
            decay = part("decay", head, KEY if case.per_channel else 1)
            state = np.exp(decay)[:, None] * state
            new = feeds["beta"][row, t, head] * (value - key @ state) if case.delta else value
            state = state + np.outer(key, new)
            output[row, t, head] = scale * query @ state
        present[row, head] = state
    return output.reshape(BATCH, STEP, -1), present


@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear_attention_equals_its_recurrence(case: Case) -> None:
    feeds = linear_inputs(case)
    attributes = {"heads": HEADS, "key_heads": case.key_heads, "scale": 0.3, "delta": int(case.delta)}
    output, present = run_operator(
        states.linear_attention(delta=case.delta), feeds, attributes, ["output", "present_state"]
    )
    expected, state = recurrence(case, feeds, 0.3)
    real = REAL == 1
    np.testing.assert_allclose(output[real], expected[real], atol=2e-6)
    np.testing.assert_allclose(present, state, atol=2e-6)
