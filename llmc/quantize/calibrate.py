"""Run calibrated methods over a walk: each layer is quantized with the inputs it gets in the quantized model.

The hidden states continue through the quantized layer, so that later layers compensate the error of earlier
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.arrays import Array
from llmc.calibration.walk import LayerWalk, StopCallError, named_linears
from llmc.config import WeightScheme
from llmc.graph.weights import WeightStore
from llmc.quantize.awq import ChannelPlan, divide_outputs, search_channels
from llmc.quantize.blocks import PackedBlocks, ScaleType, dequantize_blocks
from llmc.quantize.calibrate_experts import CalibratedExperts, ExpertCalibrator, read_calibrated_experts
from llmc.quantize.methods import find_calibrated

if TYPE_CHECKING:
    import torch

_MEMBERS = ("codes", "scales", "zero_points")


@dataclass(frozen=True)
class Calibration:
    """The matrices that were quantized on calibration text, by the checkpoint's tensor names.

    Args:
        files: The file that stores each tensor.
        schemes: The scheme by which each was quantized.
        widths: Number of input features of each.
        smoothing: Factors that channels of activations were divided by first, by the first of the weights
            that read the activation.
        experts: The matrices of experts.
    """

    files: Mapping[str, Path]
    schemes: Mapping[str, WeightScheme]
    widths: Mapping[str, int]
    smoothing: Mapping[str, Array] = field(default_factory=dict)
    experts: CalibratedExperts = field(default_factory=CalibratedExperts)

    def join(
        self, sources: Sequence[str], shape: tuple[int, int], scheme: WeightScheme
    ) -> PackedBlocks | None:
        """Join `sources` along N to a matrix (N, K); None if one of them was not calibrated with `scheme`."""
        from safetensors.numpy import load_file

        if any(s not in self.files or self.schemes[s] != scheme for s in sources):
            return None
        stored = [load_file(self.files[s]) for s in sources]
        parts = [[data.get(f"{s}.{m}") for s, data in zip(sources, stored, strict=True)] for m in _MEMBERS]
        codes, scales, zeros = (
            None if any(p is None for p in part) else np.concatenate([p for p in part if p is not None])
            for part in parts
        )
        if codes is None or scales is None or (len(scales), self.widths[sources[0]]) != shape:
            return None
        return PackedBlocks(codes, scales, zeros, shape[1], scheme)


def read_calibration(
    paths: Sequence[Path],
    schemes: Mapping[str, WeightScheme],
    experts: Mapping[str, WeightScheme] | None = None,
) -> Calibration:
    """Read the files that a `Calibrator` wrote.

    Args:
        paths: Its files, layer by layer and for the head.
        schemes: The scheme by which each tensor of the checkpoint was to be quantized.
        experts: The scheme of each stack of experts; None for no experts.
    """
    from safetensors import safe_open

    files: dict[str, Path] = {}
    widths: dict[str, int] = {}
    smoothing: dict[str, Array] = {}
    for path in paths:
        with safe_open(path, "np") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                if key.endswith(".width"):
                    name = key.removesuffix(".width")
                    files[name], widths[name] = path, int(file.get_tensor(key)[0])
                elif key.endswith(".smoothing"):
                    smoothing[key.removesuffix(".smoothing")] = file.get_tensor(key)
    return Calibration(files, schemes, widths, smoothing, read_calibrated_experts(paths, experts or {}))


class Calibrator:
    """The layer task that quantizes the linear layers of one model on calibration text.

    Args:
        model: A transformers causal LM in evaluation mode, parameters on the meta device, buffers real.
        layers: Qualified names of its decoder layers, in order.
        store: The checkpoint's tensors.
        tied: Parameter names absent from the store, and the stored name of the tensor that each is tied to.
        schemes: Scheme of each tensor of the checkpoint; tensors that belong to no linear layer of the model
            are left out.
        scale_type: Type of the stored scales.
        folder: Folder in which finished layers are stored, and found again.
        channels: Activations whose channels are scaled first if that reduces the error.
        experts: Scheme of each stacked parameter of experts, (experts, N, K).
    """

    changes = True

    def __init__(
        self,
        model: Any,
        layers: Sequence[str],
        store: WeightStore,
        tied: Mapping[str, str],
        schemes: Mapping[str, WeightScheme],
        scale_type: ScaleType,
        folder: Path,
        channels: Sequence[ChannelPlan] = (),
        experts: Mapping[str, WeightScheme] | None = None,
    ) -> None:
        self.model = model
        self._walk = LayerWalk(model, layers, store, tied, folder)
        self._inside = tuple(f"{name}." for name in layers)
        self._tied = tied
        self._schemes = schemes
        self._scale_type = scale_type
        self._channels = channels
        self._expert_schemes = experts or {}
        self._experts = ExpertCalibrator(self._expert_schemes, scale_type, folder)
        self._linears: dict[str, torch.nn.Linear] = {}
        self._hessians: dict[str, torch.Tensor] = {}
        self._latest: tuple[torch.Tensor, torch.Tensor] | None = None

    def run(self, windows: Array, note: Callable[[str], None]) -> Calibration:
        """Quantize every layer, then the head, continuing after the last layer that is on disk.

        Args:
            windows: (windows, length) int64 token ids.
            note: Called with a description of the work that was resumed.

        Raises:
            ConfigError: Fewer than LEAST_TOKENS tokens, or a Hessian that is singular.
            CheckpointError: Weights or activations are not finite.
            ResourceError: Disk full.
        """
        return read_calibration(self._walk.run(windows, self, note), self._schemes, self._expert_schemes)

    @contextmanager
    def watch(self, name: str, module: torch.nn.Module) -> Iterator[None]:
        """Accumulate sum(x x') of the inputs of linear layers within this context, (K, K) float32."""
        self._hessians = {}
        self._linears = {
            stored: linear
            for stored, (path, linear) in named_linears(name, module, self._tied).items()
            if stored in self._schemes and (name or not path.startswith(self._inside))
        }
        handles = [
            linear.register_forward_pre_hook(self._adder(stored, keep_going=bool(name)))
            for stored, linear in self._linears.items()
        ]
        if (
            not self._linears and not name
        ):  # only layers are quantized: the head, a large matrix, need not run
            handles.append(module.register_forward_pre_hook(_end_call))
        try:
            with self._experts.watch(name, module):
                yield
        finally:
            self._latest = None
            for handle in handles:
                handle.remove()

    def _adder(self, name: str, *, keep_going: bool) -> Callable[..., None]:
        def add(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            product = self._product(args[0])
            total = self._hessians.get(name)
            self._hessians[name] = product.clone() if total is None else total.add_(product)
            if not keep_going:
                raise StopCallError

        return add

    def _product(self, activation: torch.Tensor) -> torch.Tensor:
        """Return x' x of an activation, computed once for all layers that read it one after another."""
        if self._latest is None or self._latest[0] is not activation:
            x = activation.reshape(-1, activation.shape[-1]).float()
            self._latest = (activation, x.T @ x)
        return self._latest[1]

    def conclude(self, name: str, module: torch.nn.Module) -> Mapping[str, Array]:
        """Return codes, scales and zero points of the layer's matrices, and set the layer to their values."""
        import torch

        data = self._search_channels()
        multiplied = {s: p for p in self._channels if f"{p.sources[0]}.smoothing" in data for s in p.sources}
        divided = {d.source: (d, p) for p in multiplied.values() for d in p.divided}
        for stored, linear in self._linears.items():
            if stored not in self._hessians:  # the layer was never called: its inputs are unknown
                continue
            hessian = self._hessians[stored].numpy()
            weights = linear.weight.numpy()
            factors = None
            if stored in multiplied:
                factors = data[f"{multiplied[stored].sources[0]}.smoothing"]
                weights, hessian = weights * factors, hessian / np.outer(factors, factors)
            scheme = self._schemes[stored]
            blocks = find_calibrated(scheme).calibrate(weights, hessian, scheme, self._scale_type, stored)
            read_back = dequantize_blocks(blocks)
            if factors is not None:
                read_back /= factors
            linear.weight = torch.nn.Parameter(torch.from_numpy(read_back), requires_grad=False)
            if stored in divided:
                part, plan = divided[stored]
                own = data[f"{plan.sources[0]}.smoothing"]
                blocks = divide_outputs(blocks, part.start, part.stop, own)
            for member in _MEMBERS:
                array = getattr(blocks, member)
                if array is not None:
                    data[f"{stored}.{member}"] = array
            data[f"{stored}.width"] = np.array([blocks.in_features])
        return data | self._experts.conclude()

    def _search_channels(self) -> dict[str, Array]:
        """Return the factors that channels of the layer's activations are divided by, as they are stored."""
        vectors: dict[str, Array] = {}
        for plan in self._channels:
            if all(s in self._linears and s in self._hessians for s in plan.sources):
                first = plan.sources[0]
                factors = search_channels(
                    [self._linears[s].weight.numpy() for s in plan.sources],
                    self._hessians[first].numpy(),
                    [self._schemes[s] for s in plan.sources],
                    first,
                )
                if factors is not None:
                    vectors[f"{first}.smoothing"] = factors
        return vectors


def _end_call(*_: Any) -> None:
    raise StopCallError
