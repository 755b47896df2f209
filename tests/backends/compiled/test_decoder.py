"""Whole tiny decoders through compiled kernels, beside the same graph through ONNX Runtime's operators."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from llmc.artifact.manifest import Manifest
from llmc.artifact.store.folder import open_artifact
from llmc.artifact.store.integrity import require_intact
from llmc.backends.compiled.isa import InstructionSet, choose_isa
from llmc.backends.compiled.lower import compile_kernels
from llmc.backends.compiled.program import SAME_TOKENS
from llmc.backends.compiled.toolchain import find_compiler
from llmc.backends.onnxruntime.generate import generate_tokens
from llmc.backends.onnxruntime.lookup import verifying_model
from llmc.checkpoint import open_checkpoint
from llmc.errors import ConfigError, ExitCode, KernelError, ParityError, ResourceError, UnsupportedError
from llmc.graph.interface import CHOSEN_TOKENS
from llmc.graph.model import PACKED
from llmc.pipeline import build
from llmc.pipeline.steps.compile import lower_graph
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.runtime.ort_model import OrtModel
from llmc.validate.packed import open_packed
from llmc.validate.stored import read_stored
from llmc.validate.weights import compare_weights
from tests.backends.compiled.graphs import (
    Array,
    GraphBuilder,
    open_session,
    quantized,
    usable_sets,
    write_compiled,
)
from tests.models import EOS, VOCAB_SIZE, save_tiny_model

STEPS = 12
#: Hybrids with each of their kinds of layers.
HYBRIDS = {
    "qwen3_5_text": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
}
Build = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Artifacts of tiny models by type and target, each built once."""
    folder = tmp_path_factory.mktemp("built")

    def make(model_type: str, target: str) -> Path:
        model, output = folder / model_type, folder / f"{model_type}-{target}"
        if not model.exists():
            save_tiny_model(
                model_type, model, tokenizer=True, eos_token_id=EOS, **HYBRIDS.get(model_type, {})
            )
        if not output.exists():
            plan = plan_build(str(model), target=target, profile="local", output=output, verify=False)
            build(plan, SilentProgress())
        return output

    return make


def manifest(path: Path) -> Manifest:
    return open_artifact(path).manifest


def logits(path: Path, *, threads: int = 1, share: bool = True, batch: int = 1, length: int = 70) -> Array:
    """Prefill and decode steps; with several rows each is three tokens shorter than the one before."""
    rng = np.random.default_rng(3)
    model = OrtModel(path, manifest(path).interface, threads=threads, share_buffer=share)
    mask = np.ones((batch, length), np.int64)
    for row in range(batch):
        mask[row, length - 3 * row :] = 0
    found = [model.prefill(rng.integers(0, VOCAB_SIZE, (batch, length)), mask, steps=STEPS)]
    found += [model.decode(rng.integers(0, VOCAB_SIZE, (batch, 1))) for _ in range(STEPS)]
    return np.concatenate(found[1:] if batch > 1 else found, axis=1)


def difference(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "gpt_neox", "falcon"])
def test_decoders_equal_onnxruntimes_operators(model_type: str, built: Build) -> None:
    """Weights and activations are rounded alike, up to float16 scales; sums are in another order."""
    compiled, plain = built(model_type, "cpu-int4-compiled"), built(model_type, "cpu-int4")
    record = manifest(compiled).kernels
    assert record is not None
    assert record.nodes >= 24
    assert difference(logits(compiled), logits(plain)) < 0.06
    assert difference(logits(compiled, batch=3, length=20), logits(plain, batch=3, length=20)) < 0.06


