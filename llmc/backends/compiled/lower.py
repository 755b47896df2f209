"""Lower a graph to kernels: find regions, replace each by one operator, and compile their library.

A region is a largest set of nodes that kernels can compute without leaving it in between: each node has a
level, the number of changes between kernels and ONNX Runtime on the longest path to it, and the nodes of one
level form a region. Nodes without a kernel stay with ONNX Runtime's operators.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import onnx_ir as ir

from llmc.backends.compiled import states
from llmc.backends.compiled.agreement import agreement_text
from llmc.backends.compiled.cache import choose_type, narrow_cache
from llmc.backends.compiled.isa import InstructionSet
from llmc.backends.compiled.obstacles import obstacle
from llmc.backends.compiled.operands import is_turned, parts_per_token, space_of, width_of
from llmc.backends.compiled.program import CHOSEN, PER_TOKEN, SYMBOLS, Program, Variant
from llmc.backends.compiled.region import RegionBuilder
from llmc.backends.compiled.toolchain import Compiler, TranslationUnit, compile_library
from llmc.config import CacheType
from llmc.errors import KernelError
from llmc.graph.domains import COMPILED, COMPILED_EXACT, COMPILED_PRODUCTS, MICROSOFT
from llmc.graph.edit import drop_dead, drop_unused_functions, take_over
from llmc.graph.match import dims_of
from llmc.graph.model import PACKED, Graph

_CORE = {
    (MICROSOFT, "MatMulNBits"),
    (MICROSOFT, "GroupQueryAttention"),
    states.CONVOLUTION,
    states.ATTENTION,
}
#: Domain of the operators by variant of the regions.
_DOMAINS: dict[Variant, str] = {"served": COMPILED, "products": COMPILED_PRODUCTS, "exact": COMPILED_EXACT}


@dataclass(frozen=True)
class CompiledKernels:
    """The result of compiling a graph's regions.

    Args:
        library: The shared library.
        regions: Number of operators that replace regions.
        nodes: Number of nodes that they replaced.
        outside: Why nodes stayed with ONNX Runtime: (operator, reason) and how often. Nodes that only
            replaced nodes read, such as a Cast of scales, are gone.
        compiler: Version of the compiler.
        isa: Instruction set that the library needs.
        source: sha256 of the generated source.
    """

    library: bytes
    regions: int
    nodes: int
    outside: tuple[tuple[str, str, int], ...]
    compiler: str
    isa: str
    source: str


@dataclass(frozen=True)
class KernelSource:
    """The program of a graph's regions, not yet compiled; see `CompiledKernels` for the other fields."""

    text: str
    regions: int
    nodes: int
    outside: tuple[tuple[str, str, int], ...]

    @property
    def digest(self) -> str:
        """Return the sha256 (hex) of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def compile_kernels(
    graph: Graph, isa: InstructionSet, compiler: Compiler, cache: CacheType = CacheType.FLOAT32
) -> CompiledKernels:
    """Replace what kernels can compute by operators of domain `llmc.compiled`, and compile them.

    Raises:
        KernelError: As `lower_kernels`.
        ResourceError: The compiler fails.
    """
    source = lower_kernels(graph, cache)
    return CompiledKernels(
        library=compile_source(source.text, isa, compiler),
        regions=source.regions,
        nodes=source.nodes,
        outside=source.outside,
        compiler=compiler.version,
        isa=isa.name,
        source=source.digest,
    )


def lower_kernels(graph: Graph, cache: CacheType = CacheType.FLOAT32) -> KernelSource:
    """Replace what kernels can compute by operators of domain `llmc.compiled`, and generate their program.

    Args:
        graph: The lowered and quantized graph; changed in place. Weights are packed when they are written.
        cache: Type of the KV cache after the change, if kernels read it in every layer.

    Raises:
        KernelError: The graph has nothing for kernels.
    """
    levels, reasons = _levels(graph.graph)
    cache = choose_type(graph, cache, reasons)
    groups: dict[int, list[ir.Node]] = {}
    for node, level in levels.items():
        if level % 2:
            groups.setdefault(level, []).append(node)
    packed: dict[int, ir.Value] = {}
    builders = []
    replaced = 0
    for nodes in groups.values():
        if not any((n.domain, n.op_type) in _CORE for n in nodes):
            reasons.update(dict.fromkeys(nodes, "its region has nothing that is worth a kernel"))
            continue
        builder = RegionBuilder(nodes, graph.graph, packed, cache)
        builder.build()
        builders.append(builder)
        replaced += len(nodes)
    if not builders:
        why = "; ".join(f"{op}: {reason}" for op, reason in sorted(_left(graph.graph, reasons)))
        raise KernelError(
            "the graph has nothing that kernels can compute",
            hint=f"use a target without compiled kernels; {why}",
        )
    texts: dict[Variant, list[str]] = {"exact": _region_texts(builders, "exact")}
    if cache is not CacheType.FLOAT32:
        narrow_cache(graph, cache)
    texts |= {variant: _region_texts(builders, variant) for variant in ("served", "products")}
    replaced_by: dict[ir.Value, ir.Value] = {}
    for index, builder in enumerate(builders):
        _replace(graph.graph, builder, f"Region{index}", replaced_by)
    drop_dead(graph.graph)
    drop_unused_functions(graph.model)
    graph.graph.sort()
    graph.graph.opset_imports[COMPILED] = 1
    return KernelSource(
        text=_source(builders, texts),
        regions=len(builders),
        nodes=replaced,
        outside=tuple((*why, count) for why, count in sorted(_left(graph.graph, reasons).items())),
    )


def _levels(graph: ir.Graph) -> tuple[dict[ir.Node, int], dict[ir.Node, str]]:
    """Return the level of every node, odd if kernels compute it, and the reasons for the others."""
    levels: dict[ir.Node, int] = {}
    reasons: dict[ir.Node, str] = {}
    for node in graph:
        reason = obstacle(node)
        if reason is not None:
            reasons[node] = reason
        compiled = reason is None
        level = 1 if compiled else 0
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer in levels:
                before = levels[producer]
                level = max(level, before + (compiled != bool(before % 2)))
        levels[node] = level
    return levels, reasons


def _left(graph: ir.Graph, reasons: Mapping[ir.Node, str]) -> Counter[tuple[str, str]]:
    """Count the operators of the graph that are not in regions, by operator and reason."""
    return Counter((node.op_type, reasons[node]) for node in graph if node in reasons)


def _replace(
    graph: ir.Graph, builder: RegionBuilder, name: str, replaced_by: dict[ir.Value, ir.Value]
) -> None:
    """Replace a region by one node; `replaced_by` maps values of regions to their replacements."""
    values = [replaced_by.get(value, value) for value in [*builder.inputs, *builder.weights]]
    region = ir.Node(COMPILED, name, values, num_outputs=len(builder.outputs), name=name)
    layouts = {n: [x.n, x.k, x.bits, x.block, int(x.zero)] for n, x in sorted(builder.layouts.items())}
    region.metadata_props[PACKED] = json.dumps(layouts)
    first = builder.inside[0]
    graph.insert_before(first, region)
    for old, new in zip(list(builder.outputs), region.outputs, strict=True):
        take_over(old, new)
        replaced_by[old] = new
    graph.remove(list(builder.inside), safe=True)


# The generated source


def _region_texts(builders: Sequence[RegionBuilder], variant: Variant) -> list[str]:
    """Return the text of each region as a variant computes it, with the graph's current cache."""
    return [_region_text(builder, f"{variant}_{index}", variant) for index, builder in enumerate(builders)]


