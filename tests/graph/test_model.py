import numpy as np
import onnx_ir as ir
import pytest

from llmc.config import WeightRole
from llmc.errors import CheckpointError, GraphError
from llmc.graph.linear import find_embeddings, find_linears
from llmc.graph.match import constant_of
from llmc.graph.model import Graph, layer_of
from llmc.graph.serial import dump_graph, load_graph
from llmc.graph.verify import verify_graph
from llmc.graph.weights import LazyWeight, TensorInfo

from .decoder import HIDDEN, VOCAB, constant, node, tiny_graph, value

EMBED = "model.embed_tokens.weight"


class Store:
    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = arrays

    def infos(self) -> dict[str, TensorInfo]:
        return {n: TensorInfo(n, a.shape, ir.DataType.from_numpy(a.dtype)) for n, a in self.arrays.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.arrays[name][start:stop]


def table(dtype: type = np.float32) -> np.ndarray:
    return np.arange(VOCAB * HIDDEN).reshape(VOCAB, HIDDEN).astype(dtype)


def bound() -> Graph:
    graph = tiny_graph()
    graph.bind(Store(**{EMBED: table()}), {})
    return graph


def test_a_valid_graph_verifies() -> None:
    verify_graph(tiny_graph())
    verify_graph(bound())


def test_interface() -> None:
    interface = tiny_graph().interface()
    assert [spec.name for spec in interface.inputs][:2] == ["input_ids", "attention_mask"]
    assert interface.inputs[2].shape == ("batch", 1, "past", HIDDEN)
    assert not interface.position_ids
    assert interface.max_length == 64


def test_bind_reports_leftovers_and_fills_every_weight() -> None:
    graph = tiny_graph()
    left = graph.bind(Store(**{EMBED: table(), "vision.weight": table()}), {})
    assert left == ("vision.weight",)
    assert not list(graph.unbound())
    weight = graph.graph.initializers[EMBED].const_value
    assert isinstance(weight, LazyWeight)
    np.testing.assert_array_equal(weight.numpy(), table())


def test_bind_casts_to_the_graphs_type() -> None:
    graph = tiny_graph()
    graph.bind(Store(**{EMBED: table(np.float16)}), {})
    weight = graph.graph.initializers[EMBED].const_value
    assert weight is not None
    assert weight.numpy().dtype == np.float32


@pytest.mark.parametrize(
    ("name", "tied"), [("lm_head.weight", {}), ("other", {"lm_head.weight": "other"})], ids=["alias", "tied"]
)
def test_bind_finds_a_tied_weight_under_its_other_name(name: str, tied: dict[str, str]) -> None:
    graph = tiny_graph()
    assert graph.bind(Store(**{name: table()}), tied) == ()


def test_bind_names_what_is_missing() -> None:
    with pytest.raises(CheckpointError, match=rf"needs tensor {EMBED}, which the checkpoint does not have"):
        tiny_graph().bind(Store(other=table()), {})


def test_bind_refuses_another_shape() -> None:
    with pytest.raises(CheckpointError, match=r"has shape \(10, 8\); the model needs \(11, 8\)"):
        tiny_graph().bind(Store(**{EMBED: table()[:-1]}), {})


def test_reading_an_unbound_weight_is_an_error() -> None:
    weight = next(tiny_graph().unbound()).const_value
    assert weight is not None
    with pytest.raises(GraphError, match="read before a checkpoint was bound"):
        weight.numpy()


def test_products_and_embeddings_are_found_with_their_roles() -> None:
    graph = tiny_graph()
    (linear,) = find_linears(graph)
    assert linear.role is WeightRole.LM_HEAD
    assert (linear.in_features, linear.out_features, linear.transposed) == (HIDDEN, VOCAB, True)
    (embedding,) = find_embeddings(graph)
    assert embedding.weight is linear.weight


def test_ids_that_keep_their_shape_are_still_token_ids() -> None:
    graph = tiny_graph()
    (embedding,) = find_embeddings(graph)
    reshaped = value("reshaped", ["batch", "sequence"], ir.DataType.INT64)
    graph.graph.insert_before(
        embedding.node, node("Reshape", [embedding.indices, constant("kept", [0, 0])], reshaped)
    )
    embedding.node.replace_input_with(1, reshaped)
    assert [e.indices for e in find_embeddings(graph)] == [reshaped]


def test_constants_are_not_weights() -> None:
    graph = tiny_graph()
    assert constant_of(graph.graph.initializers["axes"]) is not None
    assert constant_of(graph.graph.initializers[EMBED]) is None
    assert [layer_of(n) for n in graph.graph if n.op_type == "CachedAttention"] == [0]


def test_dump_and_load_give_the_same_graph() -> None:
    graph = tiny_graph()
    data = dump_graph(graph)
    again = load_graph(data)
    verify_graph(again)
    assert dump_graph(again) == data
    assert again.cache == graph.cache
    assert again.aliases == graph.aliases
    assert [v.name for v in again.unbound()] == [EMBED]


def _rename_output(graph: Graph) -> None:
    graph.graph.outputs[1].name = "present.0.keys"


def _orphan_input(graph: Graph) -> None:
    graph.graph.inputs.append(value("position_ids", ["batch", "sequence"], ir.DataType.INT64))


def _orphan_weight(graph: Graph) -> None:
    orphan = value("orphan", [1])
    orphan.const_value = ir.tensor(np.zeros(1, np.float32), name="orphan")
    graph.graph.register_initializer(orphan)


def _same_name(graph: Graph) -> None:
    graph.graph.node(0).outputs[0].name = "merged"


def _out_of_order(graph: Graph) -> None:
    first, second = graph.graph.node(0), graph.graph.node(1)
    graph.graph.remove(first)
    graph.graph.insert_after(second, first)


def _lost_shape(graph: Graph) -> None:
    graph.graph.outputs[0].shape = None


def _lost_input(graph: Graph) -> None:
    graph.graph.inputs.remove(graph.graph.inputs[1])


def _no_data(graph: Graph) -> None:
    graph.graph.initializers["axes"].const_value = None


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (_rename_output, r"outputs do not match the cache: present\.0\.key, present\.0\.keys"),
        (_orphan_input, "input position_ids has no consumer"),
        (_orphan_weight, "weight orphan is not read by any node"),
        (_same_name, "two values are called merged"),
        (_out_of_order, "reads hidden, which no earlier node produces"),
        (_lost_shape, "logits has no shape"),
        (_lost_input, "reads attention_mask, which no earlier node produces"),
        (_no_data, "initializer axes has no data"),
    ],
)
def test_verify_finds_what_is_broken(sabotage: object, message: str) -> None:
    graph = tiny_graph()
    sabotage(graph)  # type: ignore[operator]
    with pytest.raises(GraphError, match=message):
        verify_graph(graph)
