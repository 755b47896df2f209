"""Parse TensorRT's log of a build: errors, memory, and the resulting layers.

With detailed profiling verbosity, the log of severity VERBOSE contains every layer of the finished engine:
its name, types, and the ONNX nodes it came from. It is the only way to inspect an engine without a GPU.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmc.errors import UnsupportedError

#: Part of the names of fused attention kernels: _gemm_mha_v2 for several queries, _gemv_mha_v1 for one.
_FUSED_ATTENTION = "mha"
_SCRATCH = re.compile(r"^Max Scratch Memory: (\d+) bytes")
_WEIGHTS = re.compile(r"^Total Weights Memory: (\d+) bytes")
_GRAPH = re.compile(r"_myl(\d+)_\d+$")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_DATATYPE = re.compile(r"Datatype: (\w+)")
#: Largest number of lines of TensorRT's messages that an error quotes.
_QUOTED = 3


@dataclass(frozen=True)
class Layer:
    """A layer of an engine.

    Args:
        name: TensorRT's name.
        phase: Index of its optimization profile.
        nodes: Names of the ONNX nodes that it computes, wholly or in part.
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
    """The relevant parts of the log of a build."""

    errors: list[str] = field(default_factory=list)
    scratch: list[int] = field(default_factory=list)
    weights: int = 0
    lines: list[str] = field(default_factory=list)

    def take(self, severity: int, text: str) -> None:
        """Process a message; severities as in TensorRT, 0 and 1 are errors."""
        if severity <= 1:
            self.errors.append(text)
        elif text.startswith("Layers:"):
            self.lines += [line for line in text.splitlines() if line.startswith("Name: ")]
        elif (match := _SCRATCH.match(text)) is not None:
            self.scratch.append(int(match[1]))
        elif (match := _WEIGHTS.match(text)) is not None:
            self.weights = int(match[1])

    def reason(self) -> str:
        """Return the first errors as TensorRT states them."""
        texts = [" ".join(text.split()) for text in self.errors[:_QUOTED]]
        return "; ".join(texts) or "it gives no reason"

    def layers(self) -> list[Layer]:
        """Return every layer of the engine, by profile in order."""
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
    """Create a logger for TensorRT that passes every message to `log`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            log.take(int(severity), text)

    return Logger()


def require_fused_attention(layers: list[Layer], attention: frozenset[str], phase: int, name: str) -> int:
    """Require that fused kernels compute all attention nodes of a phase; return how many there are.

    Args:
        attention: Names of the ONNX nodes of attention.
        phase: Index of the optimization profile, called `name`.

    Raises:
        UnsupportedError: Some are not fused; the error names the first.
    """
    fused: set[str] = set()
    for layer in layers:
        if layer.phase == phase and _FUSED_ATTENTION in layer.name:
            fused |= layer.nodes
    missing = sorted(attention - fused)
    if missing:
        raise UnsupportedError(
            f"TensorRT fuses {len(attention & fused)} of {len(attention)} attention layers in {name}; "
            f"the first not fused is {missing[0]}",
            hint="such an engine is many times slower; report the model",
        )
    return len(attention)


def require_quantized_products(
    layers: list[Layer], products: Mapping[str, tuple[str, str | None]], phase: int, name: str
) -> dict[str, int]:
    """Require that all products of a phase use their quantized factors; return how many by type.

    Args:
        products: Types of weight and activation by the name of the ONNX node, by TensorRT's names; None for
            an activation in float.
        phase: Index of the optimization profile, called `name`.

    Raises:
        UnsupportedError: No engine layer reads the product's weight or activation in its type; it is named.
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


def _require_type(node: str, phase: str, factor: str, expected: str, actual: set[str]) -> None:
    if expected not in actual:
        raise UnsupportedError(
            f"TensorRT computes {node} in {phase} from {factor}s in {', '.join(sorted(actual)) or 'no type'}"
            f", but the graph has it in {expected}",
            hint="the engine would be larger and slower than its format promises; report the model",
        )
