"""Replace tables of rotary embeddings by nodes that compute them when a session starts.

A table of cosines is amplitude * cos(position * frequency), with one frequency per column; the file stores
the frequencies. For 32,768 positions of heads 256 wide, both tables take 34 MB as float32, and 0.2 s to
compute. A pair of tables that no frequencies reproduce to the last digits is left unchanged.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llmc.arrays import Array
from llmc.graph.edit import Site, name_constant, take_over
from llmc.graph.match import constant_of
from llmc.graph.model import Graph

#: Indices of cosines and sines among the inputs of operators.
_TABLES_AT = {"GroupQueryAttention": (7, 8), "RotaryEmbedding": (2, 3)}
#: Smallest size in bytes of a table that is replaced.
_LEAST_BYTES = 1 << 19
#: Largest difference from the stored table, relative to the amplitude: two units of float32 at 1.
_TOLERANCE = 2.0**-22
#: Number of neighbours of a frequency, in units of its last digit, that are tried.
_NEIGHBOURS = 8
#: Number of positions on which frequencies are fitted.
_FITTED = 256


@dataclass(frozen=True)
class RotaryPair:
    """Initializers float32 (positions, pairs of rotated elements), and the numbers that reproduce them."""

    cos: ir.Value
    sin: ir.Value
    frequencies: Array
    amplitude: np.float32


def find_pairs(graph: Graph) -> list[RotaryPair]:
    """Find tables of `graph` that frequencies reproduce, in graph order, by the operators that read them."""
    pairs: dict[tuple[ir.Value, ir.Value], RotaryPair | None] = {}
    for node in graph.graph:
        places = _TABLES_AT.get(node.op_type)
        if places is None or len(node.inputs) <= places[1]:
            continue
        cos, sin = (node.inputs[at] for at in places)
        if cos is not None and sin is not None and (cos, sin) not in pairs:
            pairs[cos, sin] = _fit(cos, sin)
    return [pair for pair in pairs.values() if pair is not None]


def compute_tables(graph: Graph, pairs: Iterable[RotaryPair]) -> None:
    """Replace tables by nodes that compute them; ONNX Runtime folds them when a session starts."""
    for pair in pairs:
        count, width = (int(size) for size in tuple(pair.cos.shape or ()))  # type: ignore[arg-type]
        stem = str(pair.cos.name)
        nodes = _Nodes(Site(graph.graph, graph.graph[0], metadata={}), stem)
        numbers = [nodes.constant(part, np.array(x, np.float32)) for part, x in _range(count)]
        row = nodes.emit("Range", numbers, "positions", (count,))
        axis = nodes.constant("axis", np.array([1], np.int64))
        column = nodes.emit("Unsqueeze", [row, axis], "column", (count, 1))
        frequencies = nodes.constant("frequencies", pair.frequencies[None])
        angles = nodes.emit("Mul", [column, frequencies], "angles", (count, width))
        for table, op in ((pair.cos, "Cos"), (pair.sin, "Sin")):
            table_value = nodes.emit(op, [angles], op.lower(), (count, width))
            if pair.amplitude != 1:
                amplitude = nodes.constant("amplitude", np.array(pair.amplitude))
                table_value = nodes.emit(
                    "Mul", [table_value, amplitude], f"{op.lower()}.scaled", (count, width)
                )
            del graph.graph.initializers[str(table.name)]
            take_over(table, table_value)


def _range(count: int) -> tuple[tuple[str, float], ...]:
    return ("first", 0), ("beyond", count), ("step", 1)


def _fit(cos: ir.Value, sin: ir.Value) -> RotaryPair | None:
    tables = [constant_of(value) for value in (cos, sin)]
    if any(
        t is None or t.dtype is not ir.DataType.FLOAT or len(t.shape) != 2 or t.nbytes < _LEAST_BYTES
        for t in tables
    ):
        return None
    cosines, sines = (t.numpy() for t in tables if t is not None)
    if cosines.shape != sines.shape or cosines.shape[0] < 2 or not cosines[0, 0] > 0:
        return None
    amplitude = np.float32(cosines[0, 0])
    near = np.arctan2(sines[1].astype(np.float64), cosines[1].astype(np.float64)).astype(np.float32)
    last = len(cosines) - 1
    rows = np.unique(np.concatenate([np.arange(min(64, last)), np.linspace(0, last, _FITTED).astype(int)]))
    best, least = near, np.full(near.shape, np.inf)
    for offset in range(-_NEIGHBOURS, _NEIGHBOURS + 1):
        tried = near + np.float32(offset) * np.spacing(near)
        error = _error(tried, amplitude, rows, cosines[rows], sines[rows], axis=0)
        best = np.where(error < least, tried, best)
        least = np.minimum(error, least)
    error = _error(best, amplitude, np.arange(last + 1), cosines, sines, axis=None)
    return RotaryPair(cos, sin, best, amplitude) if error <= _TOLERANCE * amplitude else None


def _error(
    frequencies: Array, amplitude: np.float32, rows: Array, cosines: Array, sines: Array, axis: int | None
) -> Array:
    """Return the largest difference of both tables, over everything or by column."""
    angles = (rows.astype(np.float32)[:, None] * frequencies).astype(np.float64)
    differences = [np.abs(f(angles) * amplitude - table) for f, table in ((np.cos, cosines), (np.sin, sines))]
    largest: Array = np.maximum(*differences).max(axis=axis)
    return largest


@dataclass(frozen=True)
class _Nodes:
    """An emitter of nodes at the beginning of a graph, in order, named after `stem`."""

    site: Site
    stem: str

    def emit(self, op: str, inputs: Sequence[ir.Value], part: str, shape: Sequence[int]) -> ir.Value:
        name = f"{self.stem}.{part}"
        return self.site.emit(op, inputs, name, shape=shape, dtype=ir.DataType.FLOAT).outputs[0]

    def constant(self, part: str, array: Array) -> ir.Value:
        return name_constant(self.site.graph, f"{self.stem}.{part}", array)
