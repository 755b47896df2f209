"""A graph with compiled operators in another arithmetic: domains, and the type and width of the KV cache."""

from typing import Any

import onnx_ir as ir
import pytest

from llmc.graph.domains import COMPILED, COMPILED_EXACT, COMPILED_PRODUCTS
from llmc.graph.interface import CacheSlot, Interface, TensorSpec
from llmc.runtime.arithmetic import Arithmetic, compute_in

WIDTHS = {"float32": 16, "float16": 16, "int8": 20}


def interface_of(dtype: str) -> Interface:
    cache = [
        TensorSpec(name=name, dtype=dtype, shape=("batch", 2, name, WIDTHS[dtype]))
        for name in ("past.k", "past.v", "present.k", "present.v")
    ]
    slot = CacheSlot(
        layer=0, past_key="past.k", past_value="past.v", present_key="present.k", present_value="present.v",
        kv_heads=2, key_width=WIDTHS[dtype], value_width=WIDTHS[dtype], window=None,
    )  # fmt: skip
    ids = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence"))
    logits = TensorSpec(name="logits", dtype="float32", shape=("batch", 1, 50))
    return Interface(
        inputs=(ids, *cache[:2]), outputs=(*cache[2:], logits), cache=(slot,), logits="last",
        position_ids=False, padding="right", max_length=64,
    )  # fmt: skip


def model_of(interface: Interface, domain: str = COMPILED) -> ir.Model:
    def value(spec: TensorSpec) -> ir.Value:
        kind = ir.TensorType(ir.DataType[spec.dtype.replace("float32", "float").upper()])
        return ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=kind)

    inputs, outputs = map(value, interface.inputs), [value(spec) for spec in interface.outputs]
    inputs = list(inputs)
    node = ir.Node(domain, "Region0", inputs, outputs=outputs)
    return ir.Model(ir.Graph(inputs, outputs, nodes=[node], opset_imports={"": 21, domain: 1}), ir_version=10)


def widths(interface: Interface) -> set[Any]:
    slot = interface.cache[0]
    names = {slot.past_key, slot.past_value, slot.present_key, slot.present_value}
    specs = [s for s in (*interface.inputs, *interface.outputs) if s.name in names]
    return {(s.dtype, s.shape[-1], slot.key_width, slot.value_width) for s in specs}


@pytest.mark.parametrize("dtype", WIDTHS)
def test_an_exact_program_holds_keys_and_values_in_float32(dtype: str) -> None:
    interface = interface_of(dtype)
    model = model_of(interface)
    made = compute_in(Arithmetic.EXACT, model, interface)
    assert widths(made) == {("float32", 16, 16, 16)}
    found = {v.name: (v.dtype, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)}
    assert found["past.k"] == (ir.DataType.FLOAT, ir.Shape(["batch", 2, "past.k", 16]))
    assert found["input_ids"] == (ir.DataType.INT64, ir.Shape(["batch", "sequence"]))
    assert [node.domain for node in model.graph] == [COMPILED_EXACT]


def test_exact_products_keep_the_cache() -> None:
    interface = interface_of("int8")
    model = model_of(interface)
    assert compute_in(Arithmetic.PRODUCTS, model, interface) == interface
    assert [node.domain for node in model.graph] == [COMPILED_PRODUCTS]


def test_operators_of_a_runtime_keep_the_cache() -> None:
    interface = interface_of("float16")
    assert compute_in(Arithmetic.EXACT, model_of(interface, "com.microsoft"), interface) == interface


def test_what_is_served_is_left_alone() -> None:
    interface = interface_of("int8")
    model = model_of(interface)
    assert compute_in(Arithmetic.SERVED, model, interface) == interface
    assert [node.domain for node in model.graph] == [COMPILED]
