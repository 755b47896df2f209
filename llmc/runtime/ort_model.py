"""Run an artifact with onnxruntime: prefill and decode over a KV cache, with the inputs of its interface."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.arrays import Array
from llmc.artifact.manifest import MODEL
from llmc.errors import ConfigError, ParityError
from llmc.graph.interface import Interface, TensorSpec
from llmc.runtime.arithmetic import Arithmetic, compute_in
from llmc.runtime.libraries import load_onnxruntime

_PROVIDER = "CPUExecutionProvider"
#: Maximum size in bytes of the states of fixed size that a session keeps to go back to.
_KEPT_BYTES = 256 << 20
_STEP_INPUTS = ("input_ids", "attention_mask", "position_ids")


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

    The cache stays in OrtValues: in growing mode, each step's present tensors are the next step's past; in
    shared mode (`past_present_share_buffer` of onnxruntime-genai), one buffer of `capacity` slots is bound
    as both past and present, and the graph writes into it. States of fixed size are each step's outputs and
    the next one's inputs in both modes; some are kept, since a session cannot compute back from them.

    Args:
        folder: Directory with model.onnx.
        interface: Inputs and outputs of the graph.
        threads: Number of intra-op threads; None for onnxruntime's default.
        share_buffer: Whether to use shared mode; only graphs with GroupQueryAttention allow it.
        arithmetic: Arithmetic of the session; `interface` of the session changes accordingly.
        profile: Prefix of the file in which onnxruntime records the time of each kernel.

    Raises:
        ConfigError: There is no model.onnx in `folder`.
        ResourceError: onnxruntime is not installed.
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
    ) -> None:
        def edit(model: Any) -> None:
            nonlocal interface
            interface = compute_in(arithmetic, model, interface)

        served = arithmetic is Arithmetic.SERVED
        ort, self._session, self.where = open_session(
            folder, threads, edit=None if served else edit, profile=profile
        )
        self._opened = (folder, threads)
        self._ort = ort
        self.interface = interface
        self.share_buffer = share_buffer
        self._specs = {spec.name: spec for spec in interface.inputs}
        compare_signature("input", interface.inputs, self._session.get_inputs())
        compare_signature("output", interface.outputs, self._session.get_outputs())
        pairs = [pair for slot in interface.cache for pair in slot.pairs]
        widths = [(s.kv_heads, w) for s in interface.cache for w in (s.key_width, s.value_width)]
        self._slots = [
            (past, present, *geometry) for (past, present), geometry in zip(pairs, widths, strict=True)
        ]
        self._states = [(state.past, state.present, state.shape) for state in interface.states]
        _require_fed(interface, {past for past, _ in pairs} | {state.past for state in interface.states})
        self._mask: Array = np.zeros((0, 0), np.int64)
        self._cache: tuple[Any, ...] = ()
        self._binding: Any = None
        self._capacity = 0
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
        """
        batch, sequence = input_ids.shape
        self._mask = np.ones_like(input_ids) if mask is None else mask
        self._capacity = sequence + steps
        slots = self._capacity if self.share_buffer else 0
        self._cache = tuple(
            self._zeros(past, (batch, heads, slots, width)) for past, _, heads, width in self._slots
        )
        self._tokens = input_ids[:, :0]
        self._kept = {0: tuple(self._zeros(past, (batch, *shape)) for past, _, shape in self._states)}
        self._binding = self._session.io_binding()
        if self.share_buffer:
            for (past, present, *_), value in zip(self._slots, self._cache, strict=True):
                self._binding.bind_ortvalue_input(past, value)
                self._binding.bind_ortvalue_output(present, value)
        return self._run(input_ids)

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
        total = self._mask.shape[1] + tokens.shape[1]
        if self.share_buffer and total > self._capacity:
            raise ConfigError(
                f"the KV cache has {self._capacity} slots, but the step needs {total}",
                hint="reserve more steps at prefill",
            )
        self._mask = np.concatenate([self._mask, np.ones_like(tokens)], axis=1)
        return self._run(tokens)

    def profiled(self, prefix: Path) -> "OrtModel":
        """Open the same artifact in a session that writes a profile."""
        folder, threads = self._opened
        return OrtModel(
            folder, self.interface, threads=threads, share_buffer=self.share_buffer, profile=prefix
        )

    def end_profiling(self) -> str:
        """Stop profiling and return the path of the profile, in Chrome's trace format."""
        return str(self._session.end_profiling())

    def state(self) -> CacheState:
        """Return this point of the sequence, to `restore` later; holds no copy of the cache."""
        cache = () if self.share_buffer else self._cache
        return CacheState(self._mask, cache, self._tokens, dict(self._kept))

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
            self._cache = tuple(
                self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, :, :start]))
                for value in state.cache
            )
        if start < total:
            self._mask = state.mask[:, :total]
            self._run(state.tokens[:, start:total])
            state.states[total] = self._kept[total]
            self._thin_out(state.states, total)

    def _zeros(self, name: str, shape: tuple[int, ...]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.dtype(self._specs[name].dtype)))

    def _run(self, input_ids: Array) -> Array:
        batch, sequence = input_ids.shape
        total = self._mask.shape[1]
        binding = self._binding
        if not self.share_buffer:
            binding.clear_binding_inputs()
            binding.clear_binding_outputs()
            for (past, *_), value in zip(self._slots, self._cache, strict=True):
                binding.bind_ortvalue_input(past, value)
            for _, present, *_ in self._slots:
                binding.bind_output(present, "cpu")
        for (past, present, _), value in zip(self._states, self._kept[self._tokens.shape[1]], strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_output(present, "cpu")
        binding.bind_output("logits", "cpu")  # bind again each time: a bound value keeps the last run's shape
        feeds = {"input_ids": input_ids, "attention_mask": self._mask}
        if self.interface.position_ids:
            positions = np.maximum(np.cumsum(self._mask, axis=1) - 1, 0)
            feeds["position_ids"] = positions[:, total - sequence :]
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value, np.dtype(self._specs[name].dtype)))
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise ParityError(
                f"onnxruntime failed at batch {batch}, sequence {sequence}, total {total}: {error}"
            ) from error
        outputs = binding.get_outputs()
        logits = outputs[-1]
        kept = tuple(outputs[len(outputs) - 1 - len(self._states) : -1])
        for (_, present, sizes), value in zip(self._states, kept, strict=True):
            require_shape(present, value.shape(), (batch, *sizes))
        self._keep(input_ids, kept)
        if not self.share_buffer:
            self._cache = tuple(outputs[: len(self._slots)])
            for (_, present, heads, width), value in zip(self._slots, self._cache, strict=True):
                require_shape(present, value.shape(), (batch, heads, total, width))
        positions_out = 1 if self.interface.logits == "last" else sequence
        shape = logits.shape()
        require_shape("logits", shape, (batch, positions_out, shape[-1] if len(shape) == 3 else -1))
        values: Array = logits.numpy()
        return values.astype(np.float32, copy=False)

    def _keep(self, input_ids: Array, states: tuple[Any, ...]) -> None:
        """Keep the states after `input_ids`."""
        if self._states:
            self._tokens = np.concatenate([self._tokens, input_ids], axis=1)
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


