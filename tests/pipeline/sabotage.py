"""Ways to break a good artifact: each changes files of a copy, whose manifest then describes them."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

import llmc.passes
from llmc.artifact.manifest import MANIFEST
from llmc.artifact.store.folder import digest_folder
from llmc.config import Metric
from llmc.graph.model import Graph, layer_of
from llmc.graph.report import PassReport

M = Metric
PARITY = frozenset({M.PREFILL_MAX_ABS, M.CHUNKS_MAX_ABS, M.DECODE_MAX_ABS, M.RAGGED_MAX_ABS})


class Edit:
    """The graph of an artifact, changed and written back in one file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "model.onnx"
        self.model = onnx.load(self._path)
        self.graph = self.model.graph

    def __enter__(self) -> "Edit":
        return self

    def __exit__(self, *_: object) -> None:
        self._path.with_name("model.onnx.data").unlink(missing_ok=True)
        onnx.save(self.model, self._path)

    def nodes(self, op: str) -> list[Any]:
        found = [n for n in self.graph.node if n.op_type == op]
        assert found, f"no {op} in this artifact"
        return found

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self._tensor(name)).copy()

    def replace(self, name: str, array: np.ndarray) -> None:
        self._tensor(name).CopyFrom(numpy_helper.from_array(array, name))

    def constant(self, name: str, value: Any) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def attribute(self, node: Any, name: str, value: Any) -> None:
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    def filter_output(self, name: str, make: Callable[[str, str], list[Any]]) -> None:
        """Put nodes `make(before, after)` between an output and what makes it."""
        for node in self.graph.node:
            node.output[:] = [f"{name}/before" if o == name else o for o in node.output]
        self.graph.node.extend(make(f"{name}/before", name))

    def filter_input(self, node: Any, index: int, make: Callable[[str, str], list[Any]]) -> None:
        before = node.input[index]
        node.input[index] = f"{before}/filtered_{node.name}"
        at = list(self.graph.node).index(node)
        for made in reversed(make(before, node.input[index])):
            self.graph.node.insert(at, made)

    def _tensor(self, name: str) -> Any:
        return next(t for t in self.graph.initializer if t.name == name)


def reseal(folder: Path, **changes: Any) -> None:
    """Make the manifest describe the files as they are now."""
    path = folder / MANIFEST
    stated = json.loads(path.read_text(encoding="utf-8"))
    stated["files"] = {n: f.model_dump() for n, f in digest_folder(folder, {}).items()}
    stated |= changes
    path.write_text(json.dumps(stated), encoding="utf-8")


