"""Select the arithmetic in which a graph is run: as served, or without the rounding of serving."""

from enum import StrEnum
from typing import Any

from llmc.graph.domains import COMPILED, COMPILED_EXACT, COMPILED_PRODUCTS
from llmc.graph.interface import CacheSlot, Interface, TensorSpec, unscaled_width


class Arithmetic(StrEnum):
    """The arithmetic of products with quantized weights and of compiled attention.

    `served`: as the graph specifies. `products`: products in float32, so that activations are not rounded
    (`accuracy_level` of com.microsoft MatMulNBits). `exact`: in addition, compiled kernels store keys and
    values and compute attention in float32, so that only the artifact's weights are rounded.
    """

    SERVED = "served"
    PRODUCTS = "products"
    EXACT = "exact"


def compute_in(arithmetic: Arithmetic, model: Any, interface: Interface) -> Interface:
    """Change an `onnx_ir.Model` in place to compute in another arithmetic than the served one.

    Args:
        interface: Inputs and outputs of the graph.

    Returns:
        The inputs and outputs of the changed graph.
    """
    import onnx_ir as ir

    from llmc.graph.edit import require_domain
    from llmc.runtime.stacks import in_float32

    if arithmetic is Arithmetic.SERVED:
        return interface
    compiled = False
    for node in list(model.graph.all_nodes()):
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
        elif node.op_type == "QMoE":
            in_float32(node)
        elif node.domain == COMPILED:
            compiled = True
            node.domain = COMPILED_EXACT if arithmetic is Arithmetic.EXACT else COMPILED_PRODUCTS
            require_domain(model.graph, node.domain)
    if not compiled or arithmetic is not Arithmetic.EXACT:
        return interface
    widened = _widen(interface)
    specs = {spec.name: spec for spec in (*widened.inputs, *widened.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in _cache_names(interface):
            value.type = ir.TensorType(ir.DataType.FLOAT)
            value.shape = ir.Shape(specs[value.name].shape)
    return widened


def _cache_names(interface: Interface) -> set[str]:
    return {name for slot in interface.cache for name in slot.names}


def _widen(interface: Interface) -> Interface:
    """Return the interface with keys and values in float32."""
    names = _cache_names(interface)
    types = {spec.name: spec.dtype for spec in interface.inputs}

    def tensor(spec: TensorSpec) -> TensorSpec:
        if spec.name not in names:
            return spec
        *dims, width = spec.shape
        shape = (*dims, unscaled_width(spec.dtype, int(width)))
        return spec.model_copy(update={"dtype": "float32", "shape": shape})

    def slot(slot: CacheSlot) -> CacheSlot:
        widths = {
            "key_width": unscaled_width(types[slot.past_key], slot.key_width),
            "value_width": unscaled_width(types[slot.past_value], slot.value_width),
        }
        return slot.model_copy(update=widths)

    return interface.model_copy(
        update={
            "inputs": tuple(map(tensor, interface.inputs)),
            "outputs": tuple(map(tensor, interface.outputs)),
            "cache": tuple(map(slot, interface.cache)),
        }
    )
