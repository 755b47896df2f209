"""Predict the KL divergence that rounding each matrix causes, with one layer in memory at a time.

To second order a small change d of a linear layer's results causes half of E[(g d)^2] in KL divergence, with
g the gradient of the log-likelihood of a token drawn from the model's own prediction (the Fisher
information). One forward walk over the layers on calibration text, and one backward walk with gradients, thus
price every scheme of every matrix. With x the input of a product by W, and W + D the stored matrix, the price
is the sum over tokens of (g D x)^2 / 2. Matrices behind the last layer, such as the head, are priced by the
KL divergence itself.

Calibrated schemes are priced with their searched scales alone, since calibration removes about the same share
of all prices; predictions are larger than the measured divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.arrays import Array
from llmc.calibration.hessian import weigh_features
from llmc.calibration.walk import LayerWalk, named_linears, replacing_input
from llmc.config import WeightScheme
from llmc.errors import CheckpointError
from llmc.graph.weights import WeightStore
from llmc.quantize.blocks import ScaleType, dequantize_blocks
from llmc.quantize.encode import quantize_blocks
from llmc.threads import spread

if TYPE_CHECKING:
    import torch

_SEED = 0


class _Nothing:
    """The layer task of a walk that computes only the hidden states."""

    changes = False
    together = False

    def watch(self, name: str, module: torch.nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def conclude(self, name: str, module: torch.nn.Module) -> Mapping[str, Array]:
        return {}


class SensitivityWalk(LayerWalk):
    """The walk that prices schemes for the linear layers of one model, and can be resumed.

    Args:
        model, layers, store, tied, folder: As for `LayerWalk`.
        schemes: The schemes to price, by the stored name of each weight.
        scale_type: Type of the stored scales.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[str],
        store: WeightStore,
        tied: Mapping[str, str],
        folder: Path,
        schemes: Mapping[str, Sequence[WeightScheme]],
        scale_type: ScaleType,
    ) -> None:
        super().__init__(model, layers, store, tied, folder, keep_states=True)
        self._schemes = schemes
        self._scale_type = scale_type

    def measure(self, windows: Array, note: Callable[[str], None]) -> dict[str, Array]:
        """Return the nats per token that each scheme costs, by stored name; other weights are left out.

        Args:
            windows: (windows, length) int64 token ids.
            note: Called with a description of the work that was resumed.

        Raises:
            ConfigError: Fewer than LEAST_TOKENS tokens.
            CheckpointError: A gradient is not finite.
            UnsupportedError: The model cannot be run layer by layer.
            ResourceError: Disk full.
        """
        import torch
        from safetensors.numpy import load_file

        count = len(self.layers)
        behind = count + 1  # parts from the head (count) down to layer 0; those from `behind` on are done
        while behind and self._file(f"prices-{behind - 1}").is_file():
            behind -= 1
        if behind <= count:
            note(f"{count + 1 - behind} of {count + 1} parts of the model were priced before")
        if behind > 0:
            self.run(windows, _Nothing(), note)
            self._load_outside()  # load again: tensors of inference mode take part in no gradient
        if behind == count + 1:
            with torch.no_grad():
                prices = self._price_head(windows)
            gradients = self._go_back_from_head(windows)
            self._finish(count, prices, gradients)
            behind = count
        for index in range(behind - 1, -1, -1):
            prices, gradients = self._go_back(index, windows)
            self._finish(index, prices, gradients)
        prices_by_name: dict[str, Array] = {}
        for index in range(count + 1):
            self._state_file(index).unlink(missing_ok=True)
            prices_by_name.update(load_file(self._file(f"prices-{index}")))
        return prices_by_name

    def _finish(self, index: int, prices: Mapping[str, Array], gradients: Sequence[torch.Tensor]) -> None:
        """Store the gradients of part `index`'s input, then its prices: prices on disk imply gradients."""
        from safetensors.torch import save_file

        if gradients:
            data = {str(i): gradient for i, gradient in enumerate(gradients)}
            self._write(self._file(f"gradients-{index}"), lambda path: save_file(data, path))
        self._keep(f"prices-{index}", prices)
        self._file(f"gradients-{index + 1}").unlink(missing_ok=True)

    def _price_head(self, windows: Array) -> dict[str, Array]:
        """Return the KL divergence of every scheme of each matrix behind the last layer."""
        import torch

        states = self._load_states(len(self.layers))
        inside = tuple(f"{name}." for name in self._names)
        prices_by_name = {}
        for stored, (path, linear) in named_linears("", self.model, self._tied).items():
            if stored not in self._schemes or path.startswith(inside):
                continue
            original = linear.weight
            squares = torch.zeros(linear.in_features)
            handle = linear.register_forward_pre_hook(partial(_add_squares, squares))
            for row, state in zip(windows, states, strict=True):
                self._logits(row, state)
            handle.remove()
            prices = []
            for scheme in self._schemes[stored]:
                rounded = self._rounded(original.numpy(), scheme, stored, squares.numpy())
                total = 0.0
                for row, state in zip(windows, states, strict=True):
                    p = torch.log_softmax(self._logits(row, state), -1)
                    linear.weight = torch.nn.Parameter(torch.from_numpy(rounded), requires_grad=False)
                    q = torch.log_softmax(self._logits(row, state), -1)
                    linear.weight = original
                    total += float((p.exp() * (p - q)).sum())
                prices.append(total / windows.size)
            prices_by_name[stored] = _finite(np.array(prices), stored)
        return prices_by_name

    def _go_back_from_head(self, windows: Array) -> list[torch.Tensor]:
        """Return gradients of one drawn token's log-likelihood per position, by the last layer's output."""
        import torch

        generator = torch.Generator().manual_seed(_SEED)
        gradients: list[torch.Tensor] = []
        for row, state in zip(windows, self._load_states(len(self.layers)), strict=True):
            leaf = state.requires_grad_()
            with torch.enable_grad():
                logp = torch.log_softmax(self._logits(row, leaf), -1)
                drawn = torch.multinomial(logp.detach().exp(), 1, generator=generator)
                loss = logp.gather(-1, drawn).sum()
            gradients += torch.autograd.grad(loss, [leaf])
        return gradients

    def _logits(self, row: Array, state: Any) -> torch.Tensor:
        """Return logits (length, vocabulary) float32."""
        with replacing_input(self.layers[-1], state):
            result: torch.Tensor = self._call(row[None]).logits[0].float()
        return result

    def _go_back(self, index: int, windows: Array) -> tuple[dict[str, Array], list[torch.Tensor]]:
        """Return prices of one layer, and the gradients of its input; no gradients for the first layer."""
        import torch
        from safetensors.torch import load_file

        layer, name = self.layers[index], self._names[index]
        upstream = load_file(self._file(f"gradients-{index + 1}"))
        states = self._load_states(index) if index else None
        parameters = [f"{name}.{n}" for n, _ in layer.named_parameters()]
        self._load(parameters)
        linears = {
            stored: linear
            for stored, (_, linear) in named_linears(name, layer, self._tied).items()
            if stored in self._schemes
        }
        prices = {stored: np.zeros(len(self._schemes[stored])) for stored in linears}
        observed: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {stored: [] for stored in linears}
        gradients: list[torch.Tensor] = []
        passed_on = layer.forward
        del layer.forward
        for i, row in enumerate(windows):
            leaf = None if states is None else states[i].requires_grad_()
            with torch.enable_grad(), _probing(linears) as probes:
                _, result = self._pass(layer, row[None], leaf)
                hidden = result[0] if isinstance(result, tuple) else result
                variables = [probe for _, _, probe in probes]
                if leaf is not None:
                    variables.append(leaf)
                grads: tuple[Any, ...] = ()
                if variables:  # the first layer may have nothing to price
                    grads = torch.autograd.grad(hidden, variables, upstream[str(i)], allow_unused=True)
            for (stored, x, _), g in zip(probes, grads[: len(probes)], strict=True):
                if g is not None:
                    observed[stored].append((x.flatten(0, -2), g.flatten(0, -2)))
            if leaf is not None:
                gradients.append(grads[-1])
        layer.forward = passed_on
        spread([partial(self._price, s, linears[s], observed[s], prices[s]) for s in linears])
        self._unload(parameters)
        tokens = windows.size
        return {s: _finite(p / tokens, s) for s, p in prices.items() if observed[s]}, gradients

    def _price(
        self,
        stored: str,
        linear: torch.nn.Linear,
        seen: Sequence[tuple[torch.Tensor, torch.Tensor]],
        prices: Array,
    ) -> None:
        """Set `prices` to the sum over tokens of (g D x)^2 / 2 for every scheme."""
        import torch

        weights = linear.weight.numpy()
        with torch.no_grad():
            squares = sum((x.square().sum(0) for x, _ in seen), torch.zeros(weights.shape[1])).numpy()
            for i, scheme in enumerate(self._schemes[stored]):
                change = torch.from_numpy(self._rounded(weights, scheme, stored, squares) - weights)
                for x, g in seen:
                    prices[i] += float((g * (x @ change.T)).sum(-1).square().sum()) / 2

    def _rounded(self, weights: Array, scheme: WeightScheme, name: str, squares: Array) -> Array:
        """Return what `scheme` stores of a matrix whose input features have these sums of squares."""
        important = weigh_features(_finite(squares, name)) if scheme.method.needs_calibration else None
        return dequantize_blocks(quantize_blocks(weights, scheme, self._scale_type, name, important))


def _add_squares(total: torch.Tensor, _: Any, args: tuple[torch.Tensor, ...]) -> None:
    total += args[0].flatten(0, -2).square().sum(0)


def _finite(prices: Array, name: str) -> Array:
    if not np.isfinite(prices).all():
        raise CheckpointError(
            f"the cost of rounding {name} on the calibration text is not finite",
            hint="the checkpoint is damaged, or needs a target without allocation",
        )
    return prices


@contextmanager
def _probing(
    linears: Mapping[str, torch.nn.Linear],
) -> Iterator[list[tuple[str, torch.Tensor, torch.Tensor]]]:
    """Add a zero to each product within this context; its gradient is the product's gradient.

    It yields the weight's name, the input of its layer and that zero, for each call of a layer.
    """
    import torch

    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def probe(stored: str, _: Any, args: tuple[torch.Tensor, ...], result: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros_like(result, requires_grad=True)
        seen.append((stored, args[0].detach(), zero))
        return result + zero

    handles = [linear.register_forward_hook(partial(probe, stored)) for stored, linear in linears.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
