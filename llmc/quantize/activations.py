"""Calibrate activations on text: measure their quantized ranges and their peaks, and smooth their channels.

Before an activation is quantized, its channels are divided by s = p**a / w**(1 - a), if that costs nothing,
with p the peak of the channel and w the peak of the weights that read it (SmoothQuant, Xiao et al. 2023). Of
the candidate exponents a, and of no division, the one is chosen whose products are nearest to those in float.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.arrays import Array
from llmc.artifact.store.disk import space_errors
from llmc.calibration.walk import named_linears
from llmc.config import EngineRule, WeightFormat
from llmc.errors import CheckpointError, ParityError
from llmc.graph.linear import Linear
from llmc.graph.model import Graph
from llmc.quantize.expert_inputs import ExpertInput, ExpertInputs, ExpertRange, read_expert_ranges
from llmc.quantize.fold import SharedInput, find_shared_inputs
from llmc.quantize.place import choose_scheme
from llmc.quantize.rounding import fake_quantize, fake_weights, noise_db, relative_noise

if TYPE_CHECKING:
    import torch

#: The file of an artifact with the factors by which channels of its activations were divided. It is in a
#: folder of its own, since servers load every safetensors file beside config.json.
SMOOTHING = "decisions/smoothing.safetensors"
#: Candidate exponents.
EXPONENTS = (0.5, 0.65, 0.8)
#: Number of tokens of the text on which exponents are compared.
_SAMPLE = 256
#: Lower bound of a channel's peak, relative to the median channel.
_QUIET = 1e-2


@dataclass(frozen=True)
class InputPlan:
    """The plan of an activation that is to be quantized.

    Args:
        sources: The checkpoint's names of the weights whose products are computed from it as quantized.
        kind: Type of activation and weights.
        foldable: Whether its channels can be divided at no cost.
        by_token: Whether each token has a scale of its own, found at run time.
    """

    sources: tuple[str, ...]
    kind: WeightFormat
    foldable: bool
    by_token: bool = False


@dataclass(frozen=True)
class InputRange:
    """The calibrated range of an activation.

    Args:
        peak: Largest magnitude, after its channels have been divided.
        smoothing: Factors by which channels are divided, (K,) float32; None for no division.
        snr_db: Mean signal-to-noise ratio of a token as quantized.
    """

    peak: float
    smoothing: Array | None
    snr_db: float


@dataclass(frozen=True)
class Activations:
    """The ranges and peaks that a walk measured.

    Args:
        ranges: Ranges by the first of the weights that read the activation.
        peaks: Largest magnitude of the result of each module of the model, by its name.
        experts: Ranges of what experts read, by the stacked parameter.
    """

    ranges: Mapping[str, InputRange] = field(default_factory=dict)
    peaks: Mapping[str, float] = field(default_factory=dict)
    experts: Mapping[str, ExpertRange] = field(default_factory=dict)

    @property
    def smoothing(self) -> dict[str, Array]:
        """The factors that channels are divided by, by the first of the weights that read the activation."""
        return {name: r.smoothing for name, r in self.ranges.items() if r.smoothing is not None}


def plan_inputs(graph: Graph, rules: Sequence[EngineRule]) -> tuple[InputPlan, ...]:
    """Plan the activations that the rules quantize, in graph order."""
    plans = []
    for shared in find_shared_inputs(graph):
        kind, linears = quantized_products(shared, rules)
        if kind is not None:
            quantized = replace(shared, linears=linears)
            schemes = (choose_scheme(rules, n.role, str(n.weight.name)) for n in linears)
            by_token = all(scheme is not None and not scheme.needs_range for scheme in schemes)
            plans.append(InputPlan(quantized.sources, kind, bool(shared.factors), by_token))
    return tuple(plans)


def quantized_products(
    shared: SharedInput, rules: Sequence[EngineRule]
) -> tuple[WeightFormat | None, tuple[Linear, ...]]:
    """Return the type in which the rules quantize an activation, and the products computed from it."""
    kinds = []
    for linear in shared.linears:
        scheme = choose_scheme(rules, linear.role, str(linear.weight.name))
        kinds.append(None if scheme is None or scheme.activations == "float" else scheme.format)
    kind = next((k for k in kinds if k is not None), None)
    return kind, tuple(n for n, k in zip(shared.linears, kinds, strict=True) if k is kind and k is not None)


class ActivationTask:
    """The layer task that measures a model's activations; see `LayerTask`.

    Args:
        plans: Activations that are to be quantized.
        tied: Parameter names absent from the checkpoint, and the stored name of the tensor that each is tied
            to.
        layers: Names of the decoder layers.
        windows: Number of windows of the text.
        experts: Stacks of experts whose activations are to be quantized.
    """

    changes = False
    together = False

    def __init__(
        self,
        plans: Iterable[InputPlan],
        tied: Mapping[str, str],
        layers: Sequence[str],
        windows: int,
        experts: Sequence[ExpertInput] = (),
    ) -> None:
        self._plans = tuple(plans)
        self._tied = tied
        self._inside = tuple(f"{name}." for name in layers)
        self._rows = -(-_SAMPLE // windows)
        self._seen: dict[str, _Observed] = {}
        self._peaks: dict[str, float] = {}
        self._experts = ExpertInputs(experts)

    @contextmanager
    def watch(self, name: str, module: torch.nn.Module) -> Iterator[None]:
        """Sample inputs of linear layers within this context, and record peaks of results."""
        self._seen, self._peaks = {}, {}
        linears = named_linears(name, module, self._tied)
        handles = []
        for plan in self._plans:
            own = [linears[s][1] for s in plan.sources if s in linears]
            if own and len(own) == len(plan.sources) and (name or self._outside(linears, plan)):
                seen = self._seen[plan.sources[0]] = _Observed(plan, own, self._rows)
                handles.append(own[0].register_forward_pre_hook(seen.take))
        for path, each in module.named_modules(prefix=name):
            if name or not f"{path}.".startswith(self._inside):
                handles.append(each.register_forward_hook(self._peak(path)))
        try:
            with self._experts.watch(name, module):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _outside(self, linears: Mapping[str, tuple[str, Any]], plan: InputPlan) -> bool:
        return not linears[plan.sources[0]][0].startswith(self._inside)

    def _peak(self, path: str) -> Callable[..., None]:
        import torch

        def note(_: Any, __: Any, result: Any) -> None:
            tensor = result[0] if isinstance(result, tuple) else result
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
                self._peaks[path] = max(self._peaks.get(path, 0.0), float(tensor.abs().max()))

        return note

    def conclude(self, name: str, module: torch.nn.Module) -> Mapping[str, Array]:
        """Return ranges of the layer's activations, and its peaks.

        Raises:
            CheckpointError: An activation is not finite.
        """
        data = {f"{path}.output": np.array([peak]) for path, peak in self._peaks.items()}
        for first, seen in self._seen.items():
            calibrated = seen.conclude(first)
            if calibrated is None:
                continue
            data[f"{first}.peak"] = np.array([calibrated.peak])
            data[f"{first}.snr_db"] = np.array([calibrated.snr_db])
            if calibrated.smoothing is not None:
                data[f"{first}.smoothing"] = calibrated.smoothing
        return data | self._experts.conclude()


def read_activations(files: Sequence[Path]) -> Activations:
    """Read the files that `ActivationTask` wrote."""
    from safetensors.numpy import load_file

    data: dict[str, Array] = {}
    for path in files:
        data.update(load_file(path))
    peaks = {k.removesuffix(".output"): float(v[0]) for k, v in data.items() if k.endswith(".output")}
    firsts = [k.removesuffix(".snr_db") for k in data if k.endswith(".snr_db")]
    ranges = {
        first: InputRange(
            float(data[f"{first}.peak"][0]), data.get(f"{first}.smoothing"), float(data[f"{first}.snr_db"][0])
        )
        for first in firsts
    }
    return Activations(ranges, peaks, read_expert_ranges(data))


def write_smoothing(folder: Path, vectors: Mapping[str, Array]) -> None:
    """Store the factors that channels were divided by beside the graph.

    Raises:
        ResourceError: Disk full.
    """
    from safetensors.numpy import save

    # `save_file` would create a file that other users cannot read.
    with space_errors(folder):
        (folder / SMOOTHING).parent.mkdir(exist_ok=True)
        (folder / SMOOTHING).write_bytes(save(dict(vectors)))


def read_ranges(folder: Path) -> Activations | None:
    """Read the ranges that the build of an artifact recorded in its reports; None if it did not."""
    try:
        facts = json.loads((folder / "reports" / "activations.json").read_text(encoding="utf-8"))
        pairs = {str(name): float(peak) for name, peak in facts["ranges"].items()}
        ratios = {name: float(facts["snr_db"][name]) for name in pairs}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Activations({name: InputRange(peak, None, ratios[name]) for name, peak in pairs.items()})


def read_smoothing(folder: Path) -> dict[str, Array]:
    """Read the file that `write_smoothing` wrote.

    Raises:
        ParityError: The file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / SMOOTHING
    try:
        vectors: dict[str, Array] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ParityError(
            f"{path}, which states the scaling of the artifact's weights, cannot be read: {error}"
        ) from error
    return vectors


