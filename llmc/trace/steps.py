"""Trace modules that keep a state by code of their own: as one node each, with the graph of one token beside.

A module that `llmc.trace.mixers` found does not run while its model is traced: a node `TokenStep` takes its
arguments, parameters and buffers. Then its own code runs for one token, with its states as inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmc.graph.domains import TRACE
from llmc.trace.capture import active_capture
from llmc.trace.failure import explain_failure, root_cause
from llmc.trace.places import BATCH, SEQUENCE, Mixer, Output, holding_states, states_in

if TYPE_CHECKING:
    import torch

STEP = "TokenStep"
#: Rows while the graph of one token is traced.
_ROWS = 2
#: Any other size that depends on the step.
_OTHER = 7


@dataclass
class StepCall:
    """The call of a module that keeps a state, and how to run the module's own code.

    Args:
        forward: The module's own code.
        leaves: Its arguments, flat, and their structure.
        arguments: The tensors among them, each with its sizes: numbers, `BATCH`, `SEQUENCE` or another text.
        weights: Names of its parameters and buffers, relative to it.
        outputs: The tensors that it returns.
    """

    mixer: Mixer
    module: torch.nn.Module
    forward: Callable[..., Any]
    weights: tuple[str, ...]
    outputs: tuple[Output, ...]
    leaves: list[Any] = field(default_factory=list)
    spec: Any = None
    arguments: list[tuple[Any, tuple[int | str, ...]]] = field(default_factory=list)


@contextmanager
def stepping(model: torch.nn.Module, mixers: Sequence[Mixer]) -> Iterator[list[StepCall]]:
    """Emit a node instead of each of `mixers` within this context; yield their calls."""
    calls = []
    for number, mixer in enumerate(mixers):
        module = model.get_submodule(mixer.name)
        call = _prepare(mixer, module)
        calls.append(call)
        module.forward = _emitting(call, number)
    try:
        yield calls
    finally:
        for call in calls:
            call.module.forward = call.forward


def _prepare(mixer: Mixer, module: torch.nn.Module) -> StepCall:
    from torch.utils import _pytree as pytree

    weights = tuple(name for name, _ in _weights(module))
    outputs = tuple(x for x in pytree.tree_leaves(mixer.result) if isinstance(x, Output))
    return StepCall(mixer, module, module.forward, weights, outputs)


def _weights(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _emitting(call: StepCall, number: int) -> Callable[..., Any]:
    """Return a forward that emits `TokenStep` with the tensors among its arguments, and the weights."""
    import torch
    from torch.utils import _pytree as pytree

    def run(*args: Any, **kwargs: Any) -> Any:
        sizes = active_capture().sizes
        known = {str(rows): BATCH for rows, _ in sizes} | {str(tokens): SEQUENCE for _, tokens in sizes}
        call.leaves, call.spec = pytree.tree_flatten((args, kwargs))
        distinct = {id(x): x for x in call.leaves if isinstance(x, torch.Tensor)}
        call.arguments = [
            (x, tuple(n if isinstance(n, int) else known.get(str(n), str(n)) for n in x.shape))
            for x in distinct.values()
        ]
        own = [tensor for _, tensor in _weights(call.module)]
        symbols: dict[int | str, Any] = dict(zip((BATCH, SEQUENCE), sizes[0], strict=True))
        active_capture().stepped.add(call.mixer.layer)
        made = torch.onnx.ops.symbolic_multi_out(
            f"{TRACE}::{STEP}",
            [*distinct.values(), *own],
            attrs={"layer": call.mixer.layer, "number": number},
            dtypes=[output.dtype for output in call.outputs],
            shapes=[[symbols.get(n, n) for n in output.shape] for output in call.outputs],
            version=1,
        )
        tensors = iter(made)
        return pytree.tree_map(lambda x: next(tensors) if isinstance(x, Output) else x, call.mixer.result)

    return run


def export_token(call: StepCall) -> torch.export.ExportedProgram:
    """Trace the own code of a called module for one token of any number of rows.

    Its inputs are the tensors of the call and the states, its outputs those of the module and the states. A
    size of the step that is neither that of the rows nor of the tokens is a number, so nothing may depend on
    it.
    """
    import torch
    from torch.utils import _pytree as pytree
    from transformers import Cache

    mixer = call.mixer
    count = len(call.arguments)

    class Token(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = call.module

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = {id(x): t for (x, _), t in zip(call.arguments, tensors[:count], strict=True)}
            states = [state.clone() for state in tensors[count:]]
            with holding_states(mixer, call.module, states) as cache:
                leaves = [cache if isinstance(x, Cache) else given.get(id(x), x) for x in call.leaves]
                args, kwargs = pytree.tree_unflatten(leaves, call.spec)
                result = call.forward(*args, **kwargs)
                after = states_in(mixer, call.module, cache)
            made = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
            return (*made, *after)

    example, dynamic = [], []
    batch = torch.export.Dim("batch")
    for tensor, shape in call.arguments:
        sizes = [n if isinstance(n, int) else {BATCH: _ROWS, SEQUENCE: 1}.get(n, _OTHER) for n in shape]
        example.append(torch.zeros(sizes, dtype=tensor.dtype))
        dynamic.append({axis: batch for axis, n in enumerate(shape) if n == BATCH})
    for place in mixer.places:
        example.append(torch.zeros((_ROWS, *place.shape), dtype=place.dtype))
        dynamic.append({0: batch})
    try:
        return torch.export.export(Token(), tuple(example), dynamic_shapes=(tuple(dynamic),), strict=False)
    except Exception as error:  # transformers' model code raises any type of error
        raise explain_failure(call.module, root_cause(error), ()) from error