def copy_artifact(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def _matrix(edit: Edit, part: str) -> str:
    """The initializer of layer 1's matrix `part`, in float or its codes."""
    names = [t.name for t in edit.graph.initializer]
    return next(n for n in names if n.startswith(f"model.layers.1.{part}.weight") and "scale" not in n)


def scale_logits(folder: Path) -> None:
    with Edit(folder) as edit:
        factor = edit.constant("factor", np.float32(1.01))
        edit.filter_output("logits", lambda a, b: [helper.make_node("Mul", [a, factor], [b])])


def zero_weight_block(folder: Path) -> None:
    with Edit(folder) as edit:
        name = _matrix(edit, "mlp.down_proj")
        array = edit.array(name)
        if array.dtype == np.uint8:  # the codes of zero
            zeros = edit.array(name.replace("codes", "zero_points")).reshape(-1)[0] & 15
            array[0, 0] = zeros | zeros << 4
        else:
            array[0, :32] = 0
        edit.replace(name, array)


def swap_layers(folder: Path) -> None:
    with Edit(folder) as edit:
        weights = {t.name for t in edit.graph.initializer}

        def swap(name: str) -> str:
            if name not in weights:
                return name
            first, second = "model.layers.0.mlp.", "model.layers.1.mlp."
            return {first: name.replace(first, second), second: name.replace(second, first)}.get(
                name[: len(first)], name
            )

        for node in edit.graph.node:
            node.input[:] = [swap(name) for name in node.input]


def swap_weights_of_layers(folder: Path) -> None:
    with Edit(folder) as edit:
        names = [
            t.name for t in edit.graph.initializer if t.name.startswith("model.layers.0.self_attn.o_proj")
        ]
        for name in names:
            other = name.replace("layers.0", "layers.1")
            first, second = edit.array(name), edit.array(other)
            edit.replace(name, second)
            edit.replace(other, first)


def stale_kv_head(folder: Path) -> None:
    """One head of the keys of layer 1 loses its newest position."""
    with Edit(folder) as edit:
        # Times 0 at the last position of head 1, 1 elsewhere.
        head = edit.constant("stale/head", np.array([0.0, 1.0], np.float32).reshape(1, 2, 1, 1))
        one, axis = edit.constant("stale/one", np.float32(1)), edit.constant("stale/axis", np.array([2]))
        last, end = (
            edit.constant("stale/last", np.array([-1])),
            edit.constant("stale/end", np.array([1 << 40])),
        )

        def make(a: str, b: str) -> list[Any]:
            return [
                helper.make_node("Slice", [a, last, end, axis], ["stale/new"]),
                helper.make_node("Sub", [one, head], ["stale/keep"]),
                helper.make_node("Mul", ["stale/new", "stale/keep"], ["stale/newest"]),
                helper.make_node(
                    "Slice", [a, edit.constant("stale/zero", np.array([0])), last, axis], ["stale/old"]
                ),
                helper.make_node("Concat", ["stale/old", "stale/newest"], [b], axis=2),
            ]

        edit.filter_output("present.1.key", make)
    _grow_cache(folder)


def _grow_cache(folder: Path) -> None:
    def change(config: Any) -> None:
        config["search"]["past_present_share_buffer"] = False

    edit_json(folder / "genai_config.json", change)


def cache_off_by_one(folder: Path) -> None:
    """Decode steps are told that the cache is one shorter than it is."""
    with Edit(folder) as edit:
        one = edit.constant("one", np.array([1], np.int64))
        extra = [
            helper.make_node("Shape", ["input_ids"], ["off/length"], start=1, end=2),
            helper.make_node("Equal", ["off/length", one], ["off/decoding"]),
            helper.make_node("Cast", ["off/decoding"], ["off/by"], to=TensorProto.INT32),
            helper.make_node("Sub", ["seqlens_k/right", "off/by"], ["off/less"]),
            helper.make_node("Max", ["off/less", edit.constant("off/zero", np.int32(0))], ["seqlens_k"]),
        ]
        for node in edit.graph.node:
            node.output[:] = ["seqlens_k/right" if o == "seqlens_k" else o for o in node.output]
        at = next(i for i, n in enumerate(edit.graph.node) if "seqlens_k/right" in n.output)
        for node in reversed(extra):
            edit.graph.node.insert(at + 1, node)


def change_rope_base(folder: Path) -> None:
    with Edit(folder) as edit:
        names = [t.name for t in edit.graph.initializer if t.name.startswith("rotary_")]
        positions, half = edit.array(names[0]).shape
        angles = np.outer(np.arange(positions), 9000.0 ** -(np.arange(half) / half))
        for name in names:
            edit.replace(name, (np.cos if "cos" in name else np.sin)(angles).astype(np.float32))


def ignore_mask(folder: Path) -> None:
    """Every slot of the batch counts as a token."""
    with Edit(folder) as edit:
        node = edit.nodes("ReduceSum")[0]

        def make(a: str, b: str) -> list[Any]:
            shape = [helper.make_node("Shape", [a], ["mask/shape"])]
            one = numpy_helper.from_array(np.array([1], np.int64))
            return [*shape, helper.make_node("ConstantOfShape", ["mask/shape"], [b], value=one)]

        edit.filter_input(node, 0, make)


def wrong_padding_side(folder: Path) -> None:
    stated = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    reseal(folder, interface=stated["interface"] | {"padding": "left"})


def drop_output(folder: Path) -> None:
    with Edit(folder) as edit:
        kept = [o for o in edit.graph.output if o.name != "present.2.value"]
        del edit.graph.output[:]
        edit.graph.output.extend(kept)


def nan_at_one_position(folder: Path) -> None:
    """NaN in one logit of the step that makes the sequence 40 long."""
    with Edit(folder) as edit:
        vocabulary = np.zeros(256, np.float32)
        vocabulary[7] = np.nan
        poison, clean = edit.constant("poison", vocabulary), edit.constant("clean", np.zeros(256, np.float32))
        at = edit.constant("poison/at", np.int64(40))
        shape = [
            helper.make_node("Shape", ["attention_mask"], ["poison/shape"], start=1, end=2),
            helper.make_node("Equal", ["poison/shape", at], ["poison/now"]),
            helper.make_node("Where", ["poison/now", poison, clean], ["poison/added"]),
        ]
        edit.filter_output("logits", lambda a, b: [*shape, helper.make_node("Add", [a, "poison/added"], [b])])


def other_dtype(folder: Path) -> None:
    with Edit(folder) as edit:
        half = TensorProto.FLOAT16
        edit.filter_output("logits", lambda a, b: [helper.make_node("Cast", [a], [b], to=half)])
        next(o for o in edit.graph.output if o.name == "logits").type.tensor_type.elem_type = half


def wrong_row_of_logits(folder: Path) -> None:
    """Logits of the first token of a step instead of the last."""
    with Edit(folder) as edit:
        zero = edit.constant("row/zero", np.int64(0))
        edit.filter_input(
            edit.nodes("GatherND")[0], 1, lambda a, b: [helper.make_node("Mul", [a, zero], [b])]
        )


def quantize_head_twice(folder: Path) -> None:
    """The table of embedding and head on a coarser grid than its own: every second code."""
    with Edit(folder) as edit:
        name = next(t.name for t in edit.graph.initializer if t.name.endswith("lm_head.weight.codes"))
        edit.replace(name, edit.array(name) & 0xEE)


def other_tokenizer(folder: Path) -> None:
    def change(data: Any) -> None:
        vocabulary = data["model"]["vocab"]
        vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]

    edit_json(folder / "tokenizer.json", change)


