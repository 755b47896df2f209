"""Trace convolutions and recurrences that keep a state as one node each, whatever the model.

transformers wraps every kernel of such a layer by `use_kernel_func_from_hub_with_fallback(name, package)`: a
function of the kernel's own arguments (of the packages causal-conv1d, mamba-ssm and flash-linear-attention)
with a fallback in torch. While a model is traced, these functions are replaced by name in the modules that
define the model's classes; nothing depends on the model. Each replacement emits a node `CausalConv` or
`LinearAttention`, and the model's calls to the cache say which layer's state it has (`llmc.trace.cache`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llmc.errors import UnsupportedError
from llmc.graph.domains import TRACE
from llmc.graph.states import CAUSAL_CONV, LINEAR_ATTENTION
from llmc.trace.capture import active_capture
from llmc.trace.sizes import modules_of

if TYPE_CHECKING:
    import torch

_SILU = ("silu", "swish")
#: Parameters that say how a kernel computes, not what.
_NEUTRAL = {"chunk_size", "output_final_state", "use_mambapy", "use_associative_scan"}
#: Functions that join states: behind the batch, states have their heads.
_JOINING = ("stack", "cat", "concat", "concatenate")
#: Added by the packages to a squared length before they divide by its root.
_L2_EPSILON = 1e-6


@contextmanager
def intercepting_kernels(model: torch.nn.Module) -> Iterator[None]:
    """Replace the kernels that `model` calls within this context, by the kernels' names."""
    replaced: list[tuple[Any, str, Any]] = []
    for module in modules_of(model):
        for key, function in list(vars(module).items()):
            hook = _HOOKS.get(kernel_name(function) or "")
            if hook is not None:
                replaced.append((module, key, function))
                setattr(module, key, _checked(hook, function))
    try:
        yield
    finally:
        for module, key, function in replaced:
            setattr(module, key, function)


def joined_states() -> Any:
    """Return a context in which the states of recurrences may be joined along their heads.

    A layer whose heads each have a recurrence of their own stores their states as one.
    """
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, _: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            made = function(*args, **(kwargs or {}))
            if getattr(function, "__name__", "") in _JOINING and args and isinstance(args[0], (list, tuple)):
                dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
                capture = active_capture()
                parts = [capture.recurrences_of(part) for part in args[0]]
                numbers = [number for part in parts if part is not None for number in part]
                if dim == 1 and None not in parts:
                    capture.joined.append((made, tuple(numbers)))
            return made

    return Mode()


def _checked(hook: Callable[..., Any], function: Any) -> Callable[..., Any]:
    """Return `hook`, which refuses what `function` has as a keyword and the hook does not know."""
    known = set(inspect.signature(hook).parameters)
    theirs = inspect.signature(function).parameters

    def run(*args: Any, **kwargs: Any) -> Any:
        strange = {k: v for k, v in kwargs.items() if k in theirs and k not in known and k not in _NEUTRAL}
        if given := sorted(k for k, v in strange.items() if v is not None and v is not False):
            raise UnsupportedError(
                f"kernel {kernel_name(function)} is called with {', '.join(given)}, which llmc does not know"
            )
        return hook(*args, **{k: v for k, v in kwargs.items() if k not in strange})

    return run


def kernel_name(function: Any) -> str | None:
    """Return the name of the kernel that transformers wraps in `function`, or the function's own name.

    The name is in the closure of the wrapper, which itself may be wrapped; None for anything but a function.
    """
    while inspect.isfunction(function):
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if "func_name" in cells and "torch_function" in cells:
            return str(cells["func_name"].cell_contents)
        inner = getattr(function, "__wrapped__", None)
        if inner is None:
            return function.__name__
        function = inner
    return None


def _causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> torch.Tensor:
    """Convolve x (batch, channels, sequence) with weight (channels, taps), as `causal_conv1d_fn` does."""
    import torch

    state = active_capture().take_convolved(x)
    if state is None:
        raise UnsupportedError(
            "a causal convolution keeps no state in the cache",
            hint="its layer does not store its inputs by transformers' `update_conv_state`",
        )
    batch, channels, sequence = x.shape
    taps = int(weight.shape[-1])
    inputs = [x.to(weight.dtype), weight.unsqueeze(1)]
    y, _present = torch.onnx.ops.symbolic_multi_out(
        f"{TRACE}::{CAUSAL_CONV}",
        inputs if bias is None else [*inputs, bias],
        attrs={"layer": state.layer, "index": state.index, "silu": int(activation in _SILU)},
        dtypes=(weight.dtype, weight.dtype),
        shapes=((batch, channels, sequence), (batch, channels, taps - 1)),
        version=1,
    )
    if activation is not None and activation not in _SILU:
        from transformers.activations import ACT2FN

        y = ACT2FN[activation](y)
    return y.to(x.dtype)


