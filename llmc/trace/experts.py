"""Trace mixtures of experts as one `llmc::Experts` node per layer while a model's own code runs.

transformers calls the experts of a layer through `ExpertsInterface` with the router's choice, and gives
their modules their own gate function (`_apply_gate`). The gate is identified by calling it with numbers: if
it is a SwiGLU (Shazeer 2020) with some slope, offset and limit, the layer becomes one node. Experts without
a gate whose activation is a squared ReLU (So et al. 2021) are a SwiGLU of a steep slope, whose gate and up
have the same matrix. Any other function is traced as dense products over all experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llmc.graph import dialect
from llmc.graph.domains import DIALECT, VERSION

if TYPE_CHECKING:
    import torch

#: Attribute of an experts module that holds its identified gate.
_GATE = "llmc_gate"
#: Bound above all limits that models use.
_UNLIMITED = 1e4
_TOLERANCE = 1e-6
#: Slope at which x sigmoid(slope x) x differs from the squared ReLU by less than 1e-8; a number of float16.
_STEEP = 16384.0


@dataclass(frozen=True)
class SwiGlu:
    """The function min(g, limit) sigmoid(alpha min(g, limit)) (clip(u, limit) + beta) of gate g and up u.

    Args:
        alpha: Slope of the sigmoid.
        beta: Offset on up.
        limit: Bound of both operands; 0 for no bound.
        interleaved: Whether gate and up alternate; otherwise the whole gate comes first.
    """

    alpha: float
    beta: float
    limit: float
    interleaved: bool

    def __call__(self, both: torch.Tensor) -> torch.Tensor:
        """Apply the function, (…, 2 width) -> (…, width)."""
        import torch

        gate, up = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, dim=-1)
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)


def read_gates(model: torch.nn.Module) -> None:
    """Store at every experts module of `model` the function of its gate; see `read_gate`."""
    for module in model.modules():
        apply: Callable[[torch.Tensor], torch.Tensor] | None = getattr(module, "_apply_gate", None)
        if apply is not None and getattr(module, "has_gate", False):
            width = module.get_parameter("gate_up_proj").shape[2 if module.is_transposed else 1]
            setattr(module, _GATE, read_gate(apply, width))
        elif apply is not None and is_squared_relu(module.act_fn):
            setattr(module, _GATE, SwiGlu(_STEEP, 0.0, 0.0, interleaved=False))


def is_squared_relu(activation: Any) -> bool:
    """Identify the function max(x, 0) squared by calling it with numbers."""
    import torch

    probe = torch.linspace(-20, 20, 401, dtype=torch.float64)
    expected = torch.relu(probe).square()
    return isinstance(found := activation(probe), torch.Tensor) and torch.allclose(found, expected)


def read_gate(apply: Callable[[torch.Tensor], torch.Tensor], width: int) -> SwiGlu | None:
    """Identify the SwiGLU that `apply` (n, width) -> (n, width / 2) computes; None for another function."""
    import torch

    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(64, width, generator=generator, dtype=torch.float64)
    probe *= torch.logspace(-1, 2, 64, dtype=torch.float64)[:, None]
    expected = apply(probe)
    for gate in (_fit(apply, width, interleaved) for interleaved in (False, True)):
        if gate is not None and torch.allclose(gate(probe), expected, rtol=_TOLERANCE, atol=_TOLERANCE):
            return gate
    return None


def _fit(apply: Callable[[torch.Tensor], torch.Tensor], width: int, interleaved: bool) -> SwiGlu | None:
    """Fit the only SwiGLU of a layout that agrees with `apply` where gate is 1 and up is 0, 1/2 and huge."""
    import torch

    inputs = torch.zeros(3, width, dtype=torch.float64)
    inputs[:, 0] = 1
    inputs[:, 1 if interleaved else width // 2] = torch.tensor([0, 0.5, _UNLIMITED], dtype=torch.float64)
    at_zero, at_half, at_limit = (float(v) for v in apply(inputs)[:, 0])
    slope = 2 * (at_half - at_zero)
    if not _TOLERANCE < slope < 1 - _TOLERANCE:
        return None
    offset = at_zero / slope
    limit = at_limit / slope - offset
    alpha, beta, limit = (float(f"{v:.6g}") for v in (math.log(slope / (1 - slope)), offset, limit))
    return SwiGlu(alpha, beta, 0.0 if limit >= _UNLIMITED else limit, interleaved)


def trace_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> tuple[torch.Tensor, str | None]:
    """Trace one layer of experts.

    Args:
        self: The experts module: stacked weights (experts, …) and its own gate function.
        hidden_states: (tokens, hidden).
        top_k_index: Chosen experts, (tokens, k).
        top_k_weights: Weights of the chosen experts, (tokens, k).

    Returns:
        The output (tokens, hidden), and the reason if it is not an `Experts` node.
    """
    import torch

    gate: SwiGlu | None = getattr(self, _GATE, None)
    if gate is None:
        what = "gate is not a SwiGLU" if self.has_gate else "activation is not a squared ReLU"
        return _dense(self, hidden_states, top_k_index, top_k_weights), f"their {what}"
    if self.has_post_expert_norm:
        return _dense(self, hidden_states, top_k_index, top_k_weights), "each expert has its own norm"
    first = "gate_up_proj" if self.has_gate else "up_proj"
    weights = [getattr(self, first), self.down_proj]
    if self.is_transposed:
        weights = [weight.transpose(1, 2) for weight in weights]
    if self.has_bias:
        weights += [getattr(self, f"{first}_bias"), self.down_proj_bias]
    if not self.has_gate:  # the matrix, and its bias, are gate and up
        weights[::2] = [torch.cat([weight, weight], dim=1) for weight in weights[::2]]
    output: torch.Tensor = torch.onnx.ops.symbolic(
        f"{DIALECT}::{dialect.EXPERTS}",
        (hidden_states, top_k_index, top_k_weights, *weights),
        attrs={**asdict(gate), "interleaved": int(gate.interleaved)},
        dtype=hidden_states.dtype,
        shape=hidden_states.shape,
        version=VERSION,
    )
    return output, None


def _dense(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute dense products over all experts, weighted by the router."""
    import torch

    def project(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(self, name)
        if not self.is_transposed:
            weight = weight.transpose(1, 2)
        out = torch.matmul(x, weight)
        if self.has_bias:
            out = out + getattr(self, f"{name}_bias").unsqueeze(1)
        return out

    inner = project(hidden_states.unsqueeze(0), "gate_up_proj" if self.has_gate else "up_proj")
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    outer = project(inner, "down_proj")
    if self.has_post_expert_norm:
        outer = self.post_expert_norm(outer)
    experts = torch.arange(outer.shape[0], device=top_k_index.device)
    chosen = (top_k_index.unsqueeze(-1) == experts).to(top_k_weights.dtype)
    weights = (chosen * top_k_weights.unsqueeze(-1)).sum(dim=1)
    mixed = (outer * weights.transpose(0, 1).unsqueeze(-1)).sum(dim=0)
    return mixed.to(hidden_states.dtype)
