"""Engines of tiny models, built without a GPU: what is recorded, the guards, the bytes."""

import re
import resource
from dataclasses import replace
from pathlib import Path

import pytest
from onnx import TensorProto, helper, save_model

from llmc.artifact.store.folder import digest_file
from llmc.backends.tensorrt import engine as tensorrt
from llmc.backends.tensorrt.engine import build_engine, load_library, pending
from llmc.backends.tensorrt.layers import read_listing
from llmc.backends.tensorrt.log import BuildLog
from llmc.backends.tensorrt.support import NVIDIA_INDEX, EnginePlan, Library
from llmc.backends.tensorrt.worker import build_apart
from llmc.config import Dtype, Engine, EngineRule, EngineScheme, Span, WeightFormat
from llmc.errors import ResourceError, UnsupportedError
from tests.lowering import CAPACITY, write_lowered

PLAN = EnginePlan(Library.RTX, ("SM86", "SM89"), ("a10", "l4"))
ENGINE = Engine(
    kv_capacity=CAPACITY,
    batch=Span(least=1, typical=1, most=4),
    prefill=Span(least=1, typical=16, most=32),
)


def test_an_engine_and_its_record(tmp_path: Path) -> None:
    write_lowered(tmp_path, "llama", Dtype.FLOAT16)
    record, digest = build_apart(tmp_path, PLAN, ENGINE)
    assert record.file == "sm86-sm89.engine"
    assert digest == digest_file(tmp_path / record.file)
    assert record.library == "tensorrt_rtx"
    assert record.sms == PLAN.sms
    assert record.version == load_library(Library.RTX).__version__
    assert record.weight_bytes
    prefill, decode = record.phases
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.fused_attention == decode.fused_attention == 3
    assert prefill.layers_per_decoder_layer >= decode.layers_per_decoder_layer > 0
    assert prefill.shapes["input_ids"] == ((1, 1), (1, 16), (4, 32))
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (4, 1))
    assert decode.shapes["past_key_values.0.key"] == tuple((rows, 2, CAPACITY, 16) for rows in (1, 1, 4))
    assert build_apart(tmp_path, PLAN, ENGINE)[1] == digest  # another process, the same bytes


@pytest.mark.parametrize(
    ("scheme", "stored", "sms"),
    [
        (EngineScheme(format=WeightFormat.INT4, block_size=16), "Int4", PLAN.sms),
        (EngineScheme(format=WeightFormat.INT8), "Int8", PLAN.sms),
        (EngineScheme(format=WeightFormat.INT8, activations="static"), "Int8 x Int8", PLAN.sms),
        (EngineScheme(format=WeightFormat.FP8, activations="static"), "FP8 x FP8", ("SM89",)),
        (EngineScheme(format=WeightFormat.NVFP4, activations="dynamic"), "FP4E2M1 x FP4E2M1", ("SM120",)),
    ],
)
def test_products_are_computed_from_quantized_factors(
    scheme: EngineScheme, stored: str, sms: tuple[str, ...], tmp_path: Path
) -> None:
    write_lowered(tmp_path, "llama", Dtype.FLOAT16, (EngineRule(scheme=scheme),))
    record, _ = build_engine(tmp_path, replace(PLAN, sms=sms), ENGINE)
    assert record.quantized_products == {stored: 4 * 3 + 1}
    assert not record.sparse_weights


def test_kernels_for_sparse_weights_are_allowed_where_weights_are_sparse(tmp_path: Path) -> None:
    write_lowered(tmp_path, "llama", Dtype.FLOAT16)
    record, digest = build_apart(tmp_path, PLAN, ENGINE, sparse=True)
    assert record.sparse_weights
    assert digest == digest_file(tmp_path / str(record.file))


def _write(folder: Path, nodes: list[object], inputs: dict[str, list[int | str]], domain: str = "") -> None:
    half = TensorProto.FLOAT16
    kinds = {"lengths": TensorProto.INT64}
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info(n, kinds.get(n, half), shape) for n, shape in inputs.items()],
        [helper.make_tensor_value_info("y", half, None)],
    )
    opsets = [helper.make_opsetid("", 24), *([helper.make_opsetid(domain, 1)] if domain else [])]
    save_model(helper.make_model(graph, opset_imports=opsets, ir_version=11), folder / "model.onnx")