def test_a_lookup_behind_replaced_ids_shares_the_matrix_of_the_head(built: Build) -> None:
    """Gemma 3 replaces the ids of images; codes outside of the kernels would have scales of their own."""
    compiled, plain = built("gemma3", "cpu-int4-compiled"), built("gemma3", "cpu-int4")
    record = manifest(compiled).kernels
    assert record is not None
    assert not [left for left in record.outside if left.operator == "GatherBlockQuantized"]
    stored = ir.load(compiled / "model.onnx").graph.initializers
    assert [name for name in stored if name.startswith("lm_head.weight")] == ["lm_head.weight.packed"]
    assert difference(logits(compiled, batch=2, length=9), logits(plain, batch=2, length=9)) < 0.06


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_a_hybrid_is_one_region_that_equals_onnxruntimes_operators(model_type: str, built: Build) -> None:
    compiled, plain = built(model_type, "cpu-int4-compiled"), built(model_type, "cpu-int4")
    record = manifest(compiled).kernels
    assert record is not None
    assert record.regions == 1
    assert not {left.operator for left in record.outside} & {"CausalConv", "LinearAttention", "Transpose"}
    found = logits(compiled, length=20)
    assert difference(found, logits(plain, length=20)) < 0.06
    np.testing.assert_array_equal(logits(compiled, length=20, threads=2, share=False), found)
    assert difference(logits(compiled, batch=3, length=20), logits(plain, batch=3, length=20)) < 0.06


def test_a_llama_is_one_region(built: Build) -> None:
    record = manifest(built("llama", "cpu-int4-compiled")).kernels
    assert record is not None
    assert record.regions == 1
    lengths = {"Cast", "ReduceSum", "Shape", "Squeeze", "Sub"}
    last = {"CumSum", "Min", "Neg", "ReduceSum", "Slice", "Unsqueeze"}
    assert {left.operator for left in record.outside} == lengths | last


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_packed_weights_are_read_back(model_type: str, built: Build) -> None:
    """What kernels read is what ONNX Runtime's operators read, up to scales in float16."""
    compiled, plain = built(model_type, "cpu-int4-compiled"), built(model_type, "cpu-int4")
    checkpoint = open_checkpoint(str(plain.parent / model_type))
    sources = lower_graph(checkpoint, manifest(plain).target, SilentProgress()).sources
    expected = read_stored(plain, sources)
    found = read_stored(compiled, sources)
    assert set(found) == set(expected) == set(sources)
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name].whole(), tensor.whole(), rtol=1e-3, atol=0, err_msg=name)
        np.testing.assert_array_equal(found[name].read(5, 7), found[name].whole()[5:7])
    parity = compare_weights(found, sources)
    assert parity.unread == ()
    assert len(parity.changed) >= 8
    snr, *_ = parity.measurements
    assert snr.value is not None
    assert 14 < snr.value < 30


def test_a_packed_block_that_was_lost(built: Build, tmp_path: Path) -> None:
    copy = shutil.copytree(built("llama", "cpu-int4-compiled"), tmp_path / "copy")
    model = str(built("llama", "cpu-int4").parent / "llama")
    sources = lower_graph(open_checkpoint(model), manifest(copy).target, SilentProgress()).sources
    good = compare_weights(read_stored(copy, sources), sources)
    packed = next(v for n, v in ir.load(copy / "model.onnx").graph.initializers.items() if ".packed" in n)
    tensor = packed.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    with Path(tensor.path).open("r+b") as file:
        file.seek(tensor.offset or 0)
        file.write(bytes(256))  # codes of the first block of 16 outputs
    bad = compare_weights(read_stored(copy, sources), sources)
    assert bad.digest != good.digest
    _, block, _ = bad.measurements
    assert block.value is not None
    assert block.value < 4 < 8 < float(good.measurements[1].value or 0)
    assert str(packed.name).startswith(block.detail.rpartition(" ")[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layout: [], "no operator states the layout of the packed weight"),
        (lambda layout: [*layout[:3], 16, 1], r"has shape \(\d+, \d+\), its layout \(\d+, \d+\)"),
    ],
)
def test_packed_weights_whose_layout_is_not_stated(
    change: Callable[[list[int]], list[int]], message: str, built: Build, tmp_path: Path
) -> None:
    copy = shutil.copytree(built("llama", "cpu-int4-compiled"), tmp_path / "copy")
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    stated = next(p for n in model.graph.node for p in n.metadata_props if p.key == PACKED)
    layouts = {name: change(layout) for name, layout in json.loads(stated.value).items()}
    stated.value = json.dumps({name: layout for name, layout in layouts.items() if layout})
    onnx.save(model, copy / "model.onnx")
    graph = ir.load(copy / "model.onnx").graph
    value = next(v for n, v in graph.initializers.items() if n.endswith(".packed"))
    with pytest.raises(ParityError, match=message):
        open_packed(value)


