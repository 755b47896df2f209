"""Compare the parameters that llmc reads from a checkpoint with those that transformers' own loader reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.arrays import Array
from llmc.checkpoint.own_loader import load_with_transformers
from llmc.errors import CheckpointError, count_names
from llmc.graph.weights import StoredRows, row_chunks

if TYPE_CHECKING:
    import torch

    from llmc.checkpoint.checkpoint import Checkpoint

#: transformers dequantizes to 16 bits; of the 16-bit types, bfloat16 has the fewest fraction bits.
_BFLOAT16_ROUNDING = 2.0**-8


@dataclass(frozen=True)
class Agreement:
    """The result of a comparison.

    Args:
        mismatches: One sentence for each parameter that differs, saying how.
        compared: Number of parameters compared.
        left_out: Reason why the others were not compared; empty if all were.
    """

    mismatches: tuple[str, ...] = ()
    compared: int = 0
    left_out: str = ""


def compare_loaders(checkpoint: Checkpoint) -> Agreement:
    """Load the checkpoint by `from_pretrained`, and compare each parameter with what `checkpoint` reads.

    Values must be equal as float32. For a quantized folder they may differ by the rounding of transformers'
    dequantization; tensors that transformers keeps as codes, or does not understand, are not compared. For a
    model with an adapter, the base model is compared. Needs the memory of the model in float32.
    """
    if checkpoint.base is not None:
        result = compare_loaders(checkpoint.base)
        reasons = filter(None, [result.left_out, "the adapter's changes"])
        return replace(result, left_out="; ".join(reasons))
    if checkpoint.reader_only:
        return Agreement(left_out=checkpoint.reader_only)
    try:
        model, info = load_with_transformers(checkpoint.path, checkpoint.config)
    except CheckpointError as error:
        return Agreement(left_out=error.fact)
    if checkpoint.quantization is None:
        return _compare(checkpoint, dict(model.state_dict()), 0.0)
    unread = set(info["unexpected_keys"]) - set(checkpoint.unused)
    if unread:
        return Agreement(left_out=f"transformers does not read {count_names(sorted(unread))}")
    return _compare(checkpoint, dict(model.state_dict()), _BFLOAT16_ROUNDING)


def _compare(checkpoint: Checkpoint, theirs: Mapping[str, torch.Tensor], tolerance: float) -> Agreement:
    mismatches, in_codes, compared = [], [], 0
    for name, source in {**{name: name for name in checkpoint.tensors.infos()}, **checkpoint.tied}.items():
        info, value = checkpoint.tensors.infos()[source], theirs.get(name)
        if tolerance and not _has_values(value, info.shape):
            in_codes.append(name)
            continue
        compared += 1
        if value is None:
            mismatches.append(f"transformers' model has no {name}")
        elif tuple(value.shape) != info.shape:
            mismatches.append(
                f"{name} has shape {list(value.shape)} in transformers and {list(info.shape)} in llmc"
            )
        else:
            differing = sum(_differing(StoredRows(checkpoint.tensors, info), value, tolerance))
            if differing:
                mismatches.append(f"{differing} of {value.numel()} values of {name} differ")
    left_out = f"transformers keeps {len(in_codes)} of its tensors in codes" if in_codes else ""
    return Agreement(tuple(mismatches), compared, left_out)


def _has_values(value: torch.Tensor | None, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor holds values, not codes: floats of at least 16 bits, in the expected shape."""
    if value is None or tuple(value.shape) != shape:
        return False
    return value.is_floating_point() and value.element_size() > 1


def _differing(rows: StoredRows, value: Any, tolerance: float) -> Iterator[int]:
    """Count the values that differ, one range of rows at a time."""
    for start, stop in row_chunks(rows):
        part: Array = (value[start:stop] if rows.shape else value).float().numpy()
        ours = rows.rows(start, stop).astype(np.float32)
        yield int(np.count_nonzero(~(np.abs(ours - part) <= tolerance * np.abs(part))))
