"""Matrices of unlike bits and blocks in one region, with scales that are stored in float16."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from llmc.artifact.store.folder import open_artifact
from llmc.backends.compiled.isa import InstructionSet
from llmc.backends.compiled.lower import compile_kernels
from llmc.backends.compiled.program import SAME_TOKENS
from llmc.backends.compiled.toolchain import find_compiler
from llmc.checkpoint import open_checkpoint
from llmc.config import CacheType, Dtype, Quantization, WeightScheme
from llmc.errors import UnsupportedError
from llmc.graph.model import Graph
from llmc.graph.weights import LazyWeight, WeightGroup
from llmc.pipeline import build
from llmc.pipeline.steps.rebuild import rebuild
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.quantize.blocks import dequantize_blocks
from llmc.quantize.encode import quantize_blocks
from llmc.quantize.linear import quantize_weights
from llmc.runtime.ort_model import OrtModel
from llmc.validate.packed import open_packed
from llmc.validate.stored import read_stored
from tests.backends.compiled.graphs import (
    Array,
    GraphBuilder,
    code_units,
    open_session,
    quantize_activations,
    quantized,
    usable_sets,
    with_minima,
    write_compiled,
)
from tests.models import EOS, VOCAB_SIZE, save_tiny_model
from tests.quantize.reference import scheme
from tests.quantize.test_linear import VOCAB, decoder, tensors

#: Schemes of an embedding, a linear layer and a head: as cpu-mixed allocates them.
SCHEMES = {
    "unlike": {"embed": scheme(8, 128, True), "proj": scheme(4, 128, False), "head": scheme(4, 32, False)},
    "eights": {"embed": scheme(4, 64, False), "proj": scheme(8, 128, True), "head": scheme(8, 32, True)},
    "tied": {"embed": scheme(8, 128, True), "proj": scheme(4, 64, False)},
}
#: Features: two blocks of 128, of which the second is not full; and one block that is not full.
WIDTHS = {"unlike": 144, "eights": 144, "tied": 80}


def small_decoder(case: str) -> tuple[Graph, dict[str, Array]]:
    """Embedding, linear layer and head, quantized; and the weights that are read back, (outputs, inputs)."""
    schemes: dict[str, WeightScheme] = SCHEMES[case]
    store = tensors(WIDTHS[case], tied="head" not in schemes)
    graph = decoder(store, tied="head" not in schemes)
    rules = tuple({"match": name, "scheme": kind} for name, kind in schemes.items())
    stated = {"accuracy_level": 4, "scales": "float16", "rules": rules}
    quantize_weights(graph, Quantization.model_validate(stated), Dtype.FLOAT32)
    read_back = {
        name: dequantize_blocks(quantize_blocks(store.arrays[name], kind, np.float16))
        for name, kind in schemes.items()
    }
    return graph, read_back


@pytest.mark.parametrize("isa", usable_sets(), ids=lambda isa: isa.name)
@pytest.mark.parametrize("case", SCHEMES)
def test_bits_of_every_kind_in_one_region(case: str, isa: InstructionSet, tmp_path: Path) -> None:
    graph, weights = small_decoder(case)
    made = write_compiled(graph, tmp_path, isa)
    assert (made.regions, made.outside) == (1, ())
    assert [node.op_type for node in graph.graph] == ["Region0"]
    read = {
        value.name: open_packed(value)
        for value in ir.load(tmp_path / "model.onnx").graph.initializers.values()
    }
    assert set(read) == {f"{name}.packed" for name in weights}
    for name, expected in weights.items():
        np.testing.assert_array_equal(read[f"{name}.packed"].rows(0, len(expected)), expected)
    session = open_session(tmp_path)
    for tokens in (7, 40):  # few rows straight from packed weights, and many
        ids = np.random.default_rng(tokens).integers(0, VOCAB, (1, tokens))
        hidden, mid, logits = session.run(["hidden", "mid", "logits"], {"input_ids": ids})
        np.testing.assert_array_equal(hidden, weights["embed"][ids])
        for given, found, name in ((hidden, mid, "proj"), (mid, logits, "head")):
            name = name if name in weights else "embed"
            kind = SCHEMES[case][name]
            product = quantize_activations(given, kind.block_size) @ weights[name].T.astype(np.float64)
            errors = np.linalg.norm(found - product, axis=-1) / np.linalg.norm(product, axis=-1)
            # The reference rounds what lies on a border, as codes of an embedding do, to the other side.
            assert errors.max() < 1e-2
            assert np.quantile(errors, 0.25) < 1e-6


@pytest.mark.parametrize("isa", usable_sets(), ids=lambda isa: isa.name)
def test_codes_with_float_minima(isa: InstructionSet, tmp_path: Path) -> None:
    """Read back and looked up they are code * scale + minimum to the last bit, few rows and many."""
    builder, outputs, tables = GraphBuilder(), [], {}
    builder.inputs.append(builder.value("input_ids", ["batch", "sequence"], ir.DataType.INT64))
    for bits, block in ((4, 32), (8, 32), (4, 16)):
        name = f"table{bits}by{block}"
        blocks, values = with_minima(VOCAB, 64, bits, block)
        tables[f"{name}.packed"] = (block, values)
        weights = builder.packed(blocks, name)
        rows = builder.embed(builder.inputs[0], blocks, name, weights)
        outputs += [rows, builder.matmul(rows, blocks, name, weights)]
    made = write_compiled(builder.finish(outputs), tmp_path, isa)
    assert (made.regions, made.outside) == (1, ())
    for packed in ir.load(tmp_path / "model.onnx").graph.initializers.values():
        _, values = tables[str(packed.name)]
        np.testing.assert_array_equal(open_packed(packed).rows(0, VOCAB), values)
        np.testing.assert_array_equal(open_packed(packed).rows(17, 30), values[17:30])
    session = open_session(tmp_path)
    for tokens in (1, 7, 70):
        ids = np.random.default_rng(tokens).integers(0, VOCAB, (1, tokens))
        found = session.run(None, {"input_ids": ids})
        for (block, values), rows, logits in zip(tables.values(), found[0::2], found[1::2], strict=True):
            np.testing.assert_array_equal(rows, values[ids])
            product = quantize_activations(rows, block) @ values.T.astype(np.float64)
            errors = np.linalg.norm(logits - product, axis=-1) / np.linalg.norm(product, axis=-1)
            assert np.quantile(errors, 0.25) < 2e-6


def test_eight_bits_with_integer_zero_points() -> None:
    builder = GraphBuilder()
    blocks = quantized(np.ones((16, 32), np.float32), 8, 32, False)
    out = builder.matmul(builder.input("x", 32), blocks, "w")
    with pytest.raises(UnsupportedError) as caught:
        compile_kernels(builder.finish([out]), usable_sets()[0], find_compiler())
    assert (caught.value.hint or "").endswith("; MatMulNBits: 8-bit weights have integer zero points")


def test_scales_of_another_matrix() -> None:
    """Packing takes them from where the codes are, so that others would be left out."""
    builder = GraphBuilder()
    blocks = quantized(np.ones((16, 32), np.float32), 4, 32, True)
    builder.matmul(builder.input("x", 32), blocks, "w")
    other = WeightGroup(("other",), lambda: {"scales": blocks.scales})
    scales = builder.weights[1]
    scales.const_value = LazyWeight(
        name="w.scales", dtype=ir.DataType.FLOAT, shape=(16, 1), group=other, key="scales"
    )
    with pytest.raises(UnsupportedError) as caught:
        compile_kernels(builder.finish([builder.nodes[0].outputs[0]]), usable_sets()[0], find_compiler())
    assert (caught.value.hint or "").endswith("; MatMulNBits: its scales are not stored with its codes")


def test_scales_that_are_computed() -> None:
    builder = GraphBuilder()
    blocks = quantized(np.ones((16, 32), np.float32), 4, 32, True)
    out = builder.matmul(builder.input("x", 32), blocks, "w")
    doubled = ir.node("Add", [builder.weights[1]] * 2, name="doubled")
    builder.nodes[0].replace_input_with(2, doubled.outputs[0])
    builder.nodes.insert(0, doubled)
    with pytest.raises(UnsupportedError) as caught:
        compile_kernels(builder.finish([out]), usable_sets()[0], find_compiler())
    assert "MatMulNBits: its weights are not an initializer" in str(caught.value.hint)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tied head; its 64 features fill no block of 128."""
    folder = tmp_path_factory.mktemp("mixed") / "model"
    return save_tiny_model("llama", folder, tokenizer=True, eos_token_id=EOS, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """Artifacts of a target with kernels and without, both over a float32 cache, each built once."""
    folder = tmp_path_factory.mktemp("built")
    ways = {
        "compiled": {"kv_cache": CacheType.FLOAT32},
        "plain": {"kernels": "onnxruntime", "kv_cache": None},
    }

    def make(target: str) -> list[Path]:
        outputs = [folder / f"{target}-{name}" for name in ways]
        for output, changes in zip(outputs, ways.values(), strict=True):
            plan = plan_build(str(model), target=target, profile="local", output=output, verify=False)
            if not output.exists():
                changed = plan.target.model_copy(update=changes)
                build(plan.model_copy(update={"target": changed}), SilentProgress())
        return outputs

    return make


#: Codes between an activation and the nearest border below which the last bits of a sum may move it over:
#: seven times the most that was seen (2 targets, 10 seeds, with AVX-512 and with AVX2).
BORDER = 2e-4


class Borders:
    """The activations of every product of a plain artifact, beside the borders where they are rounded."""

    def __init__(self, folder: Path) -> None:
        model = ir.load(folder / "model.onnx")
        products = [node for node in model.graph if node.op_type == "MatMulNBits"]
        self.blocks = {str(n.inputs[0].name): n.attributes["block_size"].as_int() for n in products}
        model.graph.outputs.extend(dict.fromkeys(node.inputs[0] for node in products))
        options = ort.SessionOptions()
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder.resolve())
        )
        self.session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)

    def distance(self, ids: Array, mask: Array, pasts: dict[str, object]) -> float:
        """Of the activation that is nearest to a border, in codes, in one step."""
        feeds = {
            **pasts,
            "input_ids": ort.OrtValue.ortvalue_from_numpy(ids),
            "attention_mask": ort.OrtValue.ortvalue_from_numpy(mask),
        }
        rows = self.session.run_with_ort_values(list(self.blocks), feeds)
        codes = (code_units(x.numpy(), block) for x, block in zip(rows, self.blocks.values(), strict=True))
        return min(float(np.abs(np.abs(x - np.rint(x)) - 0.5).min()) for x in codes)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("target", ["cpu-mixed-compiled", "cpu-int8-compiled"])
