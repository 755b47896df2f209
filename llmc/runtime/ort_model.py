"""Run an artifact with onnxruntime: prefill and decode over a KV cache, with the inputs of its interface."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.config import Provider
from llmc.errors import ConfigError
from llmc.graph.interface import Interface
from llmc.runtime.arithmetic import Arithmetic, compute_in
from llmc.runtime.choice import CHOICE, add_choice
from llmc.runtime.ort_session import open_session, read_genai_config
from llmc.runtime.recorded_step import RecordedStep
from llmc.runtime.signature import compare_signature, require_fed, require_shape

#: Maximum size in bytes of the states of fixed size that a session keeps to go back to.
_KEPT_BYTES = 256 << 20


@dataclass(frozen=True)
class CacheState:
    """A point of a sequence that can be restored.

    Args:
        mask: Attention mask so far, (batch, total) int64.
        cache: In growing mode, past keys and values in the interface's order. In shared mode, empty, since
            slots beyond `total` are overwritten by the next steps.
        tokens: The tokens so far, (batch, total) int64; used only if the graph has states of fixed size.
        states: Those states by the number of tokens after which they were kept, this point's included.
    """

    mask: Array
    cache: tuple[Any, ...]
    tokens: Array
    states: dict[int, tuple[Any, ...]]


class OrtModel:
    """An onnxruntime session with the KV cache of one batch.

    The cache stays in OrtValues on the session's device: in growing mode, each step's present tensors are
    the next step's past; in shared mode (`past_present_share_buffer` of onnxruntime-genai), one buffer of
    `capacity` slots is bound as both past and present, and the graph writes into it. States of fixed size
    are each step's outputs and the next one's inputs in both modes; some are kept, since a session cannot
    compute back from them.

    Args:
        folder: Directory with model.onnx.
        interface: Inputs and outputs of the graph.
        threads: Number of intra-op threads; None for onnxruntime's default.
        share_buffer: Whether to use shared mode; only graphs with GroupQueryAttention allow it.
        arithmetic: Arithmetic of the session; `interface` of the session changes accordingly.
        profile: Prefix of the file in which onnxruntime records the time of each kernel.
        provider: The execution provider; for CUDA, the first device that this process sees.
        cuda_graph: Whether steps of one token are launched as a CUDA graph; it needs shared mode.
        chooses: Whether the device chooses the tokens that `next_tokens` returns, so that no logits are
            copied.

    Raises:
        ConfigError: model.onnx is missing in `folder`, or a step cannot be a CUDA graph.
        ResourceError: onnxruntime is not installed, CUDA or its libraries are missing, or the device has not
            enough memory.
        ParityError: onnxruntime cannot load the graph, or its inputs and outputs differ from the interface.
    """

    def __init__(
        self,
        folder: Path,
        interface: Interface,
        *,
        threads: int | None,
        share_buffer: bool,
        arithmetic: Arithmetic = Arithmetic.SERVED,
        profile: Path | None = None,
        provider: Provider = Provider.CPU,
        cuda_graph: bool = False,
        chooses: bool = False,
    ) -> None:
        def edit(model: Any) -> None:
            nonlocal interface
            interface = compute_in(arithmetic, model, interface)
            if chooses:
                add_choice(model)

        plain = arithmetic is Arithmetic.SERVED and not chooses
        if cuda_graph and (provider is not Provider.CUDA or not share_buffer):
            raise ConfigError(
                f"a decode step of {folder} cannot be a CUDA graph: it needs CUDA and a shared KV buffer"
            )
        self._opened = open_session(
            folder,
            threads,
            edit=None if plain else edit,
            profile=profile,
            provider=provider,
            cuda_graph=cuda_graph,
        )
        self._session, self.where = self._opened.session, self._opened.where
        if cuda_graph:
            self.where += "; steps as CUDA graphs"
        self._source = (folder, threads, provider)
        self.interface = interface
        self.share_buffer = share_buffer
        self._specs = {spec.name: spec for spec in interface.inputs}
        compare_signature("input", interface.inputs, self._session.get_inputs())
        outputs = [output for output in self._session.get_outputs() if output.name != CHOICE]
        compare_signature("output", interface.outputs, outputs)
        self._chooses = chooses
        pairs = [pair for slot in interface.cache for pair in slot.pairs]
        widths = [(s.kv_heads, w) for s in interface.cache for w in (s.key_width, s.value_width)]
        self._slots = [
            (past, present, *geometry) for (past, present), geometry in zip(pairs, widths, strict=True)
        ]
        self._states = [(state.past, state.present, state.shape) for state in interface.states]
        # The outputs in the order in which they are bound.
        self._names = [present for _, present, *_ in (*self._slots, *self._states)]
        self._names += ["logits", *([CHOICE] if chooses else [])]
        require_fed(interface, {past for past, _ in pairs} | {state.past for state in interface.states})
        self._mask: Array = np.zeros((0, 0), np.int64)
        self._cache: tuple[Any, ...] = ()
        self._binding: Any = None
        self._placed = (0, 0)
        self._capacity = 0
        self._recorded: RecordedStep | None = None
        self._recordings = 0
        self._tokens: Array = np.zeros((0, 0), np.int64)
        self._kept: dict[int, tuple[Any, ...]] = {}

    def prefill(self, input_ids: Array, mask: Array | None = None, *, steps: int) -> Array:
        """Run a prompt from an empty cache.

        Args:
            input_ids: (batch, sequence) int64.
            mask: (batch, sequence) int64, 1 where a token is real; None if all are.
            steps: Decode steps that will follow, for which shared mode reserves slots.

        Returns:
            Logits, (batch, sequence or 1, vocabulary) float32.

        Raises:
            ParityError: The run failed, or the shape of an output differs from the interface.
            ResourceError: The device has not enough memory.
        """
        batch, sequence = input_ids.shape
        self._mask = np.ones_like(input_ids) if mask is None else mask
        self._capacity = sequence + steps
        self._place(batch, self._capacity if self.share_buffer else 0)
        self._tokens = input_ids[:, :0]
        self._kept = {0: tuple(self._zeros(past, (batch, *shape)) for past, _, shape in self._states)}
        return self._run(input_ids)

    def _place(self, batch: int, slots: int) -> None:
        """Allocate the cache; a shared one of the same size is used again, since no step reads old slots."""
        if self.share_buffer and self._placed == (batch, slots):
            return
        if self._recorded is not None:
            self._recorded.release()
        self._binding, self._cache, self._recorded = None, (), None  # frees the old cache first
        self._placed = (0, 0)
        self._cache = tuple(
            self._zeros(past, (batch, heads, slots, width)) for past, _, heads, width in self._slots
        )
        self._binding = self._session.io_binding()
        if self.share_buffer:
            self._bind_cache(self._binding)
        if self._opened.graphs:
            self._recorded = RecordedStep(
                self._opened,
                self.interface,
                self._cache,
                batch,
                slots,
                number=self._recordings,
                chooses=self._chooses,
            )
            self._recordings += 2
        self._placed = (batch, slots)

    def _bind_cache(self, binding: Any) -> None:
        """Bind the shared cache as past and as present."""
        for (past, present, *_), value in zip(self._slots, self._cache, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)

    def decode(self, tokens: Array) -> Array:
        """Run one or more further tokens of every row.

        Args:
            tokens: (batch, sequence) int64.

        Returns:
            Logits, (batch, sequence or 1, vocabulary) float32.

        Raises:
            ParityError: As for `prefill`.
            ConfigError: Shared mode has no slot left.
        """
        self._append(tokens)
        return self._run(tokens)

    def next_tokens(self, tokens: Array) -> Array:
        """Run one more token of every row, (batch,), and return the most likely next ones, (batch,).

        Raises:
            ParityError: As for `prefill`.
            ConfigError: Shared mode has no slot left.
        """
        self._append(tokens[:, None])
        if not self._chooses:
            chosen: Array = self._run(tokens[:, None])[:, -1].argmax(axis=-1)
            return chosen
        return self._run(tokens[:, None], choose=True)[:, -1, 0]

    def _append(self, tokens: Array) -> None:
        """Lengthen the mask by the tokens of the next step."""
        total = self._mask.shape[1] + tokens.shape[1]
        if self.share_buffer and total > self._capacity:
            raise ConfigError(
                f"the KV cache has {self._capacity} slots, but the step needs {total}",
                hint="reserve more steps at prefill",
            )
        self._mask = np.concatenate([self._mask, np.ones_like(tokens)], axis=1)

    def profiled(self, prefix: Path) -> "OrtModel":
        """Open the same artifact in a session that writes a profile."""
        folder, threads, provider = self._source
        return OrtModel(
            folder,
            self.interface,
            threads=threads,
            share_buffer=self.share_buffer,
            profile=prefix,
            provider=provider,
        )

    def end_profiling(self) -> str:
        """Stop profiling and return the path of the profile, in Chrome's trace format."""
        return str(self._session.end_profiling())

    def state(self) -> CacheState:
        """Return this point of the sequence, to `restore` later; holds no copy of a shared cache."""
        cache = () if self.share_buffer else self._cache
        return CacheState(self._mask, cache, self._tokens, self._lasting())

    def restore(self, state: CacheState) -> None:
        """Go back to `state`, taken since the last prefill."""
        self._mask, self._tokens, self._kept = state.mask, state.tokens, dict(state.states)
        if not self.share_buffer:
            self._cache = state.cache

    def rewind(self, state: CacheState, total: int) -> None:
        """Go back to the first `total` tokens of `state`, taken since the last prefill of one row.

        States of fixed size exist only where they were kept: the tokens after the last such place run again.
        """
        start = max((at for at in state.states if at <= total), default=0) if self._states else total
        self._mask, self._tokens = state.mask[:, :start], state.tokens[:, :start]
        self._kept = {at: kept for at, kept in state.states.items() if at <= start}
        if not self.share_buffer:
            self._cache = tuple(self._opened.value(value.numpy()[:, :, :start]) for value in state.cache)
        if start < total:
            self._mask = state.mask[:, :total]
            self._run(state.tokens[:, start:total])
            state.states[total] = self._lasting()[total]
            self._thin_out(state.states, total)

    def _lasting(self) -> dict[int, tuple[Any, ...]]:
        """Return the kept states, none of which later steps overwrite."""
        recorded = self._recorded
        if recorded is None:
            return dict(self._kept)
        return {at: recorded.lasting(kept, self.interface) for at, kept in self._kept.items()}

    def _zeros(self, name: str, shape: tuple[int, ...]) -> Any:
        return self._opened.value(np.zeros(shape, np.dtype(self._specs[name].dtype)))

    def _run(self, input_ids: Array, *, choose: bool = False) -> Array:
        """Run a step, and return its logits; with `choose`, the choice of the device instead."""
        values: Array
        batch, sequence = input_ids.shape
        total = self._mask.shape[1]
        feeds = {"input_ids": input_ids, "attention_mask": self._mask}
        if self.interface.position_ids:
            positions = np.maximum(np.cumsum(self._mask, axis=1) - 1, 0)
            feeds["position_ids"] = positions[:, total - sequence :]
        step = f"batch {batch}, sequence {sequence}, total {total}"
        if self._recorded is not None and sequence == 1:
            kept = self._recorded.run(feeds, self._kept[self._tokens.shape[1]] if self._states else (), step)
            self._keep(input_ids, kept)
            values = self._recorded.output(CHOICE if choose else "logits")
            return values if choose else values.astype(np.float32, copy=False)
        binding, device = self._binding, self._opened.device
        if not self.share_buffer:
            binding.clear_binding_inputs()
            binding.clear_binding_outputs()
            for (past, *_), value in zip(self._slots, self._cache, strict=True):
                binding.bind_ortvalue_input(past, value)
            for _, present, *_ in self._slots:
                binding.bind_output(present, device)
        for (past, present, _), value in zip(self._states, self._kept[self._tokens.shape[1]], strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_output(present, device)
        for name in self._names[len(self._slots) + len(self._states) :]:
            binding.bind_output(name, device)  # again: a bound value keeps the last run's shape
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value, np.dtype(self._specs[name].dtype)))
        self._opened.run(binding, step)
        outputs = dict(zip(self._names, binding.get_outputs(), strict=True))
        kept = tuple(outputs[present] for _, present, _ in self._states)
        for (_, present, sizes), value in zip(self._states, kept, strict=True):
            require_shape(present, value.shape(), (batch, *sizes))
        self._keep(input_ids, kept)
        if not self.share_buffer:
            self._cache = tuple(outputs[present] for _, present, *_ in self._slots)
            for (_, present, heads, width), value in zip(self._slots, self._cache, strict=True):
                require_shape(present, value.shape(), (batch, heads, total, width))
        positions_out = 1 if self.interface.logits == "last" else sequence
        shape = outputs["logits"].shape()
        require_shape("logits", shape, (batch, positions_out, shape[-1] if len(shape) == 3 else -1))
        values = outputs[CHOICE if choose else "logits"].numpy()
        return values if choose else values.astype(np.float32, copy=False)

    def _keep(self, input_ids: Array, states: tuple[Any, ...]) -> None:
        """Keep the states after `input_ids`."""
        if self._states:
            self._tokens = np.concatenate([self._tokens, input_ids], axis=1)
            if self._recorded is not None:  # those of its last steps are overwritten
                recorded = self._recorded
                self._kept = {at: kept for at, kept in self._kept.items() if not recorded.owns(kept)}
            self._kept[self._tokens.shape[1]] = states
            self._thin_out(self._kept, self._tokens.shape[1])

    def _thin_out(self, kept: dict[int, tuple[Any, ...]], newest: int) -> None:
        """Drop states beyond a total size, the closest ones first, but not the newest, first and last."""
        size = len(self._tokens) * sum(
            math.prod(sizes) * np.dtype(self._specs[past].dtype).itemsize for past, _, sizes in self._states
        )
        while len(kept) > max(4, _KEPT_BYTES // size):
            places = sorted(kept)
            gaps = {b: c - a for a, b, c in zip(places, places[1:], places[2:], strict=False) if b != newest}
            del kept[min(gaps, key=lambda place: gaps[place])]


def shares_buffer(folder: Path) -> bool:
    """Return whether onnxruntime-genai serves the artifact with one buffer for past and present.

    Read from `search.past_present_share_buffer` of genai_config.json.

    Raises:
        ConfigError: The file is missing or is not JSON.
    """
    return bool(read_genai_config(folder).get("search", {}).get("past_present_share_buffer", False))


def records_graph(folder: Path) -> bool:
    """Return whether onnxruntime-genai records a decode step as a CUDA graph.

    Read from the provider's options in genai_config.json.

    Raises:
        ConfigError: The file is missing or is not JSON.
    """
    session = read_genai_config(folder).get("model", {}).get("decoder", {}).get("session_options", {})
    options = (each.get("cuda", {}) for each in session.get("provider_options", ()))
    return any(each.get("enable_cuda_graph") == "1" for each in options)
