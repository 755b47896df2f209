"""Find out which nodes of a graph ONNX Runtime executes on the CPU, of those that should be on CUDA.

ONNX Runtime says of each node of a session where it executes it, and writes the graph as it is then, with the
copies between host and device that it added. Both are read here, and must list the same nodes.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

#: Most elements of a constant that takes part in arithmetic of shapes.
_FEW = 8
#: Operators whose result can have more elements than their inputs have together.
_GROWING = frozenset({"ConstantOfShape", "Expand", "EyeLike", "OneHot", "Range", "Resize", "Tile"})
#: Operators that give the shape of a tensor and do not read its elements.
_SHAPES = frozenset({"Shape", "Size"})
#: Operators whose result has the buffer of their input.
_SHARING = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_COPIES = ("MemcpyToHost", "MemcpyFromHost")

# Opens each model on CUDA, with the log on the standard error and the optimized graph in a file.
_OPEN = """
import sys, onnxruntime as ort
from pathlib import Path
for number, model in enumerate(sys.argv[2:]):
    print(f"MODEL {number}", file=sys.stderr, flush=True)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 0, 1
    options.optimized_model_filepath = str(Path(sys.argv[1], f"{number}.onnx"))
    ort.InferenceSession(model, options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
"""

Node = tuple[str, str]
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@dataclass(frozen=True)
class Placement:
    """The places where the nodes of one graph, and of the graphs within, are executed.

    Args:
        on_cuda: Number of nodes on CUDA.
        shapes: Nodes on the CPU that compute with shapes and small constants alone.
        strays: All other nodes on the CPU.
        copies: Nodes that copy between host and device, by what they copy.
        shared: Nodes on the CPU whose result has the buffer of a result of CUDA's nodes.
    """

    on_cuda: int
    shapes: tuple[Node, ...]
    strays: tuple[Node, ...]
    copies: tuple[str, ...]
    shared: tuple[Node, ...]


def place(models: Sequence[Path], environment: Mapping[str, str], scratch: Path) -> list[Placement]:
    """Open models on CUDA, in one child process, and return where their nodes are.

    Args:
        environment: Environment of the process, in which CUDA can be used.
        scratch: An empty folder.
    """
    command = [sys.executable, "-c", _OPEN, str(scratch), *map(str, models)]
    opened = subprocess.run(
        command, env=dict(environment), capture_output=True, text=True, errors="replace", timeout=300
    )
    assert opened.returncode == 0, opened.stderr[-2000:]
    logs = re.split(r"^MODEL \d+$", opened.stderr, flags=re.MULTILINE)[1:]
    assert len(logs) == len(models)
    return [_placement(log, scratch / f"{number}.onnx") for number, log in enumerate(logs)]


def _placement(log: str, optimized: Path) -> Placement:
    import onnx

    graph = onnx.load(optimized, load_external_data=False).graph
    nodes = list(_nodes(graph))
    places = _read_log(log, nodes)
    shapes = {id(node) for node in _shape_arithmetic(graph, set(), set())}
    makers = {name: (node.op_type, node.name) for node in nodes for name in node.output}
    on_cpu = [node for node in nodes if places[node.op_type, node.name] == _CPU]
    return Placement(
        on_cuda=len(nodes) - len(on_cpu),
        shapes=tuple((node.op_type, node.name) for node in on_cpu if id(node) in shapes),
        strays=tuple((node.op_type, node.name) for node in on_cpu if id(node) not in shapes),
        copies=tuple(node.input[0] for node in nodes if node.op_type in _COPIES),
        shared=tuple(
            (node.op_type, node.name)
            for node in on_cpu
            if node.op_type in _SHARING and places.get(makers.get(node.input[0], ("", ""))) == _CUDA
        ),
    )


def _read_log(log: str, nodes: Sequence[onnx.NodeProto]) -> dict[Node, str]:
    """Return the execution provider of each node, by its operator and name."""
    places: dict[Node, str] = {}
    listed: Counter[Node] = Counter()
    provider = ""
    for line in log.splitlines():
        if "VerifyEachNodeIsAssignedToAnEp" not in line:
            continue
        if found := re.search(r"placed on \[(\w+)\]", line):
            provider = found[1]
        elif found := re.search(r"\]\s+(\w+) \((.*)\)$", line):
            node = (found[1], found[2])
            assert places.setdefault(node, provider) == provider, f"{node} is at two places"
            listed[node] += 1
    there = Counter((node.op_type, node.name) for node in nodes)
    assert listed == there, f"the log differs from the graph: {listed - there} {there - listed}"
    return places


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in _graphs_in(node):
            yield from _nodes(inner)


def _graphs_in(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def _shape_arithmetic(
    graph: onnx.GraphProto, shapes: set[str], constants: set[str]
) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that compute integers or truth values of at most one axis out of shapes.

    Their inputs are results of Shape and Size, small constants of at most one axis, and results of other such
    nodes. ONNX Runtime wants shapes on the host, so that no copy is needed.

    Args:
        shapes: Values of graphs around this one that are made of shapes.
        constants: Values of graphs around this one that are small constants.
    """
    shapes = set(shapes)
    constants = constants | {each.name for each in graph.initializer if _is_small(each)}
    for node in graph.node:
        names = [name for name in node.input if name]
        inner = _graphs_in(node)
        of_shapes = any(name in shapes for name in names) and shapes.union(constants).issuperset(names)
        if node.op_type in _SHAPES or (of_shapes and not inner and _keeps_integers(node)):
            shapes.update(node.output)
            yield node
        for each in inner:
            yield from _shape_arithmetic(each, shapes, constants)


def _is_small(constant: onnx.TensorProto) -> bool:
    return len(constant.dims) <= 1 and math.prod(constant.dims) <= _FEW


def _keeps_integers(node: onnx.NodeProto) -> bool:
    """Return whether a node makes no more elements than it is given, and no fractions of integers."""
    from onnx import TensorProto

    fractions = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
    to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), None)
    return node.op_type not in _GROWING and to not in fractions