def _gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *_: Any,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    **__: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the gated delta rule; see `_linear_attention` for shapes."""
    dtype = query.dtype
    query, key = query.float(), key.float()
    if use_qk_l2norm_in_kernel:
        query, key = _normalized(query), _normalized(key)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output, state = _linear_attention(query, key, value, g, beta, scale, initial_state)
    return output.to(dtype), state


def _chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,  # noqa: N803
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    chunk_size: int | None = None,
    D: torch.Tensor | None = None,  # noqa: N803
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    *_: Any,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **__: Any,
) -> Any:
    """Compute the state space of Mamba 2.

    Shapes: x (batch, sequence, heads, width), dt (batch, sequence, heads), A and D (heads,), B and C (batch,
    sequence, groups, states).
    """
    import torch

    del chunk_size
    dt = _step_sizes(dt, dt_bias, dt_softplus)
    low, high = (float(limit) for limit in dt_limit)
    if low > 0 or high < float("inf"):
        dt = dt.clamp(low, high) if high < float("inf") else dt.clamp(min=low)
    dt, wide = dt.float(), x.float()
    output, state = _linear_attention(
        C.float(), B.float(), wide * dt[..., None], A.float() * dt, None, 1.0, initial_states
    )
    if D is not None:
        output = output + wide * (D[..., None] if D.ndim == 1 else D)
    if z is not None:
        output = output * torch.nn.functional.silu(z)
    output = output.to(x.dtype)
    return (output, state) if return_final_states else output


def _selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,  # noqa: N803
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    D: torch.Tensor | None = None,  # noqa: N803
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    """Compute the state space of Mamba: a head with values of width 1 for each channel.

    Shapes: u, delta and z (batch, channels, sequence), A (channels, states), B and C (batch, states,
    sequence), D (channels,).
    """
    import torch

    if B.ndim != 3 or C.ndim != 3:
        raise UnsupportedError(f"selective_scan_fn with B of shape {tuple(B.shape)} is not known")
    dt = _step_sizes(delta.transpose(1, 2), delta_bias, delta_softplus).float()
    wide = u.transpose(1, 2).float()
    key, query = (m.transpose(1, 2).float()[:, :, None] for m in (B, C))
    output, state = _linear_attention(
        query, key, (dt * wide)[..., None], dt[..., None] * A.float(), None, 1.0, None
    )
    y = output[..., 0]
    if D is not None:
        y = y + wide * D
    y = y.transpose(1, 2)
    if z is not None:
        y = y * torch.nn.functional.silu(z)
    y = y.to(u.dtype)
    return (y, state) if return_last_state else y


def _step_sizes(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    """Return the step sizes of a state space, (…, heads), from what the model computes and its bias."""
    import torch

    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return torch.nn.functional.softplus(dt) if softplus else dt


def _linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor | None,
    scale: float,
    initial: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Emit the recurrence of one step as one node.

    Shapes: query and key (batch, sequence, key_heads, key_width), value (batch, sequence, heads,
    value_width), decay (batch, sequence, heads) or with a last dimension of key_width, beta (batch, sequence,
    heads) for the delta rule.

    Returns:
        The output (batch, sequence, heads, value_width), and the state after the step.
    """
    import torch

    if initial is not None:
        raise UnsupportedError("a recurrent kernel was given a state that is not the cache's")
    batch, sequence, heads, value_width = value.shape
    key_heads, key_width = int(key.shape[2]), int(key.shape[3])
    if query.shape[2] != key_heads:
        raise UnsupportedError(
            f"a recurrent kernel was called with {query.shape[2]} heads of queries and {key_heads} of keys"
        )
    capture = active_capture()
    parts = [query, key, value, decay, *([] if beta is None else [beta])]
    number = len(capture.recurrent)
    output, state = torch.onnx.ops.symbolic_multi_out(
        f"{TRACE}::{LINEAR_ATTENTION}",
        [part.float().reshape(batch, sequence, -1) for part in parts],
        attrs={
            "number": number,
            "heads": int(heads),
            "key_heads": key_heads,
            "scale": float(scale),
            "delta": int(beta is not None),
        },
        dtypes=(torch.float32, torch.float32),
        shapes=((batch, sequence, heads * value_width), (batch, heads, key_width, value_width)),
        version=1,
    )
    capture.recurrent.append(state)
    return output.reshape(batch, sequence, heads, value_width), state


def _normalized(x: torch.Tensor) -> torch.Tensor:
    import torch

    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + _L2_EPSILON)


_HOOKS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _causal_conv,
    "chunk_gated_delta_rule": _gated_delta_rule,
    "chunk_kda": _gated_delta_rule,
    "mamba_chunk_scan_combined": _chunk_scan,
    "selective_scan_fn": _selective_scan,
}
