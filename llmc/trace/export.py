"""Export a model's own code as plain ONNX with dialect operators and layer markers, without weights."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmc.errors import LlmcError, UnsupportedError
from llmc.graph.recurrence import Token
from llmc.graph.switches import rope_switches
from llmc.trace.cache import tracing_cache_class
from llmc.trace.capture import (
    STATES_HINT,
    Capture,
    UnknownStateError,
    capturing,
    intercepting_sdpa,
    padding_blocks,
    recording_masks,
)
from llmc.trace.every_size import export_all_sizes
from llmc.trace.expert_loops import unroll_expert_loops
from llmc.trace.failure import check_cache_class, check_splits, explain_failure, root_cause, watch_states
from llmc.trace.kernels import intercepting_kernels, joined_states
from llmc.trace.pairs import check_real, pairs_for_complex
from llmc.trace.places import Mixer
from llmc.trace.positions import first_position, stated_positions
from llmc.trace.recurrences import name_recurrences
from llmc.trace.row_splits import splitting_by_computed_sizes
from llmc.trace.sizes import symbolic_bounds
from llmc.trace.skeleton import build_fake_model, parameter_aliases
from llmc.trace.stamp import (
    NO_LAYERS,
    LayerStack,
    NotStampableError,
    check_indices,
    find_layers,
    fold_runs,
    mark_layers,
)
from llmc.trace.steps import stepping
from llmc.trace.switches import hold_frequencies, restart_length
from llmc.trace.tokens import attach_tokens
from llmc.trace.translate import translate

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    import torch

#: Example sizes for tracing: all different, and none of them 0 or 1, which torch specialises.
_BATCH, _SEQUENCE, _PAST = 2, 3, 5
#: Name of a model's argument for its cache.
_CACHE_ARGUMENT = "cache"
_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass
class Exported:
    """The raw result of one trace.

    Args:
        model: ONNX model whose weights are initializers without usable data.
        weights: Names of the initializers that a checkpoint stores: parameters and persistent buffers. Other
            buffers have real data.
        stack: The decoder layers, whose stubs are not yet expanded.
        layer_buffers: Buffers of every layer, by qualified name, as arrays.
        held: Largest length up to which the model's rotary frequencies, fixed in the trace, are constant;
            None if they do not depend on the length.
        restart: Length at which the model's `generate` drops the KV cache; None if it never does.
        tokens: The computation of one token in layers that keep a state by code of their own, by the number
            of the node `TokenStep`.
    """

    model: ir.Model
    weights: frozenset[str]
    stack: LayerStack
    capture: Capture
    aliases: dict[str, tuple[str, ...]]
    layer_buffers: dict[str, Any]
    held: int | None
    restart: int | None
    tokens: dict[int, Token]


def export_model(
    config: Any,
    dtype: torch.dtype,
    *,
    stamp: bool,
    captured: bool,
    mark: bool = True,
    mixers: Sequence[Mixer] = (),
) -> Exported:
    """Trace the causal LM of `config`.

    Args:
        config: A transformers configuration.
        dtype: Type of parameters and activations.
        stamp: Whether to trace only one layer of each kind.
        captured: Whether attention becomes one operator per layer; otherwise it is traced as the model
            computes it.
        mark: Whether to mark the nodes of every layer; otherwise the graph does not know its layers.
        mixers: Modules whose state is computed token by token.

    Raises:
        UnsupportedError: The model cannot be captured; the message gives the reason.
        RepeatedLayerError: With `mark`, if a layer runs several times in one step.
        NotStampableError: With `stamp`, if layers that look alike behave differently.
    """
    import torch

    with quiet():
        model = build_fake_model(config, dtype, captured=captured)
        if not mixers:
            check_cache_class(model)
        held = hold_frequencies(model)
        restart = restart_length(model, rope_switches(config))
        aliases = parameter_aliases(model)
        parameters = _stored_names(model)
        stack = find_layers(model, config.get_text_config(), stamp=stamp) if mark else NO_LAYERS
        layers = len(stack.names) or int(getattr(config.get_text_config(), "num_hidden_layers", 0))
        layer_buffers = _buffers_of(model, stack)
        unroll_expert_loops(model)
        mark_layers(model, stack)
        kept = watch_states(model)
        attention = intercepting_sdpa() if captured else recording_masks()
        hooks = (
            attention,
            padding_blocks(),
            intercepting_kernels(model),
            joined_states(),
            symbolic_bounds(model),
            torch.no_grad(),
        )
        with capturing() as capture, ExitStack() as stacked, stepping(model, mixers) as calls:
            for hook in hooks:
                stacked.enter_context(hook)
            try:
                program = _export(model, config, capture, layers, mixers, captured=captured)
            except (LlmcError, NotStampableError):
                raise
            except Exception as error:
                cause = root_cause(error)
                if isinstance(cause, (LlmcError, NotStampableError)):
                    raise cause from None
                raise explain_failure(model, cause, kept) from error
            check_indices()
            check_real(program)
            check_splits(model, program)
            name = type(model).__name__
            if captured:
                _check_capture(capture, name)
            else:
                _check_stored(capture, stack, name)
            _check_states(capture, name)
            fold_runs(program)
            onnx = translate(program, _INPUTS, ["logits"], (("batch", "sequence"), ("batch", "total")))
            name_recurrences(onnx.graph, capture)
            tokens = attach_tokens(onnx.graph, calls)
            check_indices(compared=True)
    return Exported(
        onnx, frozenset(parameters), stack, capture, aliases, layer_buffers, held, restart, tokens
    )


def _export(
    model: torch.nn.Module,
    config: Any,
    capture: Capture,
    layers: int,
    mixers: Sequence[Mixer],
    *,
    captured: bool,
) -> Any:
    import torch

    accepted = inspect.signature(model.forward).parameters
    if _CACHE_ARGUMENT not in accepted:
        raise UnsupportedError(
            f"{type(model).__name__} takes no cache",
            hint="only models that generate with a cache of transformers can be compiled",
        )
    own: Any = type(mixers[0].cache) if mixers else None
    cache_class = tracing_cache_class(own)
    first = first_position(model)

    class Step(torch.nn.Module):
        """One step with `sequence` new tokens after total - sequence cached ones."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
        ) -> torch.Tensor:
            capture.__init__()  # type: ignore[misc]
            sizes = attention_mask.shape[1], input_ids.shape[1]
            rows = (input_ids, position_ids, attention_mask)
            capture.sizes = tuple(
                (x.shape[0], n) for x in rows for n in (input_ids.shape[1], position_ids.shape[1])
            )
            arguments: dict[str, Any] = {
                _CACHE_ARGUMENT: cache_class(capture, *sizes, layers, whole=not captured),
                "use_cache": True,
            }
            if not captured:
                arguments["attention_mask"] = attention_mask
            if "position_ids" in accepted:
                arguments["position_ids"] = position_ids + first if first else position_ids
            with pairs_for_complex(), splitting_by_computed_sizes():
                return self.model(input_ids=input_ids, **arguments).logits  # type: ignore[no-any-return]

    total = _SEQUENCE + _PAST
    limit = stated_positions(config)
    # Code that slices a table of `limit` rows differs at exactly that length, so the trace ends before it.
    bound = limit - 1 if limit is not None and limit > 2 * total else None
    batch = torch.export.Dim("batch")
    sequence, all_positions = (torch.export.Dim(n, max=bound) for n in ("sequence", "total"))
    example = (
        torch.zeros(_BATCH, _SEQUENCE, dtype=torch.long),
        torch.ones(_BATCH, total, dtype=torch.long),
        torch.arange(_PAST, total)[None].repeat(_BATCH, 1),
    )
    shapes = ({0: batch, 1: sequence}, {0: batch, 1: all_positions}, {0: batch, 1: sequence})
    return export_all_sizes(Step(), example, shapes)


