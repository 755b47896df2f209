"""Load a quantized folder that llmc wrote, by transformers' own loader where it has a reader of the format.

A server's users load such a folder with from_pretrained; its reader is other code than llmc's. It must read
every tensor of the files, and give each parameter the value that llmc's own reader gives it. transformers
reads compressed-tensors by the package of that name. It computes gptq and awq by kernels of gptqmodel in 16
bits, and does not know ModelOpt: such a folder runs with the weights that llmc reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.architecture import auto_class
from llmc.arrays import Array
from llmc.checkpoint.activations import quantize_inputs
from llmc.checkpoint.cache_rounding import CacheRounding, round_cache
from llmc.checkpoint.configuration import from_pretrained, loading
from llmc.checkpoint.quantization import QuantMethod
from llmc.errors import ResourceError, count_names
from llmc.graph.weights import StoredRows, row_chunks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmc.checkpoint.checkpoint import Checkpoint

_PACKAGE = "compressed-tensors"
#: Largest relative error of rounding to bfloat16, the narrowest type that compressed-tensors decompresses to.
_BFLOAT16 = 2.0**-8


@dataclass(frozen=True)
class LoadedFolder:
    """A folder as a transformers model in float32 on the CPU.

    Args:
        library: What loaded it, with versions.
        problems: Tensors that the loader did not read, and parameters with other values than llmc reads; a
            sentence each.
        note: What the loader rounded, or what was not computed as the format says; empty if nothing.
        fine: What was compared.
        cache: The rounding of keys and values; None if they stay in float.
    """

    model: PreTrainedModel
    library: str
    problems: tuple[str, ...] = ()
    note: str = ""
    fine: str = "llmc's own reader reads every tensor"
    cache: CacheRounding | None = None


def load_served(
    checkpoint: Checkpoint, *, quantize_activations: bool, quantize_cache: bool = False
) -> LoadedFolder:
    """Load the folder of `checkpoint` with transformers; activations are quantized as it declares, or not.

    With activations in float, parameters that the loader rounds have their values before rounding.

    Args:
        quantize_cache: Whether keys and values are rounded as the folder declares.

    Raises:
        ResourceError: The package that reads the format is not installed.
        CheckpointError: transformers cannot load it.
    """
    quantization = checkpoint.quantization
    library = f"transformers {version('transformers')}"
    lacks = _lack(checkpoint)
    if lacks is not None:
        why = f"with the weights that llmc reads; it {lacks}"
        library = f"{library} {why}"
        loaded = _rounding(checkpoint, checkpoint.fill_reference(), library, quantize_activations)
        return _with_cache(loaded, checkpoint) if quantize_cache else loaded
    if quantization is not None:
        _require_package()
        library += f", {_PACKAGE} {version(_PACKAGE)}"
    pair: tuple[Any, Mapping[str, Any]] = from_pretrained(
        checkpoint.path, auto_class(checkpoint.config), attn_implementation="eager", output_loading_info=True
    )
    model, info = pair
    narrow = frozenset[str]() if quantization is None else _decompress(model, checkpoint.path)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            is_cache = hasattr(module, "kv_cache")  # llmc rounds keys and values, whatever the release does
            module.quantization_enabled = quantize_activations and not is_cache
    model.requires_grad_(False)
    agreed = _agree(model, checkpoint, narrow, exact=not quantize_activations)
    problems = (*_unread(info, set(checkpoint.unused)), *agreed.problems)
    fine = f"transformers reads every tensor; {agreed.compared} parameters have the values that llmc reads"
    folder = LoadedFolder(model.eval(), library, problems, agreed.note, fine)
    return _with_cache(folder, checkpoint) if quantize_cache else folder


def _with_cache(loaded: LoadedFolder, checkpoint: Checkpoint) -> LoadedFolder:
    """Let the model round keys and values as the folder declares, and say so."""
    cache = round_cache(loaded.model, checkpoint)
    if cache is None:
        return loaded
    note = f"llmc rounds keys and values of {len(cache.scales)} layers to fp8 as the folder declares"
    note = "; ".join(filter(None, [loaded.note, note]))
    return replace(loaded, problems=(*loaded.problems, *cache.problems), note=note, cache=cache)


def _lack(checkpoint: Checkpoint) -> str | None:
    """Return what transformers' loader lacks to load the folder in float32 here; None if nothing."""
    if checkpoint.quantization is None:
        return None
    if checkpoint.quantization.method is not QuantMethod.COMPRESSED_TENSORS:
        return f"has no reader of {checkpoint.quantization.method} here"
    infos = checkpoint.tensors.infos().values()
    if any(len(info.shape) == 3 and info.codes is not None for info in infos):
        return "does not stack experts that are quantized one by one"
    return None