def _region_text(builder: RegionBuilder, name: str, variant: Variant) -> str:
    program = builder.program.variant(variant)
    values = [*builder.inputs, *builder.weights]
    types = ", ".join(str(int(v.dtype or ir.DataType.UNDEFINED)) for v in values)
    extents = ", ".join(_extent_text(v) for v in [*values, *builder.outputs])
    outputs = ",\n  ".join(_output_text(builder, value) for value in builder.outputs)
    shared = sorted({o.shared for o in program.operations if o.shared})
    position = {value: i for i, value in enumerate(values)}
    rows_from = position[builder.rows_from] if builder.rows_from is not None else 0
    sequence_at = 2 if builder.rows_from is not None and is_turned(builder.rows_from) else 1
    total = position[builder.total] if builder.total is not None else -1
    chosen = position[builder.chosen] if builder.chosen is not None else -1
    choice = position[builder.choice] if builder.choice is not None else -1
    return f"""
constexpr int32_t types_{name}[] = {{{types}}};
constexpr Extent extents_{name}[] = {{{extents}}};
constexpr Output outputs_{name}[] = {{
  {outputs}}};
{_program_text(program, f"ops_{name}")}size_t shared_{name}(const Run& run) {{
  (void)run;
  size_t most = 0;
  for (size_t size : {{size_t{{0}}{"".join(f", {s}" for s in shared)}}}) most = size > most ? size : most;
  return most;
}}
#define REGION_{name} {{ \\
  "Region{name.rpartition("_")[2]}", types_{name}, extents_{name}, {len(values)}, outputs_{name}, \\
  {len(builder.outputs)}, ops_{name}, {len(program.operations)}, \\
  {len(builder.inputs)}, {rows_from}, {sequence_at}, {total}, {chosen}, {choice}, ops_{name}_width, \\
  ops_{name}_scratch, shared_{name}}}
"""