def open_session(
    folder: Path,
    threads: int | None,
    entries: Mapping[str, str] | None = None,
    *,
    edit: Callable[[Any], None] | None = None,
    profile: Path | None = None,
    arena: bool = True,
) -> tuple[Any, Any, str]:
    """Open a session of model.onnx on the CPU; return the module onnxruntime, the session and a description.

    Args:
        entries: Further session configuration entries.
        edit: Changes the graph, an `onnx_ir.Model`, before it is loaded.
        profile: As for `OrtModel`.
        arena: Whether to keep freed memory for the next step, which is faster for short steps.

    Raises:
        ConfigError: There is no model.onnx in `folder`.
        ResourceError: onnxruntime is not installed.
        ParityError: onnxruntime cannot load the graph.
    """
    ort = load_onnxruntime()
    path = folder / MODEL
    if not path.is_file():
        raise ConfigError(f"{folder} has no model.onnx", hint="give the directory of a built artifact")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = arena
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if threads is not None:
        options.intra_op_num_threads = threads
    library = custom_operators(folder)
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        source = str(path) if edit is None else _edited(path, edit, options)
        session = ort.InferenceSession(source, options, providers=[_PROVIDER])
    except Exception as error:
        raise ParityError(f"onnxruntime {ort.__version__} cannot load {path}: {error}") from error
    return ort, session, f"onnxruntime {ort.__version__} {_PROVIDER}"


