"""Ways to break what an artifact holds that a numeric comparison with loose bounds lets through."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper

from llmc.config import Metric

from .sabotage import Edit, Sabotage

M = Metric


def _change(folder: Path, match: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change every initializer whose name contains `match`."""
    with Edit(folder) as edit:
        names = [t.name for t in edit.graph.initializer if match in t.name]
        assert names, f"no {match} in this artifact"
        for name in names:
            array = edit.array(name)
            edit.replace(name, change(array).astype(array.dtype))


def noise_on_norms(folder: Path) -> None:
    random = np.random.default_rng(0)
    _change(folder, "norm.weight", lambda a: a + 1e-3 * random.standard_normal(a.shape))


def widen_scales(folder: Path) -> None:
    _change(folder, ".weight.scales", lambda a: a * 1.02)


def widen_scales_of_one_matrix(folder: Path) -> None:
    _change(folder, "layers.1.mlp.down_proj.weight.scales", lambda a: a * 1.1)


def move_zero_points(folder: Path) -> None:
    _change(folder, "layers.1.self_attn.qkv_proj.weight.zero_points", lambda a: a ^ 0x11)


def change_one_row(folder: Path) -> None:
    """One entry of the table of embedding and head is that of its neighbour."""

    def change(array: np.ndarray) -> np.ndarray:
        array[7] = array[8]
        return array

    with Edit(folder) as edit:
        for name in [t.name for t in edit.graph.initializer if t.name.startswith("lm_head.weight")]:
            if not name.endswith("entry_shape"):
                edit.replace(name, change(edit.array(name)))


def next_number(folder: Path) -> None:
    """One weight is the next number that its type holds."""

    def change(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[5] = np.nextafter(array.reshape(-1)[5], np.float32(9))
        return array

    _change(folder, "model.norm.weight", change)


def change_packed_byte(folder: Path) -> None:
    """The last code of a matrix of compiled kernels."""

    def change(array: np.ndarray) -> np.ndarray:
        array[-1, 100] ^= 0x10
        return array

    _change(folder, "layers.2.mlp.down_proj.weight.packed", change)


def reverse_late_rotary_rows(folder: Path) -> None:
    def change(array: np.ndarray) -> np.ndarray:
        array[200:] = array[200:][::-1]
        return array

    _change(folder, "rotary_", change)


def negate_late_logits(folder: Path) -> None:
    """Steps past 240 tokens of context have the opposite logits."""
    with Edit(folder) as edit:
        late, two = edit.constant("late", np.int64(240)), edit.constant("late/two", np.float32(2))
        one = edit.constant("late/one", np.float32(1))

        def make(a: str, b: str) -> list[Any]:
            return [
                helper.make_node("Shape", ["attention_mask"], ["late/shape"], start=1, end=2),
                helper.make_node("Greater", ["late/shape", late], ["late/beyond"]),
                helper.make_node("Cast", ["late/beyond"], ["late/number"], to=1),
                helper.make_node("Mul", ["late/number", two], ["late/twice"]),
                helper.make_node("Sub", [one, "late/twice"], ["late/sign"]),
                helper.make_node("Mul", [a, "late/sign"], [b]),
            ]

        edit.filter_output("logits", make)


def _ways(name: str, apply: Callable[[Path], None], artifacts: str, *caught: Metric) -> list[Sabotage]:
    return [Sabotage(name, artifact, apply, frozenset(caught)) for artifact in artifacts.split()]


CONTENT_SABOTAGES: tuple[Sabotage, ...] = (
    *_ways("noise of 1e-3 on every norm", noise_on_norms, "float int4 compiled", M.WEIGHTS_EXACT),
    *_ways("scales 2 % too wide", widen_scales, "int4", M.WEIGHTS_EXACT),
    *_ways("scales of one matrix 10 % too wide", widen_scales_of_one_matrix, "int4", M.WEIGHTS_EXACT),
    *_ways("zero points of one matrix moved", move_zero_points, "int4", M.WEIGHTS_EXACT),
    *_ways("one row of the table changed", change_one_row, "float int4", M.WEIGHTS_EXACT),
    *_ways("one weight changed in its last digit", next_number, "float int4 compiled", M.WEIGHTS_EXACT),
    *_ways("one packed code changed", change_packed_byte, "compiled", M.WEIGHTS_EXACT),
    *_ways(
        "late rows of the rotary tables reversed", reverse_late_rotary_rows, "float int4 compiled", M.GRAPH
    ),
    *_ways("logits negated past 240 tokens", negate_late_logits, "float int4 compiled", M.GRAPH),
)
