"""The dialect as ONNX functions, in ONNX Runtime, against attention and experts written out."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest

from llmc.graph import dialect
from llmc.graph.domains import DIALECT, OPSET, VERSION

BATCH, HEADS, KV_HEADS, PAST, STEP, WIDTH, VALUE_WIDTH = 2, 4, 2, 5, 3, 8, 6


@dataclass(frozen=True)
class Case:
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False
    hidden: tuple[int, ...] = ()


CASES = [
    Case(),
    Case(window=4),
    Case(window=1),
    Case(softcap=2.0),
    Case(sinks=True),
    Case(hidden=(0, 1)),
    Case(window=3, softcap=1.5, sinks=True, hidden=(0,)),
    Case(window=3, hidden=(3, 4)),
    Case(window=3, hidden=(3, 7)),
    Case(chunk=3),
    Case(chunk=3, hidden=(0, 1)),
    Case(chunk=2, hidden=(3, 4)),
]


def _inputs(case: Case, past: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32) * 2

    mask = np.ones((BATCH, past + STEP), np.int64)
    mask[1, [slot for slot in case.hidden if slot < past + STEP]] = 0
    feeds = {
        "query": draw(BATCH, HEADS, STEP, WIDTH),
        "key": draw(BATCH, KV_HEADS, STEP, WIDTH),
        "value": draw(BATCH, KV_HEADS, STEP, VALUE_WIDTH),
        "past_key": draw(BATCH, KV_HEADS, past, WIDTH),
        "past_value": draw(BATCH, KV_HEADS, past, VALUE_WIDTH),
        "attention_mask": mask,
    }
    if case.sinks:
        feeds["sinks"] = draw(HEADS)
    return feeds


def _run(case: Case, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime as ort

    function = dialect.cached_attention(sinks=case.sinks)
    inputs = [
        ir.Value(
            name=n,
            shape=ir.Shape([None] * a.ndim),
            type=ir.TensorType(ir.DataType.INT64 if a.dtype == np.int64 else ir.DataType.FLOAT),
        )
        for n, a in feeds.items()
    ]
    attributes = {
        "num_heads": HEADS,
        "kv_num_heads": KV_HEADS,
        "scale": 0.3,
        "softcap": case.softcap,
        "window": case.window,
        "chunk": case.chunk,
    }
    node = ir.Node(
        DIALECT,
        dialect.CACHED_ATTENTION,
        inputs,
        ir.convenience.convert_attributes(attributes),
        num_outputs=3,
    )
    for output, name in zip(node.outputs, ("output", "present_key", "present_value"), strict=True):
        output.name = name
        output.type = ir.TensorType(ir.DataType.FLOAT)
        output.shape = ir.Shape([None] * 4)
    graph = ir.Graph(
        inputs,
        node.outputs,
        nodes=[node],
        name="g",
        opset_imports={"": OPSET, DIALECT: VERSION},
    )
    model = ir.Model(graph, ir_version=10, functions=[function])
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def _reference(case: Case, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Row by row, head by head, position by position."""
    past = feeds["past_key"].shape[2]
    keys = np.concatenate([feeds["past_key"], feeds["key"]], axis=2)
    values = np.concatenate([feeds["past_value"], feeds["value"]], axis=2)
    out = np.zeros((BATCH, STEP, HEADS, VALUE_WIDTH))
    for b in range(BATCH):
        for h in range(HEADS):
            group = h // (HEADS // KV_HEADS)
            for i in range(STEP):
                real = np.flatnonzero(feeds["attention_mask"][b, : past + i + 1])
                at = len(real) - 1
                seen = real[max(0, at + 1 - case.window) :] if case.window else real
                seen = real[at // case.chunk * case.chunk :] if case.chunk else seen
                scores = 0.3 * keys[b, group, seen] @ feeds["query"][b, h, i]
                if case.softcap:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                weights = np.exp(scores)
                total = weights.sum() + (np.exp(feeds["sinks"][h]) if case.sinks else 0.0)
                out[b, i, h] = weights / total @ values[b, group, seen]
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("past", [0, PAST])
def test_equals_attention_written_out(case: Case, past: int) -> None:
    feeds = _inputs(case, past)
    output, present_key, present_value = _run(case, feeds)
    rows = feeds["attention_mask"][:, past:] == 1  # a padded query sees nothing and means nothing
    np.testing.assert_allclose(output[rows], _reference(case, feeds)[rows], atol=2e-6)
    np.testing.assert_array_equal(present_key, np.concatenate([feeds["past_key"], feeds["key"]], axis=2))
    np.testing.assert_array_equal(
        present_value, np.concatenate([feeds["past_value"], feeds["value"]], axis=2)
    )


def test_a_query_that_sees_nothing_stays_finite() -> None:
    feeds = _inputs(Case(hidden=(0, 1)), 0)
    output, *_ = _run(Case(), feeds)
    assert np.isfinite(output).all()


EXPERTS, TOKENS, CHOSEN, HIDDEN, INNER = 4, 5, 2, 6, 3


@dataclass(frozen=True)
class ExpertsCase:
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = 0.0
    interleaved: int = 0
    biases: bool = False


@pytest.mark.parametrize(
    "case",
    [
        ExpertsCase(),
        ExpertsCase(interleaved=1),
        ExpertsCase(1.702, 1.0, 0.8, 1, True),
        ExpertsCase(biases=True),
    ],
    ids=str,
)
def test_equals_experts_written_out(case: ExpertsCase) -> None:
    import onnxruntime as ort

    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    feeds = {
        "hidden": draw(TOKENS, HIDDEN),
        "indices": np.argsort(random.random((TOKENS, EXPERTS)), axis=1)[:, :CHOSEN],
        "weights": draw(TOKENS, CHOSEN),
        "gate_up": draw(EXPERTS, 2 * INNER, HIDDEN),
        "down": draw(EXPERTS, HIDDEN, INNER),
    }
    if case.biases:
        feeds |= {"gate_up_bias": draw(EXPERTS, 2 * INNER), "down_bias": draw(EXPERTS, HIDDEN)}
    function = dialect.experts(biases=case.biases)
    inputs = [
        ir.Value(name=n, shape=ir.Shape(a.shape), type=ir.TensorType(ir.DataType.from_numpy(a.dtype)))
        for n, a in feeds.items()
    ]
    attributes = {n: getattr(case, n) for n in ("alpha", "beta", "limit", "interleaved")}
    node = ir.Node(DIALECT, dialect.EXPERTS, inputs, ir.convenience.convert_attributes(attributes))
    node.outputs[0].name, node.outputs[0].type = "output", ir.TensorType(ir.DataType.FLOAT)
    imports = {"": OPSET, DIALECT: VERSION}
    graph = ir.Graph(inputs, node.outputs, nodes=[node], name="g", opset_imports=imports)
    data = ir.to_proto(ir.Model(graph, ir_version=10, functions=[function])).SerializeToString()
    (found,) = ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)

    expected = np.zeros((TOKENS, HIDDEN))
    for t in range(TOKENS):
        for e, weight in zip(feeds["indices"][t], feeds["weights"][t], strict=True):
            both = feeds["gate_up"][e] @ feeds["hidden"][t]
            both = both + (feeds["gate_up_bias"][e] if case.biases else 0)
            gate, up = (both[::2], both[1::2]) if case.interleaved else (both[:INNER], both[INNER:])
            if case.limit:
                gate, up = np.minimum(gate, case.limit), np.clip(up, -case.limit, case.limit)
            inner = gate / (1 + np.exp(-case.alpha * gate)) * (up + case.beta)
            expected[t] += weight * (feeds["down"][e] @ inner + (feeds["down_bias"][e] if case.biases else 0))
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)