def _edited(path: Path, edit: Callable[[Any], None], options: Any) -> bytes:
    """Return the changed graph, whose weights are read from their original files."""
    import onnx_ir as ir

    model = ir.load(path)
    edit(model)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
    )
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def shares_buffer(folder: Path) -> bool:
    """Return whether onnxruntime-genai serves the artifact with one buffer for past and present.

    Read from `search.past_present_share_buffer` of genai_config.json.

    Raises:
        ConfigError: The file is missing or is not JSON.
    """
    return bool(_genai_config(folder).get("search", {}).get("past_present_share_buffer", False))


def _genai_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "genai_config.json"
    try:
        config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="build the artifact again") from error
    return config


def custom_operators(folder: Path) -> Path | None:
    """Return the library of custom operators that genai_config.json names, if it names one."""
    path = folder / "genai_config.json"
    if not path.is_file():
        return None
    session = _genai_config(folder).get("model", {}).get("decoder", {}).get("session_options", {})
    name = session.get("custom_ops_library")
    return None if name is None else folder / name


def _require_fed(interface: Interface, past: set[str]) -> None:
    """Check that this module can feed every input of the interface, and that no input is missing."""
    fed = past | set(_STEP_INPUTS[: 3 if interface.position_ids else 2])
    names = {spec.name for spec in interface.inputs}
    if names != fed:
        raise ParityError(
            f"the interface has inputs {sorted(names - fed)} that nothing feeds"
            f" and lacks {sorted(fed - names)}"
        )
    present = {n for slot in interface.cache for n in (slot.present_key, slot.present_value)}
    present |= {state.present for state in interface.states}
    missing = (present | {"logits"}) - {spec.name for spec in interface.outputs}
    if missing:
        raise ParityError(f"the interface lacks the outputs {sorted(missing)}")


def compare_signature(kind: str, specs: tuple[TensorSpec, ...], arguments: Any) -> None:
    """Check that the session's inputs or outputs match the interface by name, type and static size."""
    actual = {arg.name: arg for arg in arguments}
    expected = {spec.name for spec in specs}
    if missing := sorted(expected - set(actual)):
        raise ParityError(f"the graph lacks the {kind} {', '.join(missing)}")
    if extra := sorted(set(actual) - expected):
        raise ParityError(f"the graph has the {kind} {', '.join(extra)}, which the interface does not name")
    for spec in specs:
        arg = actual[spec.name]
        dtype = {"float": "float32", "double": "float64"}.get(arg.type[7:-1], arg.type[7:-1])
        if dtype != spec.dtype:
            raise ParityError(f"{kind} {spec.name} is {dtype}, but the interface says {spec.dtype}")
        if len(arg.shape) != len(spec.shape):
            raise ParityError(
                f"{kind} {spec.name} has shape {arg.shape}, but the interface says {spec.shape}"
            )
        for size, stated in zip(arg.shape, spec.shape, strict=True):
            if isinstance(size, int) and isinstance(stated, int) and size != stated:
                raise ParityError(
                    f"{kind} {spec.name} has shape {arg.shape}, but the interface says {list(spec.shape)}"
                )


def require_shape(name: str, shape: list[int], expected: tuple[int, ...]) -> None:
    if tuple(shape) != expected:
        raise ParityError(f"output {name} has shape {list(shape)}, but it must be {list(expected)}")