def test_an_input_that_the_parser_drops_is_an_error(tmp_path: Path) -> None:
    heads: list[int | str] = ["batch", 4, "sequence", 64]
    node = helper.make_node(
        "Attention", ["q", "k", "v", "", "", "", "lengths"], ["y"], name="attention", is_causal=1
    )
    _write(tmp_path, [node], {"q": heads, "k": heads, "v": heads, "lengths": ["batch"]})
    with pytest.raises(UnsupportedError, match="parser ignores the inputs lengths of the graph"):
        build_engine(tmp_path, PLAN, ENGINE)


def test_a_refused_node_is_named(tmp_path: Path) -> None:
    node = helper.make_node("QuickGelu", ["x"], ["y"], name="gelu", domain="com.microsoft")
    _write(tmp_path, [node], {"x": ["batch", 8]}, "com.microsoft")
    with pytest.raises(UnsupportedError, match=r"TensorRT refuses node gelu \(QuickGelu\)"):
        build_apart(tmp_path, PLAN, ENGINE)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_what_the_log_says() -> None:
    log = BuildLog()
    log.take(3, "Max Scratch Memory: 128 bytes")
    log.take(3, "Total Weights Memory: 4096 bytes")
    log.take(1, "it\n failed")
    assert (log.scratch, log.weights, log.reason()) == ([128], 4096, "it failed")


def test_a_reason_is_of_the_last_call() -> None:
    log = BuildLog()

    def fail(*texts: str) -> bool:
        for text in texts:
            log.take(1, text)
        return False

    assert not log.attempt(fail, "an old failure")
    assert not log.attempt(fail, "1", "2", "3", "4")
    assert log.reason() == "2; 3; 4"
    assert not log.attempt(fail)
    assert log.reason() == "it gives no reason"


def test_libraries_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ResourceError, match="tensorrt, which builds the engine, cannot be imported"
    ) as caught:
        load_library(Library.TENSORRT)
    assert caught.value.hint == f"pip install tensorrt {NVIDIA_INDEX}"
    monkeypatch.setitem(tensorrt.OLDEST, Library.RTX, (99, 0))
    with pytest.raises(ResourceError, match=r"tensorrt_rtx 1\..* is older than 99.0"):
        load_library(Library.RTX)


def _names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The layers of each profile without the numbers that TensorRT gives them, and their places in a log."""
    kept: list[BuildLog] = []
    monkeypatch.setattr(tensorrt, "BuildLog", lambda: kept.append(BuildLog()) or kept[-1])
    build_engine(folder, PLAN, ENGINE)
    layers = read_listing(kept[0].lines)
    return [[re.sub(r"\d+", "", layer.name) for layer in layers if layer.phase == phase] for phase in (0, 1)]


def test_the_choice_of_a_token_adds_its_own_kernels_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lowered(tmp_path, "llama", Dtype.FLOAT16, last="last-token-logits")
    chosen = _names(tmp_path, monkeypatch)
    monkeypatch.setattr(tensorrt, "add_network_choice", lambda *_: None)
    plain = _names(tmp_path, monkeypatch)
    for with_choice, without in zip(chosen, plain, strict=True):
        assert with_choice == [*without, "__myl_Resh_myl_", "__myl_Topk_myl_"]


def test_a_process_that_dies_leaves_the_build_alive(tmp_path: Path) -> None:
    write_lowered(tmp_path, "llama", Dtype.FLOAT16)
    plan = EnginePlan(Library.RTX, ("SM1",), ("nothing",))
    message = "the process that builds the engine for SM1 ended with 1: AttributeError"
    with pytest.raises(ResourceError, match=message):
        build_apart(tmp_path, plan, ENGINE)


def test_a_full_disk_leaves_no_part_of_an_engine(tmp_path: Path) -> None:
    write_lowered(tmp_path, "llama", Dtype.FLOAT16)
    before = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # the process that builds inherits it
    try:
        with pytest.raises(
            ResourceError, match=r"sm86-sm89.engine cannot be written: File too large"
        ) as caught:
            build_apart(tmp_path, PLAN, ENGINE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.hint == "free some space, or choose another place for the output"
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == before


def test_a_pending_engine_has_no_file() -> None:
    record = pending(EnginePlan(Library.TENSORRT, ("SM90",), ("h100-sxm",)))
    assert record.file is None
    assert record.version is None
