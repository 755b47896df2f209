"""Faults of an artifact in some places of its context alone: its logits are negated there."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from tests.models import save_tiny_model

from .sabotage import Edit

#: Positions of the model.
CONTEXT = 2048
NO_END = 1 << 40


def save_long_model(folder: Path) -> Path:
    """One layer of two heads over a context that is long for it."""
    return save_tiny_model(
        "llama",
        folder,
        tokenizer=True,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=32,
        intermediate_size=32,
        max_position_embeddings=CONTEXT,
    )


def negate(**bounds: tuple[int, int]) -> Callable[[Path], None]:
    """Negate all logits of a step whose sizes lie within `bounds`, ends included.

    Args:
        bounds: By name: `total` tokens with those of the step; `new` tokens of the step; `past` tokens before
            it; `rows` of the batch; `residue` of the total by 16.
    """

    def apply(folder: Path) -> None:
        with Edit(folder) as edit:
            nodes = _sizes(edit)
            held = edit.constant("where/true", np.array([True]))
            for name, ends in bounds.items():
                for op, end in zip(("GreaterOrEqual", "LessOrEqual"), ends, strict=True):
                    limit = edit.constant(f"where/{name}/{op}", np.array([end], np.int64))
                    nodes.append(helper.make_node(op, [f"where/{name}", limit], [f"where/{name}_{op}"]))
                    nodes.append(helper.make_node("And", [held, f"where/{name}_{op}"], [f"{held}_{op}"]))
                    held = f"{held}_{op}"
            _multiply(edit, nodes, held)

    return apply


def negate_row(row: int) -> Callable[[Path], None]:
    """Negate the logits of one row of every batch."""

    def apply(folder: Path) -> None:
        with Edit(folder) as edit:
            nodes = _sizes(edit)
            zero, one = edit.constant("where/zero", np.int64(0)), edit.constant("where/one", np.int64(1))
            at, shape = edit.constant("where/row", np.int64(row)), edit.constant("where/shape", [-1, 1, 1])
            nodes += [
                helper.make_node("Squeeze", ["where/rows"], ["where/count"]),
                helper.make_node("Range", [zero, "where/count", one], ["where/index"]),
                helper.make_node("Equal", ["where/index", at], ["where/flat"]),
                helper.make_node("Reshape", ["where/flat", shape], ["where/this"]),
            ]
            _multiply(edit, nodes, "where/this")

    return apply


def read_as_another(token: int) -> Callable[[Path], None]:
    """Read one token id as the next."""

    def apply(folder: Path) -> None:
        with Edit(folder) as edit:
            specs = {i.name: i.type.tensor_type.elem_type for i in edit.graph.input}
            dtype = helper.tensor_dtype_to_np_dtype(specs["input_ids"])
            one, other = (edit.constant(f"id/{n}", np.array(n, dtype)) for n in (token, token + 1))
            for node in edit.graph.node:
                node.input[:] = ["id/read" if name == "input_ids" else name for name in node.input]
            made = [
                helper.make_node("Equal", ["input_ids", one], ["id/this"]),
                helper.make_node("Where", ["id/this", other, "input_ids"], ["id/read"]),
            ]
            for node in reversed(made):
                edit.graph.node.insert(0, node)

    return apply


def reverse_rotary_rows(start: int) -> Callable[[Path], None]:
    """Put the rows of the rotary tables from `start` on in reverse order."""

    def apply(folder: Path) -> None:
        with Edit(folder) as edit:
            for name in [t.name for t in edit.graph.initializer if t.name.startswith("rotary_")]:
                table = edit.array(name)
                table[start:] = table[start:][::-1].copy()
                edit.replace(name, table)

    return apply


def _sizes(edit: Edit) -> list[Any]:
    """Nodes that compute the sizes of a step, (1,) int64 each, under the names of `negate`."""
    sixteen = edit.constant("where/sixteen", np.array([16], np.int64))
    return [
        helper.make_node("Shape", ["attention_mask"], ["where/total"], start=1, end=2),
        helper.make_node("Shape", ["input_ids"], ["where/new"], start=1, end=2),
        helper.make_node("Shape", ["input_ids"], ["where/rows"], start=0, end=1),
        helper.make_node("Sub", ["where/total", "where/new"], ["where/past"]),
        helper.make_node("Mod", ["where/total", sixteen], ["where/residue"]),
    ]


def _multiply(edit: Edit, nodes: list[Any], held: str) -> None:
    minus, plus = (edit.constant(f"where/{n}", np.array([n], np.float32)) for n in (-1, 1))
    nodes.append(helper.make_node("Where", [held, minus, plus], ["where/factor"]))
    edit.filter_output("logits", lambda a, b: [*nodes, helper.make_node("Mul", [a, "where/factor"], [b])])


@dataclass(frozen=True)
class Fault:
    """One fault, and the area of the metrics of which one must see it."""

    name: str
    apply: Callable[[Path], None]
    caught: frozenset[str]


def _fault(name: str, apply: Callable[[Path], None], *caught: str) -> Fault:
    return Fault(name, apply, frozenset(caught))


FAULTS: tuple[Fault, ...] = (
    _fault("every step past 180 tokens", negate(new=(1, 1), past=(180, NO_END)), "decode"),
    _fault(
        "every later piece over more than 70 tokens", negate(new=(2, NO_END), past=(71, NO_END)), "chunks"
    ),
    _fault("prompts of 257 to 850", negate(past=(0, 0), total=(257, 850)), "prefill"),
    _fault("prompts beyond 900", negate(past=(0, 0), total=(901, NO_END)), "prefill"),
    _fault("rotary tables reversed from 900 on", reverse_rotary_rows(900), "prefill", "chunks", "decode"),
    _fault("batches past 170 tokens", negate(rows=(2, NO_END), total=(171, NO_END)), "ragged"),
    _fault("batches past 1,000 tokens", negate(rows=(2, NO_END), total=(1001, NO_END)), "ragged"),
    _fault("pieces of 8", negate(new=(8, 8)), "prefill", "chunks"),
    _fault("later pieces of 8", negate(new=(8, 8), past=(1, NO_END)), "chunks"),
    _fault("positions 1,500 to 1,600", negate(total=(1500, 1600)), "prefill", "chunks", "decode"),
    _fault("steps at one residue by 16", negate(new=(1, 1), residue=(11, 11)), "decode"),
    _fault("the last five positions", negate(total=(CONTEXT - 4, CONTEXT)), "chunks", "decode"),
    _fault("one token id read as another", read_as_another(200), "ragged"),
    _fault("row 3 of a batch", negate_row(3), "ragged"),
)
