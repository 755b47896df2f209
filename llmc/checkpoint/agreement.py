"""Whether llmc reads the same parameters from a checkpoint as transformers' own loader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.errors import CheckpointError
from llmc.graph.weights import Array, StoredRows, row_chunks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

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
    transformers dequantizes, and what transformers keeps in codes is not compared. Takes the memory of the
    model in float32.
    """
    if checkpoint.reader_only:
        return Agreement(left_out=checkpoint.reader_only)
    optional = checkpoint.quantization is not None or checkpoint.path.is_file()
    try:
        model = checkpoint.load_with_transformers()
    except CheckpointError as error:
        return Agreement(left_out=error.fact) if optional else Agreement((error.fact,))
    except Exception as error:  # quantizers of transformers raise whatever a missing package leads to
        if not optional:
            raise
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        return Agreement(left_out=f"transformers cannot load it here ({told})")
    tolerance = 0.0 if checkpoint.quantization is None else _BFLOAT16_ROUNDING
    return _compare(checkpoint, model, tolerance)


def _compare(checkpoint: Checkpoint, model: PreTrainedModel, tolerance: float) -> Agreement:
    theirs: dict[str, torch.Tensor] = dict(model.state_dict())
    infos = checkpoint.tensors.infos()
    mismatches, packed, compared = [], [], 0
    for name, source in {**{name: name for name in infos}, **checkpoint.tied}.items():
        info, value = infos[source], theirs.get(name)
        plain = value is not None and value.element_size() > 1 and value.is_floating_point()
        if checkpoint.quantization is not None and not (
            value is not None and plain and tuple(value.shape) == info.shape
        ):
            packed.append(name)
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
    left_out = f"transformers keeps {len(packed)} of its tensors in codes" if packed else ""
    return Agreement(tuple(mismatches), compared, left_out)


def _differing(rows: StoredRows, value: Any, tolerance: float) -> Iterator[int]:
    """How many values differ, range of rows by range of rows."""
    import torch

    for start, stop in row_chunks(rows):
        part: Array = (value[start:stop] if rows.shape else value).to(torch.float32).numpy()
        ours = rows.rows(start, stop).astype(np.float32)
        yield int(np.count_nonzero(~(np.abs(ours - part) <= tolerance * np.abs(part))))
