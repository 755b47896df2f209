"""Layers of an engine are read in each form in which TensorRT lists them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx as trt
from onnx import TensorProto, helper, save_model

from llmc.artifact.engine import EngineRecord
from llmc.backends.tensorrt import engine as tensorrt_engine
from llmc.backends.tensorrt.engine import build_engine
from llmc.backends.tensorrt.inspection import EngineFacts, inspect_build
from llmc.backends.tensorrt.layers import (
    Layer,
    UnreadableLayersError,
    read_inspection,
    read_listing,
    require_fused_attention,
    require_quantized_products,
)
from llmc.backends.tensorrt.log import BuildLog
from llmc.backends.tensorrt.outline import Outline
from llmc.backends.tensorrt.support import EnginePlan, Library
from llmc.config import Dtype, Engine, EngineRule, EngineScheme, Span, WeightFormat
from llmc.errors import UnsupportedError
from tests.lowering import CAPACITY, write_lowered

ENGINE = Engine(
    kv_capacity=CAPACITY, batch=Span(least=1, typical=1, most=4), prefill=Span(least=1, typical=16, most=32)
)
PLAN = EnginePlan(Library.RTX, ("SM86",), ("a10",))
#: The example of kDETAILED in NVIDIA's developer guide ("Engine Inspector"), without fields not read.
DOCUMENTED = {
    "Name": "node_of_gpu_0/res4_0_branch2a_1 + node_of_gpu_0/res4_0_branch2a_bn_1",
    "LayerType": "CaskConvolution",
    "Inputs": [
        {
            "Name": "gpu_0/res3_3_branch2c_bn_3",
            "Dimensions": [16, 512, 28, 28],
            "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format.",
        }
    ],
    "Outputs": [
        {
            "Name": "gpu_0/res4_0_branch2a_bn_2",
            "Dimensions": [16, 256, 28, 28],
            "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format.",
        }
    ],
    "TacticValue": "0x11bde0e1d9f2f35d",
    "Metadata": "[ONNX Layer: node_of_gpu_0/res4_0_branch2a_1]\x1f[ONNX Layer: node_of_gpu_0/res4_0_bn_1]",
}


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the lines of TensorRT-RTX's log on the layers of a quantized engine."""
    folder = tmp_path_factory.mktemp("listed")
    scheme = EngineScheme(format=WeightFormat.INT4, block_size=16)
    write_lowered(folder, "llama", Dtype.FLOAT16, (EngineRule(scheme=scheme),))
    kept: list[BuildLog] = []

    class Kept(BuildLog):
        def __init__(self) -> None:
            super().__init__()
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_engine, "BuildLog", Kept)
        build_engine(folder, PLAN, ENGINE)
    return kept[0].lines


def _tensors(text: str) -> list[dict[str, Any]]:
    pattern = r"\{ Name: (.*?), Dimensions: (\[[-\d,]*\]).*?, Datatype: (\w+), Format: (.*?) \}"
    return [
        {"Name": name, "Dimensions": json.loads(shape), "Datatype": dtype, "Format": layout}
        for name, shape, dtype, layout in re.findall(pattern, text)
    ]


def _as_json(lines: list[str], *, old: bool) -> str:
    """Return the same layers as the inspector's JSON, with the fields of TensorRT-RTX or of TensorRT 10."""
    rows = []
    for line in lines:
        match = re.match(
            r"Name: (.*?), LayerType: (\w+), Inputs: (.*?), Constants: (.*?), Outputs: (.*), TacticName: "
            r"(.*?), StreamId: 0, Metadata: (.*)$",
            line,
        )
        assert match is not None
        name, kind, inputs, constants, outputs, tactic, metadata = match.groups()
        row: dict[str, Any] = {"Name": name, "LayerType": kind, "Inputs": _tensors(inputs)}
        if old:
            row["Inputs"] += _tensors(constants)
        else:
            row["Constants"] = _tensors(constants)
        row |= {"Outputs": _tensors(outputs), "TacticName": tactic, "StreamId": 0, "Metadata": metadata}
        for tensor in row["Inputs"] + row["Outputs"] if old else []:
            tensor["Format/Datatype"] = tensor.pop("Datatype")
            del tensor["Format"]
        rows.append(row)
    names = ("input_ids", "write_indices", "token_counts", "logits")
    bound = [f"{name}{profile}" for name in names for profile in ("", " [profile 1]")]
    past = re.findall(r"Name: ((?:past_key_values|present)[\w.]*(?: \[profile 1\])?)", "".join(lines))
    return json.dumps({"Layers": rows, "Bindings": [*bound, *past]})