def test_threads_and_buffers_do_not_change_a_bit(built: Build) -> None:
    path = built("llama", "cpu-int4-compiled")
    alone = logits(path)
    np.testing.assert_array_equal(logits(path, threads=2), alone)
    np.testing.assert_array_equal(logits(path, threads=5), alone)
    np.testing.assert_array_equal(logits(path, share=False), alone)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_a_token_has_the_bits_that_it_has_alone(model_type: str, built: Build, tmp_path: Path) -> None:
    """In steps of up to 8 tokens: what prompt lookup rests on."""
    path, verifying = built(model_type, "cpu-int4-compiled"), tmp_path / "verifying"
    shutil.copytree(path, verifying)
    data = verifying_model(path / "model.onnx")
    assert data is not None
    (verifying / "model.onnx").write_bytes(data)
    own = manifest(path).interface
    wide = tuple(
        spec.model_copy(update={"shape": ("batch", "sequence", VOCAB_SIZE)})
        if spec.name == "logits"
        else spec
        for spec in own.outputs
    )
    every = own.model_copy(update={"outputs": wide, "logits": "all"})
    ids = np.random.default_rng(5).integers(0, VOCAB_SIZE, (1, 30 + 72))
    alone = OrtModel(path, own, threads=1, share_buffer=True)
    together = OrtModel(verifying, every, threads=2, share_buffer=True)
    alone.prefill(ids[:, :30], steps=72)
    expected = np.concatenate([alone.decode(ids[:, i : i + 1]) for i in range(30, 102)], axis=1)
    for length in (2, 3, 4, 6, SAME_TOKENS):
        together.prefill(ids[:, :30], steps=72)
        found = [together.decode(ids[:, i : i + length]) for i in range(30, 102, length)]
        np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)


