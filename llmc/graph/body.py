"""Write the body of an ONNX function, or of a subgraph, node by node."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


class Body:
    """Collects the nodes of a body.

    Args:
        prefix: Prefix of the names of values, which a subgraph must not share with the body around it.
    """

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[ir.Node] = []
        self._prefix = f"{prefix}_" if prefix else ""

    def __call__(
        self,
        op: str,
        *inputs: ir.Value | None,
        name: str | None = None,
        attributes: Sequence[ir.Attr] = (),
        **attrs: int | float | list[int],
    ) -> ir.Value:
        all_attributes = [*attributes, *ir.convenience.convert_attributes(attrs)]
        node = ir.Node("", op, inputs, all_attributes)
        node.outputs[0].name = name or f"{self._prefix}{op.lower()}_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: int | float | list[int]) -> ir.Value:
        dtype = np.float32 if isinstance(value, float) else np.int64
        attr = ir.AttrTensor("value", ir.tensor(np.array(value, dtype=dtype)))
        return self("Constant", attributes=[attr])

    def attribute(self, name: str, kind: ir.AttributeType) -> ir.Value:
        """Return the function's own attribute `name` as a tensor."""
        key = {ir.AttributeType.INT: "value_int", ir.AttributeType.FLOAT: "value_float"}[kind]
        return self("Constant", attributes=[ir.RefAttr(key, name, kind)])


def declare(integers: Sequence[str], floats: Sequence[str]) -> list[ir.Attr]:
    """Declare the attributes that a function takes, all of them required."""
    return [ir.Attr(name, ir.AttributeType.INT, None) for name in integers] + [
        ir.Attr(name, ir.AttributeType.FLOAT, None) for name in floats
    ]