def _stored_names(model: torch.nn.Module) -> set[str]:
    """Return the names of parameters and of buffers that a checkpoint stores."""
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    stored = set(model.state_dict())  # a router's correction bias is a buffer whose values are trained
    return parameters | {n for n, b in model.named_buffers() if n in stored and b.is_floating_point()}


def _buffers_of(model: torch.nn.Module, stack: LayerStack) -> dict[str, np.ndarray]:
    """Return the values of every layer's buffers, by qualified name."""
    return {
        f"{name}.{key}": _values(buffer)
        for name in stack.names
        for key, buffer in model.get_submodule(name).named_buffers()
        if not buffer.is_meta
    }


def _values(buffer: torch.Tensor) -> np.ndarray:
    """Return the values of a buffer; NumPy has no bfloat16 of its own."""
    import ml_dtypes
    import torch

    if buffer.dtype == torch.bfloat16:
        return buffer.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    values: np.ndarray = buffer.detach().numpy()
    return values


def _check_capture(capture: Capture, name: str) -> None:
    """Check that every use of the cache was captured, and every mask rule is known; set what they hide."""
    if not (capture.attentions or capture.states or capture.convolutions or capture.stepped):
        raise UnsupportedError(
            f"{name}: no attention was captured",
            hint="its attention does not go through transformers' attention interface",
        )
    missed = sorted(set(capture.updates) - set(capture.attentions))
    if missed:
        raise UnsupportedError(
            f"{name}: layers {missed} store keys and values, but their attention was not captured",
            hint="their attention does not go through transformers' attention interface",
        )
    for layer, attention in capture.attentions.items():
        if attention.rule is not None:
            visible = attention.rule.visible(attention.visible.window)
            capture.attentions[layer] = replace(attention, visible=visible)
    unruled = [a for a in capture.attentions.values() if a.rule is None]
    ruled = {rule.visible() for rule in capture.masks} if unruled else set()
    for attention in unruled:
        if ruled and attention.visible not in ruled:
            raise UnsupportedError(
                f"{name}: attention of layer {attention.layer} was called with {attention.visible} and no "
                f"mask; the requested masks have {', '.join(sorted(map(str, ruled)))}"
            )


def _check_states(capture: Capture, name: str) -> None:
    """Check that every state that the model keeps belongs to a captured node."""
    if capture.convolved:
        layers = sorted({key.layer for _, key in capture.convolved})
        raise UnknownStateError(
            f"{name}: layers {layers} keep a convolution's inputs, but no known convolution takes them",
            hint=STATES_HINT,
        )
    if sum(map(len, capture.states)) < len(capture.recurrent):
        raise UnknownStateError(f"{name}: a recurrent layer does not store its state in the cache")


def _check_stored(capture: Capture, stack: LayerStack, name: str) -> None:
    """Check that every traced layer stored its keys and values, or a state, in the cache."""
    if not capture.stored:
        raise UnsupportedError(
            f"{name} does not store keys and values in the cache",
            hint="only models with a KV cache can be compiled",
        )
    traced = {n for i, n in enumerate(stack.indices) if stack.representatives[i] == i}
    kept = capture.stepped | {key.layer for key in (*capture.convolutions, *capture.states.values())}
    if silent := sorted(traced - set(capture.stored) - kept):
        raise UnsupportedError(f"{name}: layers {silent} do not store keys and values in the cache")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the tracers' output off the terminal: progress, advice, and traces of what llmc raises itself."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(level)
