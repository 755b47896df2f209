"""Hook into transformers' public interfaces while a model's own code runs.

Attention goes through `AttentionInterface`, masks through `AttentionMaskInterface`, keys and values through a
`Cache`, and mixture-of-experts products through `ExpertsInterface`. Registering one hook for each turns every
layer's attention into a single `llmc::CachedAttention` node, without decomposition and without code for any
architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmc.errors import UnsupportedError
from llmc.graph import dialect
from llmc.graph.domains import DIALECT, VERSION
from llmc.trace.experts import trace_experts
from llmc.trace.mask import MaskRule, Visible

if TYPE_CHECKING:
    import torch

#: The name of llmc's hooks in transformers' registries.
NAME = "llmc"
#: transformers' name for torch's scaled dot product attention.
SDPA = "sdpa"
#: transformers' name for attention in plain operators.
EAGER = "eager"

#: Keyword arguments of the attention interface that do not change its result in evaluation.
_NEUTRAL = {
    "position_ids", "cache_position", "use_cache", "dropout", "output_attentions", "output_hidden_states",
    "is_causal", "layer_idx", "cache", "return_dict", "output_router_logits", "num_items_in_batch",
}  # fmt: skip


#: What to say where a layer keeps a state that cannot be compiled.
STATES_HINT = (
    "a state can be compiled if one of transformers' kernels computes it, or if a tensor of fixed size holds "
    "it in the cache or in a module of the layer, and begins with zeros"
)


class UnknownStateError(UnsupportedError):
    """A layer keeps a state by code of its own."""


@dataclass(frozen=True)
class CapturedAttention:
    """The arguments of one layer's call to the attention interface.

    `owner` is the layer whose cache slot is used: the layer itself, or an earlier one with which it shares
    keys and values. `rule` decides which keys are visible; without a rule, `visible` does.
    """

    layer: int
    owner: int
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    visible: Visible
    rule: MaskRule | None


@dataclass(frozen=True)
class StoredKeys:
    """The keys and values that one layer stores in the cache while it computes attention itself."""

    kv_heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True)
class StateKey:
    """The place of a state: its layer, and its number among the layer's states of the same kind."""

    layer: int
    index: int


@dataclass
class Capture:
    """The record of one run of a model.

    Args:
        convolved: Inputs of convolutions that the model stored in the cache, with their states, until a
            convolution takes them.
        convolutions: States of captured convolutions.
        recurrent: States that captured recurrences returned, by the number of their nodes.
        joined: Tensors that join such states along their heads, with the numbers of the nodes.
        dense_experts: Reasons why experts are dense products.
        sizes: Numbers of rows and of new tokens, of each input of the step.
        stepped: Layers whose state is computed token by token.
        states: The recurrences that compute each stored state, by the numbers of their nodes: one for each
            part of the state's heads.
    """

    attentions: dict[int, CapturedAttention] = field(default_factory=dict)
    updates: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    stored: dict[int, StoredKeys] = field(default_factory=dict)
    indexed: set[int] = field(default_factory=set)
    masks: list[MaskRule] = field(default_factory=list)
    last_update: int | None = None
    dense_experts: dict[str, None] = field(default_factory=dict)
    convolved: list[tuple[Any, StateKey]] = field(default_factory=list)
    convolutions: set[StateKey] = field(default_factory=set)
    recurrent: list[Any] = field(default_factory=list)
    sizes: tuple[tuple[Any, Any], ...] = ()
    stepped: set[int] = field(default_factory=set)
    joined: list[tuple[Any, tuple[int, ...]]] = field(default_factory=list)
    states: dict[tuple[int, ...], StateKey] = field(default_factory=dict)

    def recurrences_of(self, state: torch.Tensor) -> tuple[int, ...] | None:
        """Return the numbers of the recurrences that computed `state`; None if none did."""
        number = next((n for n, made in enumerate(self.recurrent) if made is state), None)
        if number is not None:
            return (number,)
        return next((numbers for made, numbers in self.joined if made is state), None)

    def take_convolved(self, x: torch.Tensor) -> StateKey | None:
        """Return the state whose new inputs are `x`, once; None if the model stored no such inputs."""
        for n, (stored, key) in enumerate(self.convolved):
            if stored is x:
                del self.convolved[n]
                if key in self.convolutions:
                    raise UnsupportedError(f"layer {key.layer} keeps two convolutions' inputs in one state")
                self.convolutions.add(key)
                return key
        return None

    def layer_of_call(self, module: torch.nn.Module, key: torch.Tensor) -> tuple[int, int]:
        """Return (layer, owner of the cache slot) of an attention call."""
        own = getattr(module, "layer_idx", None)
        owner = next((i for i, (k, _) in self.updates.items() if k is key), None)
        if own is None or int(own) < 0:  # a module that several layers share has no index of its own
            own = owner if owner is not None else self.last_update
        if own is None:
            raise UnsupportedError(
                f"attention of {type(module).__name__} does not use the KV cache",
                hint="only decoder self-attention that stores its keys and values can be compiled",
            )
        own = int(own)
        if owner is None:
            if own not in self.updates:
                raise UnsupportedError(
                    f"attention of layer {own} ({type(module).__name__}) neither stores its keys and values "
                    "nor shares the keys and values of an earlier layer"
                )
            owner = own
        elif own in self.updates:  # a module that runs several times a step has a slot for each of its runs
            own = owner
        return own, owner


_current: ContextVar[Capture | None] = ContextVar("llmc_capture", default=None)


@contextmanager
def capturing() -> Iterator[Capture]:
    """Record every attention of a model built with `NAME` within this context."""
    capture = Capture()
    token = _current.set(capture)
    try:
        yield capture
    finally:
        _current.reset(token)


