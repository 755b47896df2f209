"""Prune over a walk: the inputs of each layer decide what is removed, and how the rest compensates for it.

The hidden states continue through the pruned layer, so that later layers compensate the loss of earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.arrays import Array
from llmc.calibration.walk import StopCallError
from llmc.errors import CheckpointError
from llmc.prune.sparse import sparsify
from llmc.prune.structured import refit, unit_errors
from llmc.prune.units import Units

if TYPE_CHECKING:
    import torch

#: The data that a walk stores of a layer: its influence; by parameter, which units stay, and new weights.
INFLUENCE, KEPT, WEIGHTS = "influence", ".kept", ".weights"


@dataclass(frozen=True)
class UnitChoice:
    """The number of units of a layer that stay, and their indices if they were decided before."""

    units: Units
    keep: int
    decided: Array | None = None


class InfluenceTask:
    """The layer task that measures how much each layer turns the hidden states: INFLUENCE, float64 (1,)."""

    changes = False
    together = False

    def __init__(self) -> None:
        self._sum = 0.0
        self._tokens = 0

    @contextmanager
    def watch(self, name: str, module: torch.nn.Module) -> Iterator[None]:
        """Sum the similarities of every token within this context."""
        self._sum, self._tokens = 0.0, 0
        hook = module.register_forward_hook(self._add, with_kwargs=True) if name else _stopped(module)
        with _removing([hook]):
            yield

    def _add(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        import torch

        before = args[0] if args else kwargs["hidden_states"]
        after = result[0] if isinstance(result, tuple) else result
        similar = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
        self._sum += float(similar.sum())
        self._tokens += similar.numel()

    def conclude(self, name: str, module: torch.nn.Module) -> Mapping[str, Array]:
        """Return one minus the mean over tokens.

        Raises:
            CheckpointError: Hidden states are not finite.
        """
        if not name:
            return {}
        influence = 1 - self._sum / self._tokens
        if not np.isfinite(influence):
            raise CheckpointError(
                f"the hidden states of {name} on the calibration text are not all finite",
                hint="the checkpoint is damaged",
            )
        return {INFLUENCE: np.array([influence])}


class UnitTask:
    """The layer task that chooses the units of each layer to keep, and refits the projections that read them.

    Removed units get zeros as columns there, which is the same to the layer as their absence. The data stored
    of each projection is KEPT, int64 (units,), and with repair WEIGHTS of the kept columns, float32.

    Args:
        choices: Choices by the name of the layer.
        dtypes: Stored type of each parameter.
        repair: Whether to refit what stays.
    """

    changes = True
    together = False

    def __init__(
        self, choices: Mapping[str, Sequence[UnitChoice]], dtypes: Mapping[str, np.dtype], *, repair: bool
    ) -> None:
        self._choices = choices
        self._dtypes = dtypes
        self._repair = repair
        self._inputs = _Inputs()

    @contextmanager
    def watch(self, name: str, module: torch.nn.Module) -> Iterator[None]:
        """Accumulate the Hessians of the projections within this context."""
        with self._inputs.watch(
            name, module, [c.units.reader.parameter for c in self._choices.get(name, ())]
        ):
            yield

    def conclude(self, name: str, module: torch.nn.Module) -> Mapping[str, Array]:
        """Return decisions and weights of the layer, and set the layer to these weights."""
        data: dict[str, Array] = {}
        for choice in self._choices.get(name, ()):
            reader = choice.units.reader
            weights = _get(module, name, reader.parameter)
            outputs_first = weights if reader.axis == 1 else weights.T
            hessian = self._inputs.hessian(reader.parameter)
            kept = choice.decided
            if kept is None:
                errors = unit_errors(
                    outputs_first, hessian, reader.width, reader.parameter, repair=self._repair
                )
                kept = np.sort(np.argsort(-errors, kind="stable")[: choice.keep])
            columns = reader.indices(kept)
            data[f"{reader.parameter}{KEPT}"] = kept
            stay = outputs_first[:, columns]
            if self._repair:
                stay = refit(outputs_first, hessian, columns, reader.parameter)
                stay = _as_stored(stay, self._dtypes[reader.parameter], reader.parameter)
                data[f"{reader.parameter}{WEIGHTS}"] = np.ascontiguousarray(
                    stay if reader.axis == 1 else stay.T
                )
            zeroed = np.zeros_like(outputs_first)
            zeroed[:, columns] = stay
            _put(module, name, reader.parameter, zeroed if reader.axis == 1 else zeroed.T)
        return data


class SparseTask:
    """The layer task that makes matrices of each layer 2:4 sparse along their inputs: WEIGHTS, float32.

    Args:
        matrices: Parameters by the name of the layer, and whether each is (outputs, inputs).
        dtypes: Stored type of each parameter.
        repair: Whether the remaining weights compensate for the removed ones.
    """

    changes = True
    together = False

    def __init__(
        self, matrices: Mapping[str, Mapping[str, bool]], dtypes: Mapping[str, np.dtype], *, repair: bool
    ) -> None:
        self._matrices = matrices
        self._dtypes = dtypes
        self._repair = repair
        self._inputs = _Inputs()

    @contextmanager
    def watch(self, name: str, module: torch.nn.Module) -> Iterator[None]:
        """Accumulate the Hessians of the matrices within this context."""
        with self._inputs.watch(name, module, list(self._matrices.get(name, {}))):
            yield

    def conclude(self, name: str, module: torch.nn.Module) -> Mapping[str, Array]:
        """Return weights of the layer, and set the layer to them."""
        data: dict[str, Array] = {}
        for parameter, outputs_first in self._matrices.get(name, {}).items():
            weights = _get(module, name, parameter)
            hessian = self._inputs.hessian(parameter)
            sparse = sparsify(
                weights if outputs_first else weights.T, hessian, parameter, repair=self._repair
            )
            stored = _as_stored(sparse if outputs_first else sparse.T, self._dtypes[parameter], parameter)
            data[f"{parameter}{WEIGHTS}"] = np.ascontiguousarray(stored)
            _put(module, name, parameter, stored)
        return data


class _Inputs:
    """The sums of x x' of modules' inputs x, by the parameter that each module multiplies with them."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    @contextmanager
    def watch(self, name: str, module: torch.nn.Module, parameters: Sequence[str]) -> Iterator[None]:
        """Accumulate them for `parameters` of the layer called `name` within this context."""
        self._sums = {}
        if name:
            owners = {p: module.get_submodule(_owner(name, p)) for p in parameters}
            hooks = [own.register_forward_pre_hook(self._adder(p)) for p, own in owners.items()]
        else:
            hooks = [_stopped(module)]
        with _removing(hooks):
            yield

    def hessian(self, parameter: str) -> Array:
        """Return the Hessian, (K, K) float32.

        Raises:
            CheckpointError: The module was not called.
        """
        if parameter not in self._sums:
            raise CheckpointError(
                f"the layer does not use {parameter} on the calibration text",
                hint="leave this recipe out of the target",
            )
        return self._sums[parameter].numpy()

    def _adder(self, parameter: str) -> Callable[..., None]:
        def add(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            product = x.T @ x
            total = self._sums.get(parameter)
            self._sums[parameter] = product if total is None else total.add_(product)

        return add


def _owner(layer: str, parameter: str) -> str:
    return parameter.removeprefix(f"{layer}.").rpartition(".")[0]


def _get(module: torch.nn.Module, layer: str, parameter: str) -> Array:
    weights: Array = module.get_parameter(parameter.removeprefix(f"{layer}.")).numpy()
    return weights


def _put(module: torch.nn.Module, layer: str, parameter: str, values: Array) -> None:
    import torch

    owner = module.get_submodule(_owner(layer, parameter))
    stored = torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(values)), requires_grad=False)
    owner._parameters[parameter.rpartition(".")[2]] = stored


def _as_stored(values: Array, dtype: np.dtype, parameter: str) -> Array:
    """Return values, float32, as they are read after storing them."""
    with np.errstate(over="ignore"):
        rounded: Array = values.astype(dtype).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise CheckpointError(
            f"weights of {parameter} that compensate for others do not fit {dtype}",
            hint="turn repair off, or use a longer calibration text",
        )
    return rounded


def _stopped(model: torch.nn.Module) -> Any:
    """Register a hook that ends a call before it begins: nothing behind the last layer is needed."""

    def stop(_: Any, __: Any) -> None:
        raise StopCallError

    return model.register_forward_pre_hook(stop)


@contextmanager
def _removing(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
