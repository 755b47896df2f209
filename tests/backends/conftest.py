"""A decoder small enough to be worked out by hand, and its interface."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmc.graph.interface import CacheSlot, Interface, TensorSpec

VOCAB = 32

MakeCounter = Callable[..., tuple[ir.Model, Interface]]


@pytest.fixture
def make_counter() -> MakeCounter:
    """Builds a decoder whose next token is the sum of all tokens that are not masked, modulo 32.

    The tokens of earlier steps are read back from the keys of the first layer, so that a wrong
    cache, mask or position gives a wrong token.
    """
    return counter


def counter(
    layers: Sequence[tuple[int, int]] = ((1, 4), (1, 4)),
    logits: str = "all",
    position_ids: bool = False,
    value_width: int | None = None,
    numbers: Sequence[int] | None = None,
) -> tuple[ir.Model, Interface]:
    """The model and its interface.

    Args:
        layers: KV heads and key width of each layer.
        value_width: Width of the values; the keys' if None.
        numbers: The layers' numbers in names; counted from 0 if None.
    """
    nodes, constants = [], []

    def constant(values: object, dtype: type = np.int64) -> str:
        name = f"c{len(constants)}"
        constants.append(numpy_helper.from_array(np.asarray(values, dtype=dtype), name))
        return name

    def node(op: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def tensor(name: str, kind: int, shape: Sequence[int | str]) -> object:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [
        tensor("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        tensor("attention_mask", TensorProto.INT64, ["batch", "total"]),
    ]
    steps = "sequence" if logits == "all" else 1
    outputs = [tensor("logits", TensorProto.FLOAT, ["batch", steps, VOCAB])]
    ids = node("Cast", ["input_ids"], "ids", to=TensorProto.FLOAT)
    if position_ids:
        inputs.append(tensor("position_ids", TensorProto.INT64, ["batch", "sequence"]))
        at = node("Cast", ["position_ids"], "at", to=TensorProto.FLOAT)
        ids = node("Add", [ids, at], "ids_at")
    wide = node("Unsqueeze", [ids, constant([1, 3])], "wide")
    slots = []
    for layer, (heads, width) in zip(numbers or range(len(layers)), layers, strict=True):
        for kind, size in (("key", width), ("value", value_width or width)):
            past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
            inputs.append(tensor(past, TensorProto.FLOAT, ["batch", heads, "past", size]))
            outputs.append(tensor(present, TensorProto.FLOAT, ["batch", heads, "total", size]))
            new = node("Tile", [wide, constant([1, heads, 1, size])], f"new.{layer}.{kind}")
            node("Concat", [past, new], present, axis=2)
        slots.append(
            CacheSlot(
                layer=layer,
                past_key=f"past_key_values.{layer}.key",
                past_value=f"past_key_values.{layer}.value",
                present_key=f"present.{layer}.key",
                present_value=f"present.{layer}.value",
                kv_heads=heads,
                key_width=width,
                value_width=value_width or width,
                window=None,
            )
        )
    zero = constant(0)
    column = node("Gather", [slots[0].present_key, zero], "column", axis=3)
    seen = node("Gather", [column, zero], "seen", axis=1)
    mask = node("Cast", ["attention_mask"], "mask", to=TensorProto.FLOAT)
    total = node("CumSum", [node("Mul", [seen, mask], "kept"), constant(1)], "sums")
    length = node("Neg", [node("Shape", ["input_ids"], "length", start=1, end=2)], "from_end")
    first = length if logits == "all" else constant([-1])
    new_sums = node("Slice", [total, first, constant([1 << 62]), constant([1])], "new_sums")
    following = node("Mod", [new_sums, constant(VOCAB, np.float32)], "following", fmod=1)
    token = node("Cast", [following], "token", to=TensorProto.INT64)
    node("OneHot", [token, constant(VOCAB), constant([0.9, 1], np.float32)], "logits", axis=-1)
    graph = helper.make_graph(nodes, "counter", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    interface = Interface(
        inputs=tuple(_spec(value) for value in model.graph.inputs),
        outputs=tuple(_spec(value) for value in model.graph.outputs),
        cache=tuple(slots),
        logits="last" if logits == "last" else "all",
        position_ids=position_ids,
        padding="any",
        max_length=64,
    )
    return model, interface


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=shape)


@pytest.fixture
def tokenizer_files(tmp_path: Path) -> Callable[..., None]:
    """Writes a tokenizer of single characters: `a` is token 1, `b` 2, …, `<end>` 31."""

    def write(folder: Path, chat_template: str | None = None) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        alphabet = {chr(ord("a") + n - 1): n for n in range(1, 27)}
        vocabulary = {"<pad>": 0, **alphabet, **{f"<{n}>": n for n in range(27, 31)}, "<end>": 31}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
        fast.chat_template = chat_template
        fast.save_pretrained(folder)

    return write
