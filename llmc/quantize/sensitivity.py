"""What rounding each matrix costs the model's answers, in KL divergence, one layer in memory at a time.

To second order a small change d of a linear layer's results costs half of E[(g d)^2] in KL divergence, with
g the gradient of the log-likelihood of a token drawn from the model's own answer (the Fisher information).
So one walk down the layers on calibration text, and one walk back with gradients, price every scheme of
every matrix: with x what a product by W is given, and W + D what a scheme stores, the price is the sum over
tokens of (g D x)^2 / 2. Matrices behind the last layer, such as the head, are priced by the KL divergence
itself.

Schemes that are calibrated are priced with their searched scales alone, since calibration takes about the
same part off all of them; what is predicted is more than what is found.
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
    """A walk for the hidden states alone."""

    changes = False

    def watch(self, name: str, module: torch.nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def conclude(self, name: str, module: torch.nn.Module) -> Mapping[str, Array]:
        return {}


class SensitivityWalk(LayerWalk):
    """Prices schemes for the linear layers of one model, and goes on where it was killed.

    Args:
        model, layers, store, tied, folder: As for `LayerWalk`.
        schemes: The schemes to be priced, by the stored name of each weight.
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
        """Nats per token that each scheme costs, by stored name; weights of no linear layer are left out.

        Args:
            windows: (windows, length) int64 token ids.
            note: Told what was taken up again.

        Raises:
            ConfigError: Fewer than LEAST_TOKENS tokens.
            CheckpointError: A gradient is not finite.
            UnsupportedError: The model does not run like this.
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
            self._load_outside()  # again: what inference mode made takes part in no gradient
        if behind == count + 1:
            with torch.no_grad():
                prices = self._price_head(windows)
            gradients = self._go_back_from_head(windows)
            self._finish(count, prices, gradients)
            behind = count
        for index in range(behind - 1, -1, -1):
            prices, gradients = self._go_back(index, windows)
            self._finish(index, prices, gradients)
        found: dict[str, Array] = {}
        for index in range(count + 1):
            self._state_file(index).unlink(missing_ok=True)
            found.update(load_file(self._file(f"prices-{index}")))
        return found

    def _finish(self, index: int, prices: Mapping[str, Array], gradients: Sequence[torch.Tensor]) -> None:
        """Keep gradients of what goes into part `index`, then its prices: who finds these finds those."""
        from safetensors.torch import save_file

        if gradients:
            data = {str(i): gradient for i, gradient in enumerate(gradients)}
            self._write(self._file(f"gradients-{index}"), lambda path: save_file(data, path))
        self._keep(f"prices-{index}", prices)
        self._file(f"gradients-{index + 1}").unlink(missing_ok=True)

    def _price_head(self, windows: Array) -> dict[str, Array]:
        """KL divergence for every scheme of each matrix behind the last layer."""
        import torch

        states = self._load_states(len(self.layers))
        inside = tuple(f"{name}." for name in self._names)
        found = {}
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
            found[stored] = _finite(np.array(prices), stored)
        return found

    def _go_back_from_head(self, windows: Array) -> list[torch.Tensor]:
        """Gradients of the log-likelihood of one drawn token a position, by what the last layer gives."""
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
        """(length, vocabulary) float32."""
        with replacing_input(self.layers[-1], state):
            result: torch.Tensor = self._call(row).logits[0].float()
        return result

    def _go_back(self, index: int, windows: Array) -> tuple[dict[str, Array], list[torch.Tensor]]:
        """Prices of one layer, and the gradients of what it is given; none for the first layer."""
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
        seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {stored: [] for stored in linears}
        gradients: list[torch.Tensor] = []
        passed_on = layer.forward
        del layer.forward
        for i, row in enumerate(windows):
            leaf = None if states is None else states[i].requires_grad_()
            with torch.enable_grad(), _probing(linears) as probes:
                _, result = self._pass(layer, row, leaf)
                hidden = result[0] if isinstance(result, tuple) else result
                wanted = [probe for _, _, probe in probes]
                if leaf is not None:
                    wanted.append(leaf)
                found: tuple[Any, ...] = ()
                if wanted:  # the first layer may have nothing to price
                    found = torch.autograd.grad(hidden, wanted, upstream[str(i)], allow_unused=True)
            for (stored, x, _), g in zip(probes, found[: len(probes)], strict=True):
                if g is not None:
                    seen[stored].append((x.flatten(0, -2), g.flatten(0, -2)))
            if leaf is not None:
                gradients.append(found[-1])
        layer.forward = passed_on
        spread([partial(self._price, s, linears[s], seen[s], prices[s]) for s in linears])
        self._unload(parameters)
        tokens = windows.size
        return {s: _finite(p / tokens, s) for s, p in prices.items() if seen[s]}, gradients

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
        """What `scheme` stores of a matrix whose input features have these sums of squares."""
        important = weigh_features(_finite(squares, name)) if scheme.method.needs_calibration else None
        return dequantize_blocks(quantize_blocks(weights, scheme, self._scale_type, name, important))


def _add_squares(total: torch.Tensor, _: Any, args: tuple[torch.Tensor, ...]) -> None:
    total += args[0].flatten(0, -2).square().sum(0)


def _finite(prices: Array, name: str) -> Array:
    if not np.isfinite(prices).all():
        raise CheckpointError(
            f"what rounding {name} costs on the calibration text is not finite",
            hint="the checkpoint is damaged, or needs a target without allocation",
        )
    return prices


@contextmanager
def _probing(
    linears: Mapping[str, torch.nn.Linear],
) -> Iterator[list[tuple[str, torch.Tensor, torch.Tensor]]]:
    """Within this context each product gets a zero added whose gradient is that of the product.

    Gives the weight's name, what its layer was given and that zero, for each call of a layer.
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
