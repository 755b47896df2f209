"""The quantized operators in ONNX Runtime against x @ dequantized.T, through the graph rewrite."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import pytest

from llmc.config import Dtype, Quantization, WeightRole
from llmc.errors import CheckpointError, UnsupportedError
from llmc.graph.model import LAYER, Graph
from llmc.graph.weights import CastRows, ConcatRows, LazyWeight, StoredRows, TensorInfo, WeightGroup
from llmc.quantize.blocks import dequantize_blocks
from llmc.quantize.encode import quantize_blocks
from llmc.quantize.linear import choose_scheme, quantize_weights
from llmc.quantize.stream import quantize_rows, weight_snr
from tests.quantize.reference import Array, scheme

VOCAB = 50


@dataclass
class Tensors:
    """A `WeightStore` of arrays that remembers the largest number of rows it was asked for at once."""

    arrays: dict[str, Array]
    widest: dict[str, int] = field(default_factory=dict)

    def infos(self) -> dict[str, TensorInfo]:
        return {n: TensorInfo(n, a.shape, ir.DataType.from_numpy(a.dtype)) for n, a in self.arrays.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        part = self.arrays[name][start:stop]
        self.widest[name] = max(self.widest.get(name, 0), len(part))
        return part

    def rows(self, name: str) -> StoredRows:
        return StoredRows(self, self.infos()[name])


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def decoder(
    store: Tensors, *, tied: bool = False, torch_layout: bool = True, dtype: ir.DataType = ir.DataType.FLOAT
) -> Graph:
    """input_ids -> embedding `hidden` -> linear `mid` -> head `logits`, from tensors embed, proj and head."""

    def value(name: str, dims: list[int | str], kind: ir.DataType = dtype) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(kind))

    def weight(name: str) -> ir.Value:
        rows: StoredRows | CastRows = store.rows(name)
        if rows.dtype != dtype:
            rows = CastRows(rows, dtype)
        made = value(name, list(rows.shape))
        made.const_value = LazyWeight.from_rows(name, rows)
        return made

    def product(
        source: ir.Value, factor: ir.Value, target: ir.Value, behind_transpose: bool
    ) -> list[ir.Node]:
        if not behind_transpose:
            return [ir.node("MatMul", [source, factor], outputs=[target], name=f"{target.name}/product")]
        assert factor.shape is not None
        turned = value(f"{factor.name}.turned", [int(d) for d in reversed(factor.shape.numpy())])
        return [
            ir.node("Transpose", [factor], {"perm": [1, 0]}, outputs=[turned]),
            ir.node("MatMul", [source, turned], outputs=[target], name=f"{target.name}/product"),
        ]

    table, inner = weight("embed"), weight("proj")
    head = table if tied else weight("head")
    width = store.arrays["embed"].shape[1]
    ids = value("input_ids", ["batch", "sequence"], ir.DataType.INT64)
    hidden, mid = (value(n, ["batch", "sequence", width]) for n in ("hidden", "mid"))
    logits = value("logits", ["batch", "sequence", VOCAB])
    nodes = [
        ir.node("Gather", [table, ids], outputs=[hidden]),
        *product(hidden, inner, mid, torch_layout),
        *product(mid, head, logits, tied or torch_layout),
    ]
    nodes[-1].metadata_props[LAYER] = "0"
    weights = [table, inner] if tied else [table, inner, head]
    graph = ir.Graph(
        [ids],
        [logits, hidden, mid],
        nodes=nodes,
        initializers=weights,
        opset_imports={"": 21},
        name="decoder",
    )
    return Graph(ir.Model(graph, ir_version=10), cache=(), layers=1)


def tensors(width: int, *, tied: bool = False, torch_layout: bool = True) -> Tensors:
    proj, head = random(width, width, seed=1), random(VOCAB, width, seed=2)
    arrays = {"embed": random(VOCAB, width), "proj": proj if torch_layout else np.ascontiguousarray(proj.T)}
    if not tied:
        arrays["head"] = head if torch_layout else np.ascontiguousarray(head.T)
    return Tensors(arrays)


def everything(level: int = 0, **kind: object) -> Quantization:
    return Quantization.model_validate({"accuracy_level": level, "rules": ({"scheme": scheme(**kind)},)})  # type: ignore[arg-type]


def run(graph: Graph, ids: Array) -> Iterator[Array]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    data = ir.to_proto(graph.model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    yield from session.run(["hidden", "mid", "logits"], {"input_ids": ids})


def ops(graph: Graph) -> list[str]:
    return [n.op_type for n in graph.graph]


IDS = np.array([[3, 49, 0], [7, 7, 21]], np.int64)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [256, 72, 33], ids=lambda w: f"K{w}")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_operators_compute_with_the_dequantized_weights(
    bits: int, size: int, symmetric: bool, width: int, tied: bool
) -> None:
    store = tensors(width, tied=tied)
    graph = decoder(store, tied=tied)
    quantize_weights(graph, everything(bits=bits, block_size=size, symmetric=symmetric), Dtype.FLOAT32)
    kind = scheme(bits, size, symmetric)
    read_back = {n: dequantize_blocks(quantize_blocks(a, kind)) for n, a in store.arrays.items()}
    hidden, mid, logits = run(graph, IDS)
    np.testing.assert_array_equal(hidden, read_back["embed"][IDS])
    np.testing.assert_allclose(mid, hidden @ read_back["proj"].T, rtol=1e-5, atol=2e-4)
    head = read_back["embed" if tied else "head"]
    np.testing.assert_allclose(logits, mid @ head.T, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [64, 33])
def test_weights_stored_inputs_first(symmetric: bool, width: int) -> None:
    """As the Conv1D layers of GPT-2 have them: no Transpose node."""
    store = tensors(width, torch_layout=False)
    graph = decoder(store, torch_layout=False)
    quantize_weights(graph, everything(block_size=32, symmetric=symmetric), Dtype.FLOAT32)
    kind = scheme(4, 32, symmetric)
    hidden, mid, logits = run(graph, IDS)
    for source, name, found in ((hidden, "proj", mid), (mid, "head", logits)):
        read_back = dequantize_blocks(quantize_blocks(store.arrays[name].T, kind))
        np.testing.assert_allclose(found, source @ read_back.T, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_float16_activations(bits: int) -> None:
    store = tensors(64, tied=True)
    graph = decoder(store, tied=True, dtype=ir.DataType.FLOAT16)
    quantize_weights(graph, everything(bits=bits, symmetric=False), Dtype.FLOAT16)
    blocks = quantize_blocks(store.arrays["proj"], scheme(bits, 32, False), np.float16)
    hidden, mid, _ = run(graph, IDS)
    assert hidden.dtype == mid.dtype == np.float16
    expected = hidden.astype(np.float32) @ dequantize_blocks(blocks).T
    np.testing.assert_allclose(mid.astype(np.float32), expected, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [256, 33])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_float16_scales_below_float32_activations(bits: int, width: int, tied: bool) -> None:
    store = tensors(width, tied=tied)
    graph = decoder(store, tied=tied)
    rules = everything(bits=bits, symmetric=False).model_copy(update={"scales": "float16"})
    wide = quantize_weights(decoder(store, tied=tied), everything(bits=bits, symmetric=False), Dtype.FLOAT32)
    report = quantize_weights(graph, rules, Dtype.FLOAT32)
    scales = sum(len(a) * -(-width // 32) for a in store.arrays.values())
    assert wide.bytes - report.bytes == 2 * scales
    kind = scheme(bits, 32, False)
    read_back = {n: dequantize_blocks(quantize_blocks(a, kind, np.float16)) for n, a in store.arrays.items()}
    hidden, mid, logits = run(graph, IDS)
    np.testing.assert_array_equal(hidden, read_back["embed"][IDS])
    np.testing.assert_allclose(mid, hidden @ read_back["proj"].T, rtol=1e-5, atol=2e-4)
    head = read_back["embed" if tied else "head"]
    np.testing.assert_allclose(logits, mid @ head.T, rtol=1e-5, atol=2e-3)


def test_float16_scales_are_folded_where_activations_are_int8() -> None:
    """Accuracy level 4 packs codes with their scales, which have to be known by then."""
    store = tensors(256, tied=True)
    graph = decoder(store, tied=True)
    rules = everything(level=4, symmetric=False).model_copy(update={"scales": "float16"})
    quantize_weights(graph, rules, Dtype.FLOAT32)
    read_back = dequantize_blocks(quantize_blocks(store.arrays["proj"], scheme(symmetric=False), np.float16))
    hidden, mid, _ = run(graph, IDS)
    expected = hidden @ read_back.T
    assert np.linalg.norm(mid - expected) <= 0.02 * np.linalg.norm(expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_int8_activations_stay_close(bits: int) -> None:
    store = tensors(256, tied=True)
    graph = decoder(store, tied=True)
    quantize_weights(graph, everything(level=4, bits=bits), Dtype.FLOAT32)
    read_back = dequantize_blocks(quantize_blocks(store.arrays["proj"], scheme(bits)))
    hidden, mid, _ = run(graph, IDS)
    expected = hidden @ read_back.T
    assert np.linalg.norm(mid - expected) <= 0.02 * np.linalg.norm(expected)


def test_tied_matrix_is_stored_once() -> None:
    graph = decoder(tensors(64, tied=True), tied=True)
    report = quantize_weights(graph, everything(), Dtype.FLOAT32)
    assert ops(graph) == ["Reshape", "GatherBlockQuantized", "MatMulNBits", "MatMulNBits"]
    names = {f"{t}.{k}" for t in ("embed", "proj") for k in ("codes", "scales")}
    assert set(graph.graph.initializers) == names | {"embed.entry_shape"}
    embed = next(t for t in report.tensors if t.name == "embed")
    assert embed.role is WeightRole.LM_HEAD
    assert embed.bytes == VOCAB * 64 // 2 + VOCAB * 2 * 4


def test_members_of_a_group_come_from_one_computation() -> None:
    graph = decoder(tensors(64))
    quantize_weights(graph, everything(symmetric=False), Dtype.FLOAT32)
    lazy = {n: v.const_value for n, v in graph.graph.initializers.items() if n.startswith("proj.")}
    assert set(lazy) == {"proj.codes", "proj.scales", "proj.zero_points"}
    groups = {id(t.group) for t in lazy.values() if isinstance(t, LazyWeight)}
    assert len(groups) == 1
    for tensor in lazy.values():
        assert isinstance(tensor, LazyWeight)
        array = tensor.group.compute()[tensor.key]
        assert array.shape == tuple(tensor.shape.numpy())
        assert array.dtype == tensor.dtype.numpy()
        assert tensor.sources == ("proj",)


def test_names_layers_and_leftovers_of_the_rewrite() -> None:
    graph = decoder(tensors(33))
    quantize_weights(graph, everything(), Dtype.FLOAT32)
    assert ops(graph) == ["GatherBlockQuantized", "Slice", "MatMulNBits", "MatMulNBits"]
    head = graph.graph.node(-1)
    assert head.metadata_props[LAYER] == "0"
    assert head.name == "logits/product"
    assert [o.name for o in graph.graph.outputs] == ["logits", "hidden", "mid"]
    assert graph.graph.outputs[0].shape == ir.Shape(["batch", "sequence", VOCAB])
    assert graph.model.opset_imports["com.microsoft"] == 1


def test_the_first_rule_that_fits_decides() -> None:
    four, eight = scheme(4), scheme(8, 128)
    quantization = Quantization.model_validate(
        {
            "accuracy_level": 4,
            "rules": (
                {"match": "model.layers.0.*", "scheme": None},
                {"role": "lm_head", "scheme": eight},
                {"role": "linear", "match": "*.down_proj.weight", "scheme": eight},
                {"role": "linear", "scheme": four},
            ),
        }
    )
    rules = quantization.rules
    assert choose_scheme(rules, WeightRole.LINEAR, "model.layers.0.mlp.down_proj.weight") is None
    assert choose_scheme(rules, WeightRole.LINEAR, "model.layers.1.mlp.down_proj.weight") == eight
    assert choose_scheme(rules, WeightRole.LINEAR, "model.layers.1.mlp.up_proj.weight") == four
    assert choose_scheme(rules, WeightRole.LM_HEAD, "lm_head.weight") == eight
    assert choose_scheme(rules, WeightRole.EMBEDDING, "model.embed_tokens.weight") is None


def test_what_no_rule_fits_stays_in_float() -> None:
    store = tensors(64)
    graph = decoder(store)
    rules = ({"role": "linear", "scheme": scheme(8)},)
    quantization = Quantization.model_validate({"accuracy_level": 0, "rules": rules})
    report = quantize_weights(graph, quantization, Dtype.FLOAT32)
    assert ops(graph) == ["Gather", "MatMulNBits", "Transpose", "MatMul"]
    assert [t.scheme for t in report.tensors] == [None, scheme(8), None]
    floats, ints = 2 * VOCAB * 64 * 4, 64 * 64 + 64 * 2 * 4
    assert report.bytes == floats + ints
    assert report.bits_per_weight == pytest.approx(8 * (floats + ints) / (2 * VOCAB * 64 + 64 * 64))
    hidden, _, _ = run(graph, IDS)
    np.testing.assert_array_equal(hidden, store.arrays["embed"][IDS])


def test_a_computed_weight_is_refused() -> None:
    graph = decoder(tensors(64))
    data = random(64, 64)
    group = WeightGroup(("a", "b"), lambda: {"value": data})
    graph.graph.initializers["proj"].const_value = LazyWeight(
        name="proj", dtype=ir.DataType.FLOAT, shape=(64, 64), group=group, key="value"
    )
    with pytest.raises(UnsupportedError, match=r"weight proj is computed from a, b") as caught:
        quantize_weights(graph, everything(), Dtype.FLOAT32)
    assert caught.value.hint == "give it a rule with scheme: null"


def test_a_damaged_tensor_is_named_when_it_is_written() -> None:
    store = tensors(64)
    store.arrays["proj"][5, 5] = np.nan
    graph = decoder(store)
    quantize_weights(graph, everything(), Dtype.FLOAT32)
    damaged = graph.graph.initializers["proj.codes"].const_value
    assert damaged is not None
    with pytest.raises(CheckpointError, match="proj has values in outputs 0:64 that are not finite"):
        damaged.numpy()


def test_streaming_reads_parts_and_equals_the_whole() -> None:
    import ml_dtypes

    store = Tensors({"a": random(1500, 960).astype(ml_dtypes.bfloat16), "b": random(100, 960, seed=5)})
    kind = scheme(4, 64, False, "mse")
    joined = ConcatRows((store.rows("a"), CastRows(store.rows("b"), ir.DataType.BFLOAT16)))
    found = quantize_rows(joined, kind, np.float32, name="ab")
    expected = quantize_blocks(joined.rows(0, 1600), kind)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)
    store.widest.clear()
    quantize_rows(joined, kind, np.float32, name="ab")
    assert max(store.widest.values()) * 960 <= 1 << 20


def test_a_float16_cast_is_looked_through() -> None:
    """The codes come from the checkpoint's values, not from what float16 leaves of them."""
    store = Tensors({"w": random(4, 32) * np.float32(1e-7)})
    rows = CastRows(store.rows("w"), ir.DataType.FLOAT16)
    found = quantize_rows(rows, scheme(8), np.float32, name="w")
    np.testing.assert_array_equal(found.codes, quantize_blocks(store.arrays["w"], scheme(8)).codes)


def test_weight_snr() -> None:
    store = Tensors({"w": random(64, 256), "zeros": np.zeros((4, 32), np.float32)})
    plain, searched = (weight_snr(store.rows("w"), scheme(method=m)) for m in ("rtn", "mse"))
    assert 21 < plain < searched - 0.3 < 22
    assert weight_snr(store.rows("zeros"), scheme()) == np.inf