@pytest.mark.parametrize("old", [False, True])
def test_both_forms_give_the_same_layers(listing: list[str], old: bool) -> None:
    layers = read_listing(listing)
    assert {layer.phase for layer in layers} == {0, 1}
    assert any("Int4" in layer.constants for layer in layers)
    assert read_inspection(_as_json(listing, old=old)) == layers


def test_layers_outside_of_graphs_have_their_own_profile() -> None:
    names = ["a_myl0_1", "b_myl1_1", "reformat", "reformat [profile 1]"]
    tensors = ["x", "x [profile 1]", "y", "y"]
    rows = [
        {"Name": name, "Inputs": [{"Name": tensor, "Datatype": "Half"}], "Metadata": "[ONNX Layer: n]"}
        for name, tensor in zip(names, tensors, strict=True)
    ]
    assert [layer.phase for layer in read_inspection(json.dumps({"Layers": rows}))] == [0, 1, 0, 1]


def test_the_documented_form() -> None:
    text = json.dumps({"Layers": [DOCUMENTED], "Bindings": ["gpu_0/res3_3_branch2c_bn_3"]})
    (layer,) = read_inspection(text.replace("\\u001f", "\x1f"))
    assert layer.nodes == {"node_of_gpu_0/res4_0_branch2a_1", "node_of_gpu_0/res4_0_bn_1"}
    assert (layer.inputs, layer.constants) == (("Int8",), ())
    for described, dtype in {"Row major linear FP16 format": "Half", "Half": "Half", "": ""}.items():
        row = {**DOCUMENTED, "Inputs": [{"Name": "x", "Format/Datatype": described}], "Constants": []}
        assert read_inspection(json.dumps({"Layers": [row]}))[0].inputs == (dtype,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "does not give JSON"),
        ("[]", "gives only names of layers, or none"),
        (json.dumps({"Layers": ["a", "b"], "Bindings": ["x"]}), "gives only names of layers, or none"),
        (json.dumps({"Layers": [{"Name": "a"}]}), "none of 1 layers names the ONNX nodes"),
        (json.dumps({"Layers": []}), "none of 0 layers names the ONNX nodes"),
    ],
)
def test_a_form_that_is_not_understood_is_told(text: str, message: str) -> None:
    with pytest.raises(UnreadableLayersError, match=message):
        read_inspection(text)


def test_the_log_of_either_library_may_list_layers() -> None:
    line = "Name: a_myl0_1, LayerType: kgen, Constants: [], Outputs: [], Metadata: [ONNX Layer: n]"
    for heading in ("Layers:", "Engine Layer Information:", "Engine Layer Information:\nLayers:"):
        log = BuildLog()
        log.take(4, f"{heading}\n{line}")
        assert read_listing(log.lines) == [Layer("a_myl0_1", 0, frozenset({"n"}), (), ())]
    log.lines = ["Layer(Myelin): {ForeignNode[a...b]}, Tactic: 0x0, x[Half(1,8)] -> y[Half(1,8)]"]
    with pytest.raises(UnreadableLayersError, match="none of 1 layers"):
        read_listing(log.lines)


