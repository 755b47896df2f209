"""Calibrate the scales of a KV cache in fp8 (E4M3) that servers read from a checkpoint.

A layer has one scale for all of its keys and one for all of its values. A server stores
`round_to_E4M3(x / scale)`, within the largest number of E4M3, 448, and reads it back times the scale. The
scale is the largest magnitude on the calibration text over 448, with keys as the cache has them: after their
norm and rotary embedding.

- vLLM 0.32.0 (`model_executor/layers/quantization/kv_cache.py`, `.../compressed_tensors.py`) reads one
  positive scale each, and takes 1 where a layer has none; other codes are clamped.
- compressed-tensors 0.19.0 (`modeling/kvcache.py`): quantizes what `Cache.update` is given, by `k_scale` and
  `v_scale` of the attention module.
- ModelOpt (`torch/export/quant_utils.py`): largest magnitudes of `k_bmm_quantizer` and `v_bmm_quantizer`
  over 448, which it raises to 1 where they are less; E4M3 has few numbers near 0, so that llmc does not.
- TensorRT-LLM (`_torch/modules/linear.py`): `load_kv_cache_scales` reads the names of ModelOpt, one scale for
  keys and one for values of the joined product of queries, keys and values.

A scale is rounded up to 8 significant bits (`tensor_scale`), so that every server has the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from llmc.architecture import watch_cache
from llmc.arrays import Array
from llmc.calibration.walk import LayerWalk
from llmc.config import WeightFormat
from llmc.errors import CheckpointError, UnsupportedError
from llmc.graph.interface import CacheSlot
from llmc.graph.linear import as_linear
from llmc.graph.match import lazy_of
from llmc.graph.model import LAYER, Graph
from llmc.quantize.formats import tensor_scale

if TYPE_CHECKING:
    import torch

#: The key of the `CacheScales` of all layers in the `meta` of a graph.
CACHE_SCALES = "llmc.cache_scales"
_FLOAT = "leave kv_cache out of the target; servers then keep their cache in the type of activations"


@dataclass(frozen=True)
class CachePeaks:
    """The largest magnitudes of the keys and values that a layer stores."""

    keys: float
    values: float


@dataclass(frozen=True)
class CacheScales:
    """The scales of the KV cache of one layer.

    Args:
        weight: A weight of a linear layer in the attention module, as the checkpoint names it.
        keys: What codes of keys are multiplied by.
        values: What codes of values are multiplied by.
    """

    weight: str
    keys: float
    values: float

    @property
    def module(self) -> str:
        """The name of the attention module."""
        return module_of(self.weight)


def module_of(weight: str) -> str:
    """Return the attention module that has the linear layer with this weight."""
    return weight.rpartition(".")[0].rpartition(".")[0]


class CacheWalk(LayerWalk):
    """The walk of a model whose layers store keys and values, as the model does when it generates.

    Every call begins with an empty cache, to which only the current layer adds.
    """

    def run_peaks(self, windows: Array, note: Callable[[str], None]) -> dict[int, CachePeaks]:
        """Return the peaks of every layer with a KV cache, by its number; see `LayerWalk.run`."""
        self._task = CacheTask()
        return read_peaks(self.run(windows, self._task, note))

    def over(self) -> dict[str, Any]:
        """Return a new cache that is watched."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        return {"use_cache": True, "cache": watch_cache(cache, self._task.see)}