class _Observed:
    """The observed inputs of the linear layers that read one activation."""

    def __init__(self, plan: InputPlan, linears: Sequence[torch.nn.Linear], rows: int) -> None:
        self._plan = plan
        self._linears = linears
        self._rows = rows
        self._channels: torch.Tensor | None = None
        self._sample: list[torch.Tensor] = []

    def take(self, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        """Record peaks of the channels, and some rows, which vary by window since first tokens differ."""
        import torch

        rows = args[0].reshape(-1, args[0].shape[-1]).float()
        peaks = rows.abs().amax(0)
        self._channels = peaks if self._channels is None else torch.maximum(self._channels, peaks)
        step = max(1, len(rows) // self._rows)
        self._sample.append(rows[len(self._sample) % step :: step].clone())

    def conclude(self, name: str) -> InputRange | None:
        """Return the range under the exponent with the nearest products; None if no input was observed."""
        import torch

        if self._channels is None:
            return None
        channels = self._channels
        if not bool(torch.isfinite(channels).all()):
            raise CheckpointError(
                f"the inputs of {name} on the calibration text are not all finite",
                hint="the checkpoint is damaged, or needs a target without calibration",
            )
        rows = torch.cat(self._sample)
        weights = torch.cat([linear.weight for linear in self._linears])
        expected = rows @ weights.T
        floor = channels.median().clamp(min=1e-6) * _QUIET
        loud, heavy = channels.clamp(min=float(floor)), weights.abs().amax(0).clamp(min=1e-6)
        best: tuple[float, torch.Tensor | None] | None = None
        for exponent in (None, *EXPONENTS) if self._plan.foldable else (None,):
            smoothing = None
            if exponent is not None:
                smoothing = loud**exponent / heavy ** (1 - exponent)
                smoothing = smoothing / smoothing.log().mean().exp()
            divided, peak = self._divide(rows, smoothing)
            scaled = weights if smoothing is None else weights * smoothing
            product = self._quantize(divided, peak) @ fake_weights(scaled, self._plan.kind).T
            error = float(relative_noise(expected, product).mean())
            if best is None or error < best[0]:
                best = (error, smoothing)
        smoothing = best[1] if best is not None else None
        divided, peak = self._divide(rows, smoothing)
        snr_db = noise_db(divided, self._quantize(divided, peak))
        return InputRange(peak, None if smoothing is None else smoothing.numpy(), snr_db)

    def _quantize(self, rows: torch.Tensor, peak: float) -> torch.Tensor:
        kind = self._plan.kind
        return fake_weights(rows, kind) if self._plan.by_token else fake_quantize(rows, kind, peak)

    def _divide(self, rows: torch.Tensor, smoothing: torch.Tensor | None) -> tuple[torch.Tensor, float]:
        """Return rows with their channels divided, and the largest magnitude on the whole text."""
        channels = self._channels
        if channels is None or smoothing is None:
            return rows, 0.0 if channels is None else float(channels.max())
        return rows / smoothing, float((channels / smoothing).max())