def _program_text(program: Program, name: str) -> str:
    """Return the table of a program's operations, with the memory that it needs."""
    width = program.lay_out()
    operations = ",\n  ".join(program.text(operation) for operation in program.operations)
    scratch = sorted({o.scratch for o in program.operations if o.scratch})
    return f"""constexpr Op {name}[] = {{
  {operations}}};
constexpr int32_t {name}_width = {width};
constexpr size_t {name}_scratch = most({{size_t{{64}}{"".join(f", {s}" for s in scratch)}}});
"""


def _extent_text(value: ir.Value) -> str:
    dims = dims_of(value)
    over = "kSequences" if dims[:1] == ["batch"] else "kNothing"
    size = int((value.dtype or ir.DataType.UNDEFINED).itemsize)
    if dims[:2] == ["batch", "sequence"]:
        over = "kTokens"
    elif parts_per_token(dims):
        over, size = "kFlattened", size * width_of(value)
    return f"{{Over::{over}, {size}}}"


def _output_text(builder: RegionBuilder, value: ir.Value) -> str:
    dims = dims_of(value)
    past = list(builder.inputs).index(builder.pasts[value]) if value in builder.pasts else -1
    parts = parts_per_token(dims)
    texts = [f"~({PER_TOKEN} + {parts})"] if parts else []
    texts += [str(d) if isinstance(d, int) else SYMBOLS[d] for d in dims[len(texts) :]]
    if width_of(value) and space_of(value) == "kLast" and value not in builder.states:
        texts[1] = CHOSEN
    return f"{{{int(value.dtype or 0)}, {len(dims)}, {{{', '.join(texts)}}}, {past}}}"


def _source(builders: Sequence[RegionBuilder], texts: Mapping[Variant, Sequence[str]]) -> str:
    functions = {name: body for b in builders for name, body in b.program.functions.items()}
    rows = "\n".join(
        f"void {name}(const Run& run, const Op& op, int64_t row) {{ {body} }}"
        for name, body in sorted(functions.items())
    )
    variants = sorted(texts, key=list(_DOMAINS).index)
    tables = {v: ", ".join(f"REGION_{v}_{i}" for i in range(len(builders))) for v in variants}
    regions = "\n".join(f"const Region {v}_regions[] = {{{table}}};" for v, table in tables.items())
    domains = ", ".join(f'{{"{_DOMAINS[variant]}", {variant}_regions}}' for variant in variants)
    return f"""#include <initializer_list>

#include "attention.h"
#include "convolution.h"
#include "exact.h"
#include "linear_attention.h"
#include "matmul.h"
#include "rows.h"

namespace llmc {{
namespace {{
constexpr size_t most(std::initializer_list<size_t> sizes) {{
  size_t found = 0;
  for (size_t size : sizes) found = size > found ? size : found;
  return found;
}}
{rows}
{"".join(text for variant in variants for text in texts[variant])}
{regions}
}}  // namespace
}}  // namespace llmc

using namespace llmc;
extern "C" {{
extern const Domain llmc_domains[] = {{{domains}}};
extern const int32_t llmc_domain_count = {len(variants)};
extern const int32_t llmc_region_count = {len(builders)};
}}
"""


def compile_source(source: str, isa: InstructionSet, compiler: Compiler) -> bytes:
    """Compile a generated program; see `compile_library` for its errors."""
    folder = files("llmc") / "kernels"
    sources = {entry.name: entry.read_text(encoding="utf-8") for entry in folder.iterdir() if entry.is_file()}
    flags = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-w")
    units = (TranslationUnit("glue.cpp", isa.defines), TranslationUnit("model.cpp", isa.flags))
    sources["model.cpp"] = f"{agreement_text()}\n{source}"
    return compile_library(compiler, sources, units, flags)