class CacheTask:
    """The layer task that measures peaks of keys and values; see `LayerTask`."""

    changes = False
    together = False

    def __init__(self) -> None:
        self._peaks: dict[str, float] = {}

    def see(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Note the peaks of what layer number `layer` stores, and return it unchanged."""
        for kind, tensor in (("keys", keys), ("values", values)):
            name = f"{layer}.{kind}"
            peak = float(tensor.abs().max()) if tensor.numel() else 0.0
            self._peaks[name] = float(np.maximum(self._peaks.get(name, 0.0), peak))  # NaN stays
        return keys, values

    @contextmanager
    def watch(self, name: str, module: torch.nn.Module) -> Iterator[None]:
        """Forget the peaks of the layer before."""
        self._peaks = {}
        yield

    def conclude(self, name: str, module: torch.nn.Module) -> Mapping[str, Array]:
        """Return the peaks of the layer; none if it stores no keys.

        Raises:
            CheckpointError: A key or value is not finite.
        """
        for kind, peak in self._peaks.items():
            if not np.isfinite(peak):
                raise CheckpointError(
                    f"layer {kind.replace('.', ' has ')} on the calibration text that are not all finite",
                    hint="the checkpoint is damaged, or needs a target without kv_cache",
                )
        return {kind: np.array([peak]) for kind, peak in self._peaks.items()}


def read_peaks(files: Sequence[Path]) -> dict[int, CachePeaks]:
    """Read the files that a walk with `CacheTask` wrote."""
    from safetensors.numpy import load_file

    data: dict[str, Array] = {}
    for path in files:
        data.update(load_file(path))
    layers = sorted({int(name.partition(".")[0]) for name in data})
    return {n: CachePeaks(float(data[f"{n}.keys"][0]), float(data[f"{n}.values"][0])) for n in layers}


def plan_cache(graph: Graph, config: Any) -> dict[int, str]:
    """Return a weight of the attention module of each layer with a KV cache, by the layer's number.

    Layers that keep states of fixed size have none.

    Args:
        graph: The graph before quantization.
        config: transformers configuration of the model.

    Raises:
        UnsupportedError: The model has no KV cache, caches latents, or layers read the cache of another one.
    """
    if not graph.cache:
        raise UnsupportedError("the model has no KV cache, so that it has no scales either", hint=_FLOAT)
    if getattr(config.get_text_config(decoder=True), "kv_lora_rank", None):
        raise UnsupportedError(
            "the model has latent attention: servers cache latents by one scale, and llmc measures keys and "
            "values",
            hint=_FLOAT,
        )
    outputs = {value.name: value for value in graph.graph.outputs}
    places: dict[int, str] = {}
    for slot in graph.cache:
        reader = _other_reader(graph, slot)
        if reader is not None:
            raise UnsupportedError(
                f"layer {reader} reads the keys and values that layer {slot.layer} stores, and llmc does not "
                "calibrate a shared cache",
                hint=_FLOAT,
            )
        weight = _nearest_weight(outputs[slot.present_value])
        if weight is None or module_of(weight) in map(module_of, places.values()):
            what = "come from no linear layer" if weight is None else "are not the only ones of its module"
            raise UnsupportedError(
                f"the keys and values of layer {slot.layer} {what}, so that servers have no scales for them",
                hint=_FLOAT,
            )
        places[slot.layer] = weight
    return places


def mark_cache(graph: Graph, config: Any, peaks: Mapping[int, CachePeaks] | None) -> None:
    """Note in `graph` the scales of its KV cache.

    Args:
        peaks: The peaks by layer; None if they are not known, for scales of 1 in their place.

    Raises:
        UnsupportedError: As `plan_cache`; or a layer stored nothing.
    """
    scales = []
    for layer, weight in plan_cache(graph, config).items():
        seen = CachePeaks(0.0, 0.0) if peaks is None else peaks.get(layer)
        if seen is None:
            raise UnsupportedError(
                f"layer {layer} stored no keys and values when the model was run layer by layer", hint=_FLOAT
            )
        scales.append(CacheScales(weight, cache_scale_of(seen.keys), cache_scale_of(seen.values)))
    graph.graph.meta[CACHE_SCALES] = tuple(scales)


def cache_scales(graph: Graph) -> tuple[CacheScales, ...]:
    """Return the scales that `mark_cache` noted, by layer."""
    found: tuple[CacheScales, ...] = graph.graph.meta.get(CACHE_SCALES, ())
    return found


def cache_scale_of(peak: float) -> float:
    """Return the scale of keys or values whose largest magnitude is `peak`; 1 if they are all zero."""
    return float(tensor_scale(peak, WeightFormat.FP8))


def _other_reader(graph: Graph, slot: CacheSlot) -> int | None:
    """Return the first other layer that reads what a layer stores; None if there is none."""
    names = {*slot.names}
    for node in graph.graph:
        layer = int(node.metadata_props.get(LAYER, slot.layer))
        if layer != slot.layer and any(value is not None and value.name in names for value in node.inputs):
            return layer
    return None


def _nearest_weight(value: ir.Value) -> str | None:
    """Return the weight of a linear layer from which a value comes without another one in between."""
    seen, waiting = set[ir.Node](), [value.producer()]
    while waiting:
        node = waiting.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        linear = as_linear(node)
        if linear is not None:
            return lazy_of(linear.weight).sources[0]
        waiting += [each.producer() for each in reversed(node.inputs) if each is not None]
    return None