def _plan(folder: Path) -> tuple[Any, BuildLog]:
    """The smallest engine that TensorRT-RTX builds, and the log of its build without any layer."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"], name="mul")],
        "one",
        [value("x", TensorProto.FLOAT, [2])],
        [value("y", TensorProto.FLOAT, [2])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    save_model(model, folder / "m.onnx")
    log = BuildLog()
    builder = trt.Builder(logger := tensorrt_engine.make_logger(trt, log))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse_from_file(str(folder / "m.onnx"))
    plan = builder.build_serialized_network(network, tensorrt_engine._configure(trt, builder, PLAN))
    log.lines = ["Layer(kgen): something else"]
    return plan, log


def test_an_engine_whose_layers_cannot_be_read_is_kept_where_it_took_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    plan, log = _plan(tmp_path)
    with pytest.raises(UnreadableLayersError):
        inspect_build(trt, Library.RTX, plan, log, 1)
    # Without a GPU the same library stands in for TensorRT: it cannot load the engine for its inspector.
    inspection = inspect_build(trt, Library.TENSORRT, plan, log, 2)
    assert (inspection.layers, inspection.scratch) == (None, (None, None))
    assert str(inspection.obstacle).startswith("TensorRT cannot load the engine again: ")
    assert "uda" in str(inspection.obstacle)
    record = _record(Library.TENSORRT, inspection)
    assert record.doubt == inspection.obstacle
    assert [(phase.layers, phase.fused_attention) for phase in record.phases] == [(None, None)] * 2


def _record(library: Library, inspection: EngineFacts) -> EngineRecord:
    outline = Outline(attention=frozenset({"attention"}), products={}, middle=frozenset({"attention"}))
    return tensorrt_engine._record(EnginePlan(library, ("SM90",), ("h100",)), inspection, [{}, {}], outline)


def test_an_engine_that_fuses_nothing_is_refused_or_in_doubt() -> None:
    layers = [Layer("softmax", phase, frozenset({"attention"}), (), ()) for phase in range(2)]
    inspection = EngineFacts(layers, (1, 2))
    with pytest.raises(UnsupportedError, match="fuses 0 of 1 attention layers in prefill"):
        _record(Library.RTX, inspection)
    record = _record(Library.TENSORRT, inspection)
    assert str(record.doubt).startswith("TensorRT fuses 0 of 1 attention layers in prefill")
    assert [(p.layers, p.layers_per_decoder_layer, p.fused_attention) for p in record.phases] == [
        (1, 1, None)
    ] * 2
    assert [p.scratch_bytes for p in record.phases] == [1, 2]


def test_attention_that_is_not_fused_is_an_error() -> None:
    layers = [
        Layer("_gemm_mha_v2_myl0_1", 0, frozenset({"layer.0/attention"}), ("Half",), ()),
        Layer("__myl_Softmax_myl0_2", 0, frozenset({"layer.1/attention"}), ("Half",), ()),
    ]
    both = frozenset({"layer.0/attention", "layer.1/attention"})
    message = "TensorRT fuses 1 of 2 attention layers in prefill; the first not fused is layer.1/attention"
    with pytest.raises(UnsupportedError, match=message):
        require_fused_attention(layers, both, 0, "prefill")
    with pytest.raises(UnsupportedError, match="fuses 0 of 1 attention layers in decode"):
        require_fused_attention(layers, frozenset({"layer.0/attention"}), 1, "decode")


def test_a_product_from_a_float_factor_is_an_error() -> None:
    head = frozenset({"head"})
    layers = [Layer("__myl_Fc_myl1_1", 1, head, ("Half",), ("Half", "Float"))]
    message = "computes head in decode from weights in Float, Half, but the graph has it in Int4"
    with pytest.raises(UnsupportedError, match=message):
        require_quantized_products(layers, {"head": ("Int4", None)}, 1, "decode")
    with pytest.raises(UnsupportedError, match="computes head in prefill from weights in no type"):
        require_quantized_products(layers, {"head": ("Int4", None)}, 0, "prefill")
    layers = [Layer("a", 0, head, ("Half",), ("Int8",)), Layer("b", 0, head, ("Int8",), ("Half",))]
    message = "computes head in prefill from activations in Half, but the graph has it in Int8"
    with pytest.raises(UnsupportedError, match=message):
        require_quantized_products(layers, {"head": ("Int8", "Int8")}, 0, "prefill")