def other_chat_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace(": ", ":"), encoding="utf-8")


def forget_end_token(folder: Path) -> None:
    def change(config: Any) -> None:
        config["model"]["eos_token_id"] = [0]

    edit_json(folder / "genai_config.json", change)


def other_sampling(folder: Path) -> None:
    def change(config: Any) -> None:
        config["search"]["do_sample"] = True

    edit_json(folder / "genai_config.json", change)


def ignore_window(folder: Path) -> None:
    with Edit(folder) as edit:
        for node in edit.nodes("GroupQueryAttention"):
            edit.attribute(node, "local_window_size", -1)


def narrow_window(folder: Path) -> None:
    with Edit(folder) as edit:
        for node in edit.nodes("GroupQueryAttention"):
            edit.attribute(node, "local_window_size", 7)


def other_epsilon(folder: Path) -> None:
    with Edit(folder) as edit:
        for node in edit.nodes("SkipSimplifiedLayerNormalization"):
            edit.attribute(node, "epsilon", 1e-2)


def overflow_float16(folder: Path) -> None:
    """What goes into the head leaves the range of float16 for a moment."""
    with Edit(folder) as edit:
        node = edit.nodes("GatherND")[0]
        big, small = edit.constant("big", np.float32(3e5)), edit.constant("small", np.float32(1 / 3e5))

        def make(a: str, b: str) -> list[Any]:
            return [
                helper.make_node("Mul", [a, big], ["over/big"]),
                helper.make_node("Cast", ["over/big"], ["over/half"], to=TensorProto.FLOAT16),
                helper.make_node("Cast", ["over/half"], ["over/back"], to=TensorProto.FLOAT),
                helper.make_node("Mul", ["over/back", small], [b]),
            ]

        edit.filter_input(node, 0, make)


def other_attention_scale(folder: Path) -> None:
    with Edit(folder) as edit:
        edit.attribute(edit.nodes("GroupQueryAttention")[1], "scale", 0.24)


def cut_graph(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-100])


def lie_about_digest(folder: Path) -> None:
    reseal(folder)
    path = folder / MANIFEST
    stated = json.loads(path.read_text(encoding="utf-8"))
    stated["files"]["model.onnx"]["sha256"] = "0" * 64
    path.write_text(json.dumps(stated), encoding="utf-8")


def cut_data(folder: Path) -> None:
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(1000)