def test_more_chosen_tokens_than_there_are(built: Build, tmp_path: Path) -> None:
    path = built("llama", "cpu-int4-compiled")
    copy = shutil.copytree(path, tmp_path / "copy")
    model = ir.load(path / "model.onnx")
    chosen = next(v for node in model.graph for v in node.outputs if v.name == CHOSEN_TOKENS)
    given = ir.Value(name="given", shape=ir.Shape(["batch", "some", 1]), type=chosen.type)
    chosen.replace_all_uses_with(given)
    model.graph.inputs.append(given)
    next(v for v in model.graph.outputs if v.name == "logits").shape = ir.Shape(["batch", "some", VOCAB_SIZE])
    (copy / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    feeds = {"input_ids": np.array([[1, 2]]), "attention_mask": np.ones((1, 2), np.int64)}
    for slot in manifest(path).interface.cache:
        feeds[slot.past_key] = feeds[slot.past_value] = np.zeros(
            (1, slot.kv_heads, 0, slot.key_width), np.float16
        )
    session = open_session(copy)
    good = session.run(["logits"], feeds | {"given": np.array([[[1], [0]]])})[0]
    assert good.shape == (1, 2, VOCAB_SIZE)
    with pytest.raises(Exception, match="more tokens are chosen than a sequence has"):
        session.run(None, feeds | {"given": np.array([[[0], [1], [1]]])})
    with pytest.raises(Exception, match="a chosen token is none of this step"):
        session.run(None, feeds | {"given": np.array([[[0], [2]]])})


def test_onnxruntime_genai_serves_it(built: Build) -> None:
    path = built("llama", "cpu-int4-compiled")
    config = json.loads((path / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["custom_ops_library"] == "kernels.so"
    assert config["search"]["past_present_share_buffer"] is True
    found = generate_tokens(path, [5, 9, 33], 8)
    model = OrtModel(path, manifest(path).interface, threads=1, share_buffer=True)
    token, expected = int(model.prefill(np.array([[5, 9, 33]]), steps=8)[0, -1].argmax()), []
    while len(expected) < 8 and token != EOS:
        expected.append(token)
        token = int(model.decode(np.array([[token]]))[0, -1].argmax())
    assert found == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": np.array([[1, VOCAB_SIZE]])}, "a token id is outside of the vocabulary"),
        ({"input_ids": np.array([[1, -1]])}, "a token id is outside of the vocabulary"),
        (
            {"attention_mask": np.ones((1, 3), np.int64)},
            "seqlens_k counts more tokens than the past has slots",
        ),
        ({"attention_mask": np.zeros((1, 4), np.int64)}, "seqlens_k is below the number of tokens"),
        (
            {"attention_mask": np.ones((1, 1), np.int64)},
            "total_sequence_length is below the number of tokens",
        ),
        ({"attention_mask": np.ones((1, 300), np.int64), "slots": 300}, "beyond the tables of the rotary"),
    ],
)
def test_inputs_that_do_not_fit_are_errors(changes: dict[str, object], message: str, built: Build) -> None:
    path = built("llama", "cpu-int4-compiled")
    slots = int(str(changes.get("slots", 0)))
    feeds = {"input_ids": np.array([[1, 2]]), "attention_mask": np.ones((1, 2), np.int64)}
    for slot in manifest(path).interface.cache:
        feeds[slot.past_key] = feeds[slot.past_value] = np.zeros(
            (1, slot.kv_heads, slots, slot.key_width), np.float16
        )
    feeds |= {k: v for k, v in changes.items() if k != "slots"}  # type: ignore[misc]
    with pytest.raises(Exception, match=message):
        open_session(path).run(None, feeds)


def test_a_full_shared_cache_is_an_error_not_a_write_past_its_end(built: Build) -> None:
    path = built("llama", "cpu-int4-compiled")
    model = OrtModel(path, manifest(path).interface, threads=1, share_buffer=True)
    model.prefill(np.array([[3, 4, 5]]), steps=0)
    model._capacity += 1
    with pytest.raises(ParityError, match="failed at batch 1, sequence 1, total 4"):
        model.decode(np.array([[6]]))


def test_a_changed_library_is_found(built: Build, tmp_path: Path) -> None:
    copy = shutil.copytree(built("llama", "cpu-int4-compiled"), tmp_path / "copy")
    library = copy / "kernels.so"
    library.write_bytes(library.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match=r"is damaged: kernels\.so has changed"):
        require_intact(open_artifact(copy))


def test_a_cpu_without_the_instruction_set_is_told_at_load(tmp_path: Path) -> None:
    x = (builder := GraphBuilder()).input("x", 32)
    out = builder.matmul(x, quantized(np.ones((16, 32), np.float32), 4, 32, True), "w")
    er = "Feature{7, &Registers::ebx, 27, kZmm}"  # of one generation of accelerators
    isa = InstructionSet("AVX-512 ER", "x86_64", frozenset((er,)), usable_sets()[-1].flags)
    write_compiled(builder.finish([out]), tmp_path, isa)
    with pytest.raises(Exception, match="compiled for CPUs with AVX-512 ER; this CPU does not support it"):
        open_session(tmp_path)


def test_a_profile_without_kernels_is_not_supported() -> None:
    with pytest.raises(
        UnsupportedError,
        match="there are kernels for AVX-512 VNNI, AVX2 and NEON dotprod, but profile old has sse2",
    ):
        choose_isa(("sse2",), "old")
    assert choose_isa(("avx2", "fma", "f16c"), "new").name == "AVX2"


def test_a_graph_without_products_is_not_supported() -> None:
    x = (builder := GraphBuilder()).input("x", 32)
    graph = builder.finish([builder.node("Relu", [x], "y", 32)])
    with pytest.raises(KernelError, match="nothing that kernels can compute") as caught:
        compile_kernels(graph, usable_sets()[0], find_compiler())
    assert (
        caught.value.hint
        == "use a target without compiled kernels; Relu: its region has nothing that is worth a kernel"
    )


def test_a_build_without_a_compiler_keeps_what_was_there(
    built: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = built("llama", "cpu-int4-compiled")
    before = manifest(path)
    monkeypatch.setenv("LLMC_CXX", "/nowhere/c++")
    plan = plan_build(
        before.model.ref, target="cpu-int4-compiled", profile="local", output=path, verify=False
    )
    with pytest.raises(ResourceError, match="cannot be started") as caught:
        build(plan, SilentProgress())
    assert caught.value.exit_code is ExitCode.RESOURCES
    assert manifest(path) == before