def test_a_target_with_kernels_and_without(
    target: str, seed: int, built: Callable[[str], list[Path]], model: Path
) -> None:
    """Weights are the same to the last bit; products round activations alike and sum in another order."""
    folders = built(target)
    found = []
    for folder in folders:
        artifact = open_artifact(folder).manifest
        sources = rebuild(open_checkpoint(str(model)), artifact.target, (), folder, SilentProgress()).sources
        session = OrtModel(folder, artifact.interface, threads=1, share_buffer=False)
        found.append((artifact, read_stored(folder, sources), session))
    (compiled, stored, kernels), (other, expected, plain) = found
    assert compiled.weights == other.weights
    assert set(stored) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(stored[name].whole(), tensor.whole(), err_msg=name)
    assert compiled.kernels is not None
    assert compiled.kernels.regions == 1
    assert not {left.operator for left in compiled.kernels.outside} & {"MatMulNBits", "Reshape"}
    ids = np.random.default_rng(seed).integers(0, VOCAB_SIZE, (1, 100))
    errors, distances = compare_steps(kernels, plain, Borders(folders[1]), ids)
    clear = distances > BORDER
    assert np.count_nonzero(clear) >= 20
    assert errors[clear].max() < 1e-5
    assert errors.max() < 0.05


def compare_steps(kernels: OrtModel, plain: OrtModel, borders: Borders, ids: Array) -> tuple[Array, Array]:
    """Difference of logits, keys and values of each step, and the distance of its activations from a border.

    Each step begins with the same cache on both sides, so that a code that is rounded to the other side
    changes nothing in later steps. The first has as many tokens as attention takes in float32.
    """
    names = [n for slot in plain.interface.cache for n in (slot.past_key, slot.past_value)]
    errors, distances = [], []
    for step in np.split(ids, np.arange(SAME_TOKENS, ids.shape[1]), axis=1):
        first = not errors
        before = plain.state()
        expected = plain.prefill(step, steps=0) if first else plain.decode(step)
        if not first:
            kernels.restore(before)
        logits = kernels.prefill(step, steps=0) if first else kernels.decode(step)
        found, wanted = ([x.numpy() for x in model.state().cache] for model in (kernels, plain))
        pairs = zip([logits, *found], [expected, *wanted], strict=True)
        errors.append(max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs))
        empty = [ort.OrtValue.ortvalue_from_numpy(x[:, :, :0]) for x in wanted]
        pasts = dict(zip(names, empty if first else before.cache, strict=True))
        distances.append(borders.distance(step, plain.state().mask, pasts))
    return np.array(errors), np.array(distances)