def active_capture() -> Capture:
    """Return the record of the trace that runs.

    Raises:
        UnsupportedError: None does.
    """
    capture = _current.get()
    if capture is None:
        raise UnsupportedError("a model prepared for tracing was called outside of a trace")
    return capture


def register_interfaces() -> None:
    """Register the hooks with transformers under `NAME`; may be called repeatedly."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    ExpertsInterface.register(NAME, _experts)


@contextmanager
def recording_masks() -> Iterator[None]:
    """Record the rules of masks that transformers makes for attention in plain operators."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as TABLE

    original = TABLE[EAGER]

    def record(*args: Any, **kwargs: Any) -> Any:
        _record_rule(kwargs)
        return original(*args, **kwargs)

    TABLE[EAGER] = record
    try:
        yield
    finally:
        TABLE[EAGER] = original


@contextmanager
def padding_blocks() -> Iterator[None]:
    """Let transformers pad the blocks of a mask in every step, instead of asking whether there is a past.

    Blocks are the tokens of an image, which see each other; padding by nothing changes nothing.
    """
    import torch
    from transformers import masking_utils

    original = masking_utils.maybe_pad_block_sequence_ids

    def pad(blocks: torch.Tensor, _: Any, kv_length: Any, kv_offset: Any) -> torch.Tensor:
        return torch.nn.functional.pad(blocks, (0, kv_length + kv_offset - blocks.shape[-1]), value=-1)

    masking_utils.maybe_pad_block_sequence_ids = pad  # type: ignore[assignment]
    try:
        yield
    finally:
        masking_utils.maybe_pad_block_sequence_ids = original


@contextmanager
def intercepting_sdpa() -> Iterator[None]:
    """Capture attention in models that call torch's scaled dot product attention themselves.

    Within this context, transformers' `sdpa` implementation is replaced by the hooks as well.
    """
    import torch
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    tables = ((ALL_ATTENTION_FUNCTIONS, _attention), (ALL_MASK_ATTENTION_FUNCTIONS, _mask))
    functional = torch.nn.functional
    original = functional.scaled_dot_product_attention
    originals = [(table, table[SDPA]) for table, _ in tables]
    for table, hook in tables:
        table[SDPA] = hook
    functional.scaled_dot_product_attention = _scaled_dot_product
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
        for table, hook in originals:
            table[SDPA] = hook


def _scaled_dot_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Replace torch's `scaled_dot_product_attention`; output (batch, heads, sequence, width)."""
    import torch

    output, _ = _attention(torch.nn.Identity(), query, key, value, attn_mask, scaling=scale)
    return output.transpose(1, 2)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Emit the attention of one step as one node; shapes as in `llmc.graph.dialect`."""
    import torch

    capture = active_capture()
    layer, owner = capture.layer_of_call(module, key)
    where = f"attention of layer {layer} ({type(module).__name__})"
    if attention_mask is not None and not isinstance(attention_mask, MaskRule):
        raise UnsupportedError(f"{where} builds its own mask instead of asking transformers' mask interface")
    open_ended = rest.get("is_causal") is False or getattr(module, "is_causal", True) is False
    if attention_mask is None and open_ended:  # a rule itself says what is visible
        raise UnsupportedError(f"{where} is not causal", hint="only decoder-only models can be compiled")
    strange = [k for k, v in rest.items() if k not in _NEUTRAL and isinstance(v, torch.Tensor)]
    if strange:
        raise UnsupportedError(f"{where} depends on {', '.join(sorted(strange))}, which was not captured")
    if layer in capture.attentions:
        raise UnsupportedError(f"{where} runs twice in one step; one cache slot cannot hold both")
    batch, heads, sequence, key_width = query.shape
    kv_heads, value_width = key.shape[1], value.shape[-1]
    visible = Visible(window=int(sliding_window or 0))
    capture.attentions[layer] = CapturedAttention(
        layer, owner, int(heads), int(kv_heads), int(key_width), int(value_width), visible, attention_mask
    )
    inputs: tuple[torch.Tensor, ...] = (query, key, value)
    if s_aux is not None:
        inputs = (*inputs, s_aux)
    output = torch.onnx.ops.symbolic(
        f"{DIALECT}::{dialect.CACHED_ATTENTION}",
        inputs,
        attrs={
            "layer": layer,
            "owner": owner,
            "num_heads": int(heads),
            "kv_num_heads": int(kv_heads),
            "scale": float(scaling if scaling is not None else key_width**-0.5),
            "softcap": float(softcap or 0.0),
        },
        dtype=value.dtype,
        shape=(batch, sequence, heads, value_width),
        version=VERSION,
    )
    return output, None


def _mask(*_: Any, **kwargs: Any) -> MaskRule:
    """Return the mask's rule instead of a mask, since `CachedAttention` makes its own mask.

    A multimodal model prepares the masks of its language model, which then asks for masks once more.
    """
    prepared = kwargs.get("attention_mask")
    if isinstance(prepared, MaskRule):
        return prepared
    return _record_rule(kwargs)


def _record_rule(kwargs: Mapping[str, Any]) -> MaskRule:
    rule = MaskRule(kwargs["mask_function"], int(kwargs.get("local_size") or 0))
    active_capture().masks.append(rule)
    return rule


def _experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Trace a layer of experts, (tokens, hidden); see `llmc.trace.experts`."""
    output, reason = trace_experts(self, hidden_states, top_k_index, top_k_weights)
    if reason is not None:
        active_capture().dense_experts[reason] = None
    return output
