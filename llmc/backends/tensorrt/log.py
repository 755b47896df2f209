"""What TensorRT says while it builds an engine: errors, memory, and the layers it came to.

With detailed profiling verbosity, the log of severity VERBOSE holds every layer of the finished engine: its
name, types, and the ONNX nodes it came from. It is the one way to look into an engine without a GPU.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmc.errors import UnsupportedError

#: Part of the names of fused attention: _gemm_mha_v2 for several queries, _gemv_mha_v1 for one.
_FUSED_ATTENTION = "mha"
_SCRATCH = re.compile(r"^Max Scratch Memory: (\d+) bytes")
_WEIGHTS = re.compile(r"^Total Weights Memory: (\d+) bytes")
_GRAPH = re.compile(r"_myl(\d+)_\d+$")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_DATATYPE = re.compile(r"Datatype: (\w+)")
#: Most lines of TensorRT's own words that an error quotes.
_QUOTED = 3


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Args:
        name: TensorRT's name.
        phase: Index of the optimization profile that it belongs to.
        nodes: Names of the ONNX nodes that it computes, or a part of which.
        inputs: Types of its inputs, by TensorRT's names, such as Half or Int4.
        constants: Types of its constants.
    """

    name: str
    phase: int
    nodes: frozenset[str]
    inputs: tuple[str, ...]
    constants: tuple[str, ...]


@dataclass
class BuildLog:
    """Collects what matters of the log of one build."""

    errors: list[str] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)
    weights: int = 0
    lines: list[str] = field(default_factory=list)

    def take(self, severity: int, text: str) -> None:
        """One message; severities as in TensorRT, 0 and 1 are errors."""
        if severity <= 1:
            self.errors.append(text)
        elif text.startswith("Layers:"):
            self.lines += [line for line in text.splitlines() if line.startswith("Name: ")]
        elif (found := _SCRATCH.match(text)) is not None:
            self.scratch.append(int(found[1]))
        elif (found := _WEIGHTS.match(text)) is not None:
            self.weights = int(found[1])

    def reason(self) -> str:
        """The first errors in TensorRT's own words."""
        texts = [" ".join(text.split()) for text in self.errors[:_QUOTED]]
        return "; ".join(texts) or "it gives no reason"

    def layers(self) -> list[Layer]:
        """Every layer of the engine, by profile in order."""
        rows = []
        later: set[str] = set()
        for line in self.lines:
            name = line.removeprefix("Name: ").split(", LayerType:", 1)[0]
            graph = _GRAPH.search(name)
            key = graph[1] if graph else ""
            if "[profile 1]" in line:
                later.add(key)
            inputs, _, rest = line.partition("Inputs: ")[2].partition("Constants: ")
            types = [tuple(_DATATYPE.findall(part)) for part in (inputs, rest.partition(", Outputs: ")[0])]
            rows.append((key, Layer(name, 0, frozenset(_NODE.findall(line)), types[0], types[1])))
        return [replace(layer, phase=int(key in later)) for key, layer in rows]


def make_logger(trt: Any, log: BuildLog) -> Any:
    """TensorRT's logger that hands every message to `log`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            log.take(int(severity), text)

    return Logger()


def require_fused_attention(layers: list[Layer], attention: frozenset[str], phase: int, name: str) -> int:
    """How many attention nodes fused kernels compute in a phase: all of them.

    Args:
        attention: Names of the ONNX nodes of attention.
        phase: Index of the optimization profile, called `name`.

    Raises:
        UnsupportedError: Some are not fused; the first is named.
    """
    fused: set[str] = set()
    for layer in layers:
        if layer.phase == phase and _FUSED_ATTENTION in layer.name:
            fused |= layer.nodes
    missing = sorted(attention - fused)
    if missing:
        raise UnsupportedError(
            f"TensorRT fuses {len(attention & fused)} of {len(attention)} attention layers in {name}; "
            f"not fused is {missing[0]}",
            hint="such an engine is many times slower; report the model",
        )
    return len(attention)


def require_quantized_products(
    layers: list[Layer], products: Mapping[str, tuple[str, str | None]], phase: int, name: str
) -> dict[str, int]:
    """How many products of a phase are computed from their quantized factors, by type: all of them.

    Args:
        products: Types of weight and activation by the name of the ONNX node, by TensorRT's names; None for
            an activation in float.
        phase: Index of the optimization profile, called `name`.

    Raises:
        UnsupportedError: No engine layer takes the product's weight or activation in its type; it is named.
    """
    weights: dict[str, set[str]] = {}
    activations: dict[str, set[str]] = {}
    for layer in layers:
        if layer.phase == phase:
            for node in layer.nodes & products.keys():
                weights.setdefault(node, set()).update(layer.constants)
                if products[node][0] in layer.constants:
                    activations.setdefault(node, set()).update(layer.inputs)
    for node, (weight, activation) in sorted(products.items()):
        _require_type(node, name, "weight", weight, weights.get(node, set()))
        if activation is not None:
            _require_type(node, name, "activation", activation, activations.get(node, set()))
    return dict(Counter(w if a is None else f"{a} x {w}" for w, a in products.values()))


def _require_type(node: str, phase: str, factor: str, wanted: str, taken: set[str]) -> None:
    if wanted not in taken:
        raise UnsupportedError(
            f"TensorRT computes {node} in {phase} from {factor}s in {', '.join(sorted(taken)) or 'no type'}, "
            f"and the graph has it in {wanted}",
            hint="the engine would be larger and slower than its format promises; report the model",
        )