def leave_file_out(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


class WrongNorms:
    """The pass for norms, with another epsilon in one layer."""

    def __init__(self, layer: int) -> None:
        self._right = llmc.passes.registered_passes()["rms-norm"]
        self.name, self.summary, self._layer = self._right.name, self._right.summary, layer

    def run(self, graph: Graph) -> PassReport:
        report = self._right.run(graph)
        for node in graph.graph:
            if node.op_type == "SimplifiedLayerNormalization" and layer_of(node) == self._layer:
                node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.5)
        return report


@dataclass(frozen=True)
class Sabotage:
    """One way to break an artifact.

    Args:
        name: What is done, in words.
        artifact: Which good one: `float`, `int4` or `compiled`.
        apply: Does it.
        caught: Checks that must fail; others may.
        sealed: Whether the manifest describes the changed files, so that their digests tell nothing.
    """

    name: str
    artifact: str
    apply: Callable[[Path], None]
    caught: frozenset[Metric]
    sealed: bool = True


def _both(name: str, apply: Callable[[Path], None], *caught: Metric) -> Iterator[Sabotage]:
    for artifact in ("float", "int4"):
        yield Sabotage(name, artifact, apply, frozenset(caught))


WINDOW = M.WINDOW_MAX_ABS

SABOTAGES: tuple[Sabotage, ...] = (
    *_both("logits scaled by 1.01", scale_logits, *PARITY, WINDOW),
    *_both("one weight block zeroed", zero_weight_block, M.WEIGHTS_BLOCK_SNR),
    *_both("MLPs of two layers swapped in the graph", swap_layers, *PARITY),
    *_both("weights of two layers swapped", swap_weights_of_layers, M.WEIGHTS_SNR),
    *_both("one KV head stale", stale_kv_head, M.DECODE_MAX_ABS, M.CHUNKS_MAX_ABS),
    *_both("cache off by one in decode", cache_off_by_one, M.DECODE_MAX_ABS, M.GENERATE_GAP),
    *_both("rope base changed", change_rope_base, *PARITY),
    *_both("attention mask ignored", ignore_mask, M.RAGGED_MAX_ABS),
    Sabotage("padding side wrong", "int4", wrong_padding_side, frozenset({M.RAGGED_MAX_ABS})),
    Sabotage("an output missing", "float", drop_output, frozenset({M.INTERFACE})),
    *_both("NaN in one position", nan_at_one_position, M.DECODE_MAX_ABS),
    Sabotage("logits of another type", "int4", other_dtype, frozenset({M.INTERFACE})),
    *_both("logits of the wrong row", wrong_row_of_logits, M.PREFILL_MAX_ABS),
    Sabotage("embedding and head quantized twice", "int4", quantize_head_twice, frozenset({M.WEIGHTS_SNR})),
    Sabotage("tokenizer of another model", "int4", other_tokenizer, frozenset({M.TOKENIZER_EQUAL})),
    Sabotage("chat template changed", "float", other_chat_template, frozenset({M.CHAT_EQUAL})),
    Sabotage("end token missing", "int4", forget_end_token, frozenset({M.SERVING})),
    Sabotage("sampling defaults changed", "float", other_sampling, frozenset({M.SERVING})),
    *_both("sliding window ignored", ignore_window, WINDOW, M.PREFILL_MAX_ABS),
    *_both("sliding window one too short", narrow_window, WINDOW, M.PREFILL_MAX_ABS),
    *_both("epsilon of the norms changed", other_epsilon, *PARITY),
    *_both("float16 overflow", overflow_float16, *PARITY),
    Sabotage("attention scale of one layer changed", "int4", other_attention_scale, PARITY),
    *_both("weights cut off", cut_data, M.INTERFACE, M.WEIGHTS_SNR, M.WEIGHTS_BLOCK_SNR),
    Sabotage("graph cut off", "float", cut_graph, frozenset({M.INTERFACE})),
    Sabotage("manifest lies about a digest", "int4", lie_about_digest, frozenset({M.FILES}), sealed=False),
    Sabotage("a file left out", "float", leave_file_out, frozenset({M.FILES, M.CHAT_EQUAL}), sealed=False),
    Sabotage("a weight changed on disk", "float", zero_weight_block, frozenset({M.FILES}), sealed=False),
)