def stream_served(
    checkpoint: Checkpoint, *, quantize_activations: bool, quantize_cache: bool = False
) -> LoadedFolder:
    """Run the folder of `checkpoint` layer by layer, with the weights that llmc reads."""
    library = f"transformers {version('transformers')} layer by layer with the weights that llmc reads"
    library += "; its own loader would need more memory than is free"
    loaded = _rounding(checkpoint, checkpoint.stream_reference({}), library, quantize_activations)
    return _with_cache(loaded, checkpoint) if quantize_cache else loaded


def _rounding(checkpoint: Checkpoint, model: Any, library: str, quantize_activations: bool) -> LoadedFolder:
    """Return a model that has the weights that llmc reads, and say what its activations are."""
    note = ""
    if quantize_activations and checkpoint.quantization is not None:
        methods = (QuantMethod.MODELOPT, QuantMethod.COMPRESSED_TENSORS)
        if checkpoint.quantization.method in methods and (count := quantize_inputs(model, checkpoint)):
            note = f"llmc rounds what {count} matrices are multiplied with as the folder declares"
    return LoadedFolder(model, library, note=note)


def _require_package() -> None:
    """Import compressed-tensors, whose log goes to the terminal unless it is turned off.

    Raises:
        ResourceError: It is not installed.
    """
    if find_spec("compressed_tensors") is None:
        raise ResourceError(
            f"{_PACKAGE} is not installed, by which transformers reads this folder",
            hint="pip install 'llmc[servers]'",
        )
    import_module("loguru").logger.disable("compressed_tensors")


def _decompress(model: Any, path: Path) -> frozenset[str]:
    """Let compressed-tensors decompress all weights now, not in the first step, and widen them to float32.

    Returns:
        Names of parameters that it decompressed to a narrower type.
    """
    import torch

    with loading(path):
        model.hf_quantizer.compressor.decompress_model(model)
    narrow = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype is not torch.float32:
            tensor.data = tensor.data.float()
            narrow.add(name)
    return frozenset(narrow)


def _unread(info: Mapping[str, Any], unused: set[str]) -> Iterator[str]:
    """Describe what transformers says that it did not find, did not use, or could not fit."""
    kinds = {
        "missing_keys": "transformers finds no tensor for",
        "unexpected_keys": "transformers does not read",
        "mismatched_keys": "transformers expects another shape of",
        "error_msgs": "transformers says",
    }
    for kind, what in kinds.items():
        found = (each if isinstance(each, str) else str(each[0]) for each in info.get(kind) or ())
        names = sorted({*found} - unused)
        if names:
            yield f"{what} {count_names(names)}"


@dataclass(frozen=True)
class _Agreed:
    problems: tuple[str, ...]
    note: str
    compared: int


def _agree(model: Any, checkpoint: Checkpoint, narrow: Collection[str], *, exact: bool) -> _Agreed:
    """Compare every parameter and persistent buffer with what llmc reads.

    Args:
        narrow: Parameters that were decompressed to bfloat16.
        exact: Whether to undo that rounding.
    """
    state, problems, rounded, compared = model.state_dict(), [], 0, 0
    for name, info in checkpoint.tensors.infos().items():
        value = state.get(name)
        if value is None or tuple(value.shape) != info.shape:
            shape = None if value is None else list(value.shape)
            problems.append(f"{name} has shape {shape} in transformers and {list(info.shape)} in llmc")
            continue
        rows = StoredRows(checkpoint.tensors, info)
        largest, differing = _apart(rows, value)
        compared += 1
        if differing and name in narrow and largest <= _BFLOAT16:
            rounded += 1
            if exact:
                _put(rows, value)
        elif differing:
            problems.append(f"{differing} of {value.numel()} values of {name} differ in transformers")
    note = ""
    if rounded:
        note = f"compressed-tensors decompresses {rounded} matrices to bfloat16, which rounds them"
        note += ", and the values before are used" if exact else ""
    return _Agreed(tuple(problems), note, compared)


def _apart(rows: StoredRows, value: Any) -> tuple[float, int]:
    """Return the largest difference relative to the value, and how many values differ."""
    largest, differing = 0.0, 0
    for ours, part in _parts(rows, value):
        apart = np.abs(ours - part.float().numpy())
        ratios = apart / np.maximum(np.abs(ours), np.finfo(np.float32).tiny)
        differing += int(np.count_nonzero(~(apart == 0)))  # NaN differs
        largest = max(largest, float(np.nan_to_num(ratios, nan=np.inf).max(initial=0.0)))
    return largest, differing


def _put(rows: StoredRows, value: Any) -> None:
    import torch

    with torch.no_grad():
        for ours, part in _parts(rows, value):
            part.copy_(torch.from_numpy(ours))


def _parts(rows: StoredRows, value: Any) -> Iterator[tuple[Array, Any]]:
    """Yield what llmc reads, float32, and the same part of a tensor."""
    for start, stop in row_chunks(rows):
        part = value[start:stop] if rows.shape else value
        yield rows.rows(start, stop).astype(np.float32).reshape(tuple(part.shape)), part
