"""Weights of graphs that Edge-LLM's exporter wrote: packed here word by word, as its kernel reads them."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from llmc.arrays import Array
from llmc.errors import ParityError
from llmc.servers.edgellm_graph import exported_matrices, unpack_fragments


def pack(codes: Array) -> Array:
    """Write codes (outputs, inputs) word by word; what is beyond them is 8."""
    outputs, inputs = codes.shape
    blocks, tiles = -(-outputs // 128), -(-inputs // 64)
    padded = np.full((blocks * 128, tiles * 64), 8, np.uint32)
    padded[:outputs, :inputs] = codes
    words = np.zeros((blocks, tiles, 8, 128), np.uint32)
    for block, tile, step, pair, t in np.ndindex(blocks, tiles, 4, 2, 128):
        row, column = 128 * block + 64 * pair + t // 4, 64 * tile + 16 * step + 2 * (t % 4)
        word = 0
        for place, (down, right) in enumerate(
            [(0, 0), (0, 8), (32, 0), (32, 8), (0, 1), (0, 9), (32, 1), (32, 9)]
        ):
            word |= int(padded[row + down, column + right]) << (4 * place)
        words[block, tile, 2 * step + pair, t] = word
    return words.reshape(-1, 128).view(np.int8)


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (192, 128)])
def test_codes_are_unpacked(outputs: int, inputs: int) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (outputs, inputs))
    np.testing.assert_array_equal(unpack_fragments(pack(codes), outputs, inputs), codes)


def write_graph(path: Path, codes: Array, scales: Array, order: Array) -> None:
    def constant(name: str, data: Array) -> ir.Value:
        return ir.Value(name=name, const_value=ir.tensor(data, name=name))

    values = [
        constant("order", order),
        constant("_model.model.layers.0.mlp.up_proj.qweight", pack(codes)),
        constant("_model.model.layers.0.mlp.up_proj.scales", scales),
    ]
    given = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([1, codes.shape[1]]))
    gather = ir.Node("", "Gather", [given, values[0]], [ir.AttrInt64("axis", -1)])
    sizes = {"gemm_n": codes.shape[0], "gemm_k": codes.shape[1], "group_size": 64}
    product = ir.Node(
        "trt_edgellm", "Int4GroupwiseGemmPluginV2", [gather.outputs[0], *values[1:]],
        [ir.AttrInt64(name, value) for name, value in sizes.items()],
    )  # fmt: skip
    graph = ir.Graph([given], [product.outputs[0]], nodes=[gather, product], opset_imports={"": 20})
    for value in values:
        graph.register_initializer(value)
    ir.save(ir.Model(graph, ir_version=10), path)


def test_matrices_have_the_order_of_their_inputs(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    codes, order = random.integers(0, 16, (64, 128)), random.permutation(128)
    scales = random.random((2, 64)).astype(np.float16)
    write_graph(tmp_path / "model.onnx", codes, scales, order)
    found = exported_matrices(tmp_path / "model.onnx")
    assert list(found) == ["model.layers.0.mlp.up_proj"]
    ordered = (codes - 8.0) * np.repeat(scales.T.astype(np.float32), 64, axis=1)
    np.testing.assert_array_equal(found["model.layers.0.mlp.up_proj"]()[:, order], ordered)


def test_scales_of_nvfp4_are_codes_in_turn(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    codes = random.choice([-6.0, -1.5, 0.0, 0.5, 4.0], (8, 32)).astype(ml_dtypes.float4_e2m1fn)
    scales = random.choice([0.5, 1.0, 448.0], (8, 2)).astype(ml_dtypes.float8_e4m3fn)
    whole = np.float32(0.003)
    name = "_model.model.layers.0.mlp.up_proj"
    data = {f"{name}.weight": codes, f"{name}.weight_scale": scales, f"{name}.weight_scale_2": whole}
    values = [ir.Value(name=n, const_value=ir.tensor(np.asarray(a), name=n)) for n, a in data.items()]
    inner = ir.Node("", "DequantizeLinear", values[1:])
    blocks = [ir.AttrInt64("block_size", 16), ir.AttrInt64("axis", -1)]
    outer = ir.Node("", "DequantizeLinear", [values[0], inner.outputs[0]], blocks)
    graph = ir.Graph([], [outer.outputs[0]], nodes=[inner, outer], opset_imports={"": 23})
    for value in values:
        graph.register_initializer(value)
    ir.save(ir.Model(graph, ir_version=11), tmp_path / "model.onnx")
    found = exported_matrices(tmp_path / "model.onnx")
    assert list(found) == ["model.layers.0.mlp.up_proj"]
    expected = codes.astype(np.float32) * np.repeat(scales.astype(np.float32) * whole, 16, axis=1)
    np.testing.assert_array_equal(found["model.layers.0.mlp.up_proj"](), expected)


def test_a_damaged_graph_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(ParityError, match=r"model\.onnx of Edge-LLM is not an ONNX model"):
        exported_matrices(tmp_path / "model.onnx")
