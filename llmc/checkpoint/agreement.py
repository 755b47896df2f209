"""Whether llmc reads the same parameters from a checkpoint as transformers' own loader."""

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

#: transformers dequantizes to 16 bits, of which bfloat16 has the fewest for a fraction.
_BFLOAT16_ROUNDING = 2.0**-8


@dataclass(frozen=True)
class Agreement:
    """What came out of a comparison.

    Args:
        mismatches: Parameters that differ, each with how.
        compared: How many parameters were compared.
        left_out: Why the others were not; empty if all were.
    """

    mismatches: tuple[str, ...] = ()
    compared: int = 0
    left_out: str = ""


def compare_loaders(checkpoint: Checkpoint) -> Agreement:
    """Load the checkpoint by `from_pretrained`, and compare each parameter with what `checkpoint` reads.

    Values must be equal as float32. Of a quantized folder they may differ by the rounding of what
    transformers dequantizes; what it keeps in codes, or does not understand, is not compared. Of a model
    with an adapter the model without it is compared. Takes the memory of the model in float32.
    """
    if checkpoint.base is not None:
        found = compare_loaders(checkpoint.base)
        told = filter(None, [found.left_out, "the adapter's changes"])
        return replace(found, left_out="; ".join(told))
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
                f"{name} has shape {list(value.shape)} by transformers, {list(info.shape)} here"
            )
        else:
            differing = sum(_differing(StoredRows(checkpoint.tensors, info), value, tolerance))
            if differing:
                mismatches.append(f"{differing} of {value.numel()} values of {name} differ")
    left_out = f"transformers keeps {len(in_codes)} of its tensors in codes" if in_codes else ""
    return Agreement(tuple(mismatches), compared, left_out)


def _has_values(value: torch.Tensor | None, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has values rather than codes: floats of 16 bits or more, as many as expected."""
    if value is None or tuple(value.shape) != shape:
        return False
    return value.is_floating_point() and value.element_size() > 1


def _differing(rows: StoredRows, value: Any, tolerance: float) -> Iterator[int]:
    """How many values differ, range of rows by range of rows."""
    for start, stop in row_chunks(rows):
        part: Array = (value[start:stop] if rows.shape else value).float().numpy()
        ours = rows.rows(start, stop).astype(np.float32)
        yield int(np.count_nonzero(~(np.abs(ours - part) <= tolerance * np.abs(part))))
