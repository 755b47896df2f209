"""Small graphs of ONNX Runtime's operators with quantized weights, and the same through compiled kernels."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from llmc.artifact.manifest import MODEL
from llmc.backends.compiled.isa import INSTRUCTION_SETS, InstructionSet
from llmc.backends.compiled.lower import CompiledKernels, compile_kernels
from llmc.backends.compiled.stage import LIBRARY
from llmc.backends.compiled.toolchain import find_compiler
from llmc.backends.model_file import write_model
from llmc.config import CacheType, WeightScheme
from llmc.graph.model import Graph
from llmc.graph.weights import LazyWeight, WeightGroup
from llmc.machine import detect_profile
from llmc.quantize.blocks import PackedBlocks, count_blocks, pack
from llmc.quantize.encode import quantize_blocks

Array = np.ndarray
MICROSOFT = "com.microsoft"


def usable_sets() -> list[InstructionSet]:
    """The instruction sets with kernels that this CPU has."""
    here = set(detect_profile(gpu=False).isa)
    return [known for known in INSTRUCTION_SETS if known.needs <= here]


def quantized(weights: Array, bits: int, block: int, symmetric: bool) -> PackedBlocks:
    scheme = WeightScheme(bits=bits, block_size=block, symmetric=symmetric, method="rtn")  # type: ignore[arg-type]
    return quantize_blocks(weights, scheme)


def with_minima(n: int, k: int, bits: int, block: int, seed: int = 0) -> tuple[PackedBlocks, Array]:
    """Codes with a float16 scale and minimum per block, as in GGUF files, and code * scale + minimum."""
    rng = np.random.default_rng(seed)
    blocks = count_blocks(k, block)
    codes = rng.integers(0, 1 << bits, (n, blocks, block), np.uint8)
    scales = rng.uniform(0.01, 0.2, (n, blocks)).astype(np.float16)
    minima = -(scales * rng.uniform(0.3, 0.7, (n, blocks)) * (1 << bits)).astype(np.float16)
    wide, low = scales.astype(np.float32), minima.astype(np.float32)
    stated = WeightScheme(bits=bits, block_size=block, symmetric=False, method="rtn")  # type: ignore[arg-type]
    values = (codes * wide[..., None] + low[..., None]).reshape(n, -1)[:, :k]
    return PackedBlocks(pack(codes, bits), wide, -low / wide, k, stated), values


class GraphBuilder:
    """A graph over activations (batch, sequence, width)."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.weights: list[ir.Value] = []

    def value(self, name: str, dims: list[int | str], kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(kind))

    def input(self, name: str, width: int) -> ir.Value:
        self.inputs.append(self.value(name, ["batch", "sequence", width]))
        return self.inputs[-1]

    def weight(self, name: str, members: dict[str, Array]) -> list[ir.Value]:
        group = WeightGroup((name,), lambda: members)
        made = []
        for key, array in members.items():
            label, kind = f"{name}.{key}", ir.DataType.from_numpy(array.dtype)
            value = self.value(label, list(array.shape), kind)
            value.const_value = LazyWeight(name=label, dtype=kind, shape=array.shape, group=group, key=key)
            made.append(value)
        self.weights += made
        return made

    def node(
        self, op: str, inputs: list[ir.Value], name: str, width: int, domain: str = "", **attributes: object
    ) -> ir.Value:
        out = self.value(name, ["batch", "sequence", width])
        self.nodes.append(ir.node(op, inputs, attributes, domain=domain, outputs=[out], name=name))  # type: ignore[arg-type]
        return out

    def packed(self, blocks: PackedBlocks, name: str) -> list[ir.Value]:
        members = {"codes": blocks.codes, "scales": blocks.scales}
        if blocks.zero_points is not None:
            members["zero_points"] = blocks.zero_points
        return self.weight(name, members)

    def embed(self, ids: ir.Value, blocks: PackedBlocks, name: str, weights: list[ir.Value]) -> ir.Value:
        codes, *rest = weights
        scheme = blocks.scheme
        return self.node(
            "GatherBlockQuantized",
            [codes, ids, *rest],
            f"{name}.rows",
            blocks.in_features,
            MICROSOFT,
            bits=scheme.bits,
            block_size=scheme.block_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def matmul(
        self,
        x: ir.Value,
        blocks: PackedBlocks,
        name: str,
        weights: list[ir.Value] | None = None,
        level: int = 4,
    ) -> ir.Value:
        """A product; `weights` are the initializers where another operator reads them as well."""
        scheme, n = blocks.scheme, len(blocks.codes)
        return self.node(
            "MatMulNBits",
            [x, *(weights or self.packed(blocks, name))],
            f"{name}.out",
            n,
            MICROSOFT,
            K=blocks.in_features,
            N=n,
            bits=scheme.bits,
            block_size=scheme.block_size,
            accuracy_level=level,
        )

    def finish(self, outputs: list[ir.Value]) -> Graph:
        opsets = {"": 21, MICROSOFT: 1}
        graph = ir.Graph(
            self.inputs, outputs, nodes=self.nodes, initializers=self.weights, opset_imports=opsets, name="g"
        )
        return Graph(ir.Model(graph, ir_version=10), cache=(), layers=1)


def write_compiled(
    graph: Graph, folder: Path, isa: InstructionSet, cache: CacheType = CacheType.FLOAT32
) -> CompiledKernels:
    """Compile `graph` and write model and library to `folder`."""
    made = compile_kernels(graph, isa, find_compiler(), cache)
    (folder / LIBRARY).write_bytes(made.library)
    write_model(graph.model, folder)
    return made


def open_session(folder: Path, threads: int = 1):  # type: ignore[no-untyped-def]
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if (folder / LIBRARY).is_file():
        options.register_custom_ops_library(str(folder / LIBRARY))
    return ort.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])


def code_units(x: Array, block: int) -> Array:
    """Rows (…, K) by block before they are rounded, (…, blocks, block): 127 is the largest of a block."""
    codes, _ = _scaled(x, block)
    return codes


def quantize_activations(x: Array, block: int, largest: int = 127) -> Array:
    """What a product sees of rows (…, K), integers by block up to `largest`, as float64."""
    codes, scales = _scaled(x, block, largest)
    rows = np.rint(codes).astype(np.float64) * scales
    return rows.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def _scaled(x: Array, block: int, largest: int = 127) -> tuple[Array, Array]:
    k = x.shape[-1]
    blocks = count_blocks(k, block)
    padded = np.zeros((*x.shape[:-1], blocks * block), np.float32)
    padded[..., :k] = x
    cut = padded.reshape(*x.shape[:-1], blocks, block)
    peak = np.abs(cut).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        codes = np.where(peak > 1e-30, cut * (np.float32(largest) / peak), 0)
        scales = np.where(peak > 1e-30, peak / np.float32(largest), 0)
    return codes, scales
