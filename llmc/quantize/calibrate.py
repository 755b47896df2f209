"""Run calibrated methods over a walk: matrices are quantized with the inputs they get in the quantized model.

The windows run through a layer together where that is possible (`LayerWalk.runs_together`), and a matrix is
quantized the moment its inputs are known: whatever reads its outputs, in the same layer and in later ones,
compensates its error, and the model runs once. Otherwise windows run one by one, the layer is quantized
behind the last one, and runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.arrays import Array
from llmc.calibration.hessian import InputHessian, sum_of_squares
from llmc.calibration.walk import LayerWalk, StopCallError, named_linears
from llmc.config import WeightScheme
from llmc.graph.weights import WeightStore
from llmc.memory import trim_heap
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

    together = True

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
        self._at_once = False
        self.changes = True
        self._linears: dict[str, torch.nn.Linear] = {}
        self._hessians: dict[str, InputHessian] = {}
        self._latest: tuple[torch.Tensor, InputHessian] | None = None
        self._data: dict[str, Array] = {}

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
        self._at_once = self._walk.runs_together(windows)
        self.changes = not self._at_once
        return read_calibration(self._walk.run(windows, self, note), self._schemes, self._expert_schemes)

    @contextmanager
    def watch(self, name: str, module: torch.nn.Module) -> Iterator[None]:
        """Compute the Hessians of the inputs of linear layers within this context, and quantize at once."""
        self._hessians = {}
        self._data = {}
        self._linears = {
            stored: linear
            for stored, (path, linear) in named_linears(name, module, self._tied).items()
            if stored in self._schemes and (name or not path.startswith(self._inside))
        }
        handles = [
            linear.register_forward_pre_hook(self._adder(stored, in_layer=bool(name)))
            for stored, linear in self._linears.items()
        ]
        if not name and (head := self._needless()):
            handles.append(head.register_forward_pre_hook(_end_call))
        try:
            with self._experts.watch(name, module):
                yield
        finally:
            self._latest = None
            for handle in handles:
                handle.remove()

    def _needless(self) -> torch.nn.Module | None:
        """Return what need not run: the head, a large matrix, or the model if only layers are quantized."""
        whole: torch.nn.Module = self.model
        head: torch.nn.Module | None = self.model.get_output_embeddings()
        if not self._linears:
            return whole
        return None if head in self._linears.values() else head

    def _adder(self, name: str, *, in_layer: bool) -> Callable[..., None]:
        def add(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            if not (in_layer and self._at_once):
                found, before = self._hessian(args[0], name), self._hessians.get(name)
                total = found.matrix if before is None else before.matrix + found.matrix
                self._hessians[name] = InputHessian(total, name)
            elif f"{name}.width" not in self._data:  # it runs for the first time, on all windows
                self._quantize(name, self._hessian(args[0], name))
            if not in_layer:
                raise StopCallError

        return add

    def _hessian(self, activation: torch.Tensor, name: str) -> InputHessian:
        """Return the Hessian of an activation, computed once for layers that read it one after another."""
        if self._latest is None or self._latest[0] is not activation:
            self._latest = None
            trim_heap()  # blocks of many sizes, freed in another order, would take a multiple of their memory
            x = activation.reshape(-1, activation.shape[-1]).float().numpy()
            self._latest = (activation, InputHessian(sum_of_squares(x), name))
        return self._latest[1]

    def conclude(self, name: str, module: torch.nn.Module) -> Mapping[str, Array]:
        """Return codes, scales and zero points of the layer's matrices, which have their values by then."""
        for stored in self._linears:  # a layer that was never called is left out: its inputs are unknown
            if stored in self._hessians:
                self._quantize(stored, self._hessians[stored])
        for plan in self._channels:
            factors = self._data.get(f"{plan.sources[0]}.smoothing")
            if factors is None:
                continue
            for part in plan.divided:
                scales = f"{part.source}.scales"
                self._data[scales] = divide_outputs(self._data[scales], part.start, part.stop, factors)
        return self._data | self._experts.conclude()

    def _quantize(self, stored: str, hessian: InputHessian) -> None:
        """Quantize a matrix by the Hessian of its inputs, and give the layer its values."""
        import torch

        linear, scheme = self._linears[stored], self._schemes[stored]
        weights = linear.weight.numpy()
        factors = self._factors(stored, hessian)
        if factors is not None:
            weights = weights * factors
            hessian = InputHessian(hessian.matrix / np.outer(factors, factors), stored)
        blocks = find_calibrated(scheme).calibrate(weights, hessian, scheme, self._scale_type, stored)
        read_back = dequantize_blocks(blocks)
        if factors is not None:
            read_back /= factors
        linear.weight = torch.nn.Parameter(torch.from_numpy(read_back), requires_grad=False)
        for member in _MEMBERS:
            array = getattr(blocks, member)
            if array is not None:
                self._data[f"{stored}.{member}"] = array
        self._data[f"{stored}.width"] = np.array([blocks.in_features])

    def _factors(self, stored: str, hessian: InputHessian) -> Array | None:
        """Return the factors that the channels of a matrix's input are divided by; None without any.

        They are searched for the first of the matrices that read the input, while all of them are in float.
        """
        for plan in self._channels:
            key = f"{plan.sources[0]}.smoothing"
            if stored not in plan.sources or any(s not in self._linears for s in plan.sources):
                continue
            if key not in self._data and not any(f"{s}.width" in self._data for s in plan.sources):
                weights = [self._linears[s].weight.numpy() for s in plan.sources]
                schemes = [self._schemes[s] for s in plan.sources]
                factors = search_channels(weights, hessian.matrix, schemes, plan.sources[0])
                if factors is not None:
                    self._data[key] = factors
            return self._data.get(key)
        return None


def _end_call(*_: Any) -> None:
    raise StopCallError
