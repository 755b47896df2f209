"""The language-model head on each row's last token only."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from llmc.config import Dtype
from llmc.graph.interface import CHOSEN_TOKENS
from tests.lowering import lower
from tests.models import tiny_config
from tests.passes.harness import copy_of, graph_of, lowered, run_pass
from tests.state_store import run_steps

BEFORE = ("linear", "rms-norm", "rotary", "group-query-attention")


def test_logits_of_each_rows_last_token() -> None:
    before, graph, report = lowered("last-token-logits", "llama", BEFORE)
    assert report.applied == (None,)
    assert graph.logits == "last"
    assert graph.interface().outputs[0].shape == ("batch", 1, 256)
    ids = np.random.default_rng(0).integers(3, 250, (2, 9))
    mask, positions = np.ones_like(ids), np.tile(np.arange(9), (2, 1))
    mask[1, 6:] = 0  # the second row ends before the last slot
    every = run_steps(before, ids, mask, positions, prompt=9)
    expected = np.stack([every[0, 8:], every[1, 5:6]])
    np.testing.assert_allclose(run_steps(graph, ids, mask, positions, prompt=9), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "sequence", "slots"),
    [
        ([[1, 1, 1, 1], [1, 1, 0, 0]], 4, [3, 1]),
        ([[1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]], 3, [2, 0]),
        ([[0, 0, 1, 1], [1, 1, 1, 1]], 4, [3, 3]),
        ([[1, 1, 0, 0, 1], [1, 1, 1, 1, 1]], 1, [0, 0]),
        ([[1, 0, 0], [1, 1, 1]], 2, [0, 1]),
    ],
    ids=["padded on the right", "several tokens over a cache", "padded on the left", "one token", "ended"],
)
def test_the_last_slot_is_that_of_the_last_token(
    mask: list[list[int]], sequence: int, slots: list[int]
) -> None:
    session = _slots()
    ids = np.zeros((len(mask), sequence), np.int64)
    (found,) = session.run(None, {"input_ids": ids, "attention_mask": np.array(mask, np.int64)})
    assert found.reshape(-1).tolist() == slots


def _slots() -> ort.InferenceSession:
    """The nodes that find the last token's slot, alone."""
    graph = graph_of("llama", (*BEFORE, "last-token-logits"))
    chosen = next(v for n in graph.graph for v in n.outputs if v.name == CHOSEN_TOKENS)
    nodes, values = [], [chosen]
    while values:
        node = values.pop().producer()
        if node is not None and node not in nodes:
            nodes.append(node)
            values += [v for v in node.inputs if v is not None]
    assert {n.op_type for n in nodes} <= {"Shape", "Neg", "Slice", "CumSum", "Min", "ReduceSum", "Unsqueeze"}
    graph.graph.outputs[:] = [chosen]
    for node in reversed(list(graph.graph)):
        if node not in nodes:
            graph.graph.remove(node, safe=False)
    graph.graph.inputs[:] = [v for v in graph.graph.inputs if v.name in ("input_ids", "attention_mask")]
    for name, value in list(graph.graph.initializers.items()):
        if not value.uses():
            del graph.graph.initializers[name]
    data = ir.to_proto(graph.model).SerializeToString()
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"])


def test_a_cache_of_fixed_length_is_given_the_count_of_tokens() -> None:
    graph, reports = lower("llama", Dtype.FLOAT32, last="last-token-logits")
    assert reports["last-token-logits"].applied == (None,)
    assert [v.name for v in graph.graph.inputs][:3] == ["input_ids", "write_indices", "token_counts"]
    assert graph.interface().outputs[0].shape == ("batch", 1, 256)


def test_logits_that_a_mask_changes_have_a_head() -> None:
    before, graph, report = lowered("last-token-logits", "chameleon", BEFORE)
    assert (report.applied, graph.logits) == ((None,), "last")
    ids = np.random.default_rng(0).integers(3, 250, (2, 9))
    mask, positions = np.ones_like(ids), np.tile(np.arange(9), (2, 1))
    every = run_steps(before, ids, mask, positions, prompt=9)
    masked = tiny_config("chameleon").vocabulary_map
    lowest = np.finfo(np.float32).min
    assert set(np.flatnonzero((every == lowest).all(axis=(0, 1)))) == {
        place for name, place in masked.items() if name.startswith("IMG")
    }
    np.testing.assert_allclose(run_steps(graph, ids, mask, positions, prompt=9), every[:, 8:], atol=1e-5)


def test_declines_logits_that_are_no_product_with_a_weight() -> None:
    graph = graph_of("llama", BEFORE)
    head = next(v for v in graph.graph.outputs if v.name == "logits").producer()
    assert head is not None
    head.replace_input_with(1, copy_of(graph, head.inputs[1], head))  # type: ignore[arg-type]
    report = run_pass("last-token-logits", graph)
    assert [(r.code, r.node) for r in report.refusals] == [("no-head", "logits")]
    assert graph.logits == "all"
