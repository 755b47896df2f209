"""Calibration that streams: one decoder layer in memory at a time, and every finished one on disk.

The model's own modules run, with parameters on the meta device but for the layer at hand. For each layer the
whole model is called: layers before it pass on what they are given, the stored hidden states take the place of
what arrives, and the call ends behind it. So masks, positions and whatever else a layer is given are the model's
own. The layer's matrices are then quantized by GPTQ from what reached them, and the hidden states go on through
the quantized layer, so that later layers make up for the error of earlier ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.artifact.disk import space_errors
from llmc.config import WeightScheme
from llmc.errors import ConfigError
from llmc.graph.weights import Array, WeightStore
from llmc.quantize.blocks import PackedBlocks, ScaleType, dequantize_blocks
from llmc.quantize.gptq import quantize_gptq

if TYPE_CHECKING:
    import torch

#: Fewest tokens that a Hessian may rest on.
LEAST_TOKENS = 256
_STATES = "states"
_MEMBERS = ("codes", "scales", "zero_points")


@dataclass(frozen=True)
class Calibration:
    """Matrices that were quantized on calibration text, by the checkpoint's tensor names.

    Args:
        folder: One file a layer.
        files: The file that holds each tensor.
        schemes: How each was quantized.
        widths: Input features of each.
    """

    folder: Path
    files: Mapping[str, str]
    schemes: Mapping[str, WeightScheme]
    widths: Mapping[str, int]

    def join(
        self, sources: Sequence[str], shape: tuple[int, int], scheme: WeightScheme
    ) -> PackedBlocks | None:
        """The matrix (N, K) that `sources` make along N; None if one of them was not calibrated as it is."""
        from safetensors.numpy import load_file

        if any(s not in self.files or self.schemes[s] != scheme for s in sources):
            return None
        stored = [load_file(self.folder / self.files[s]) for s in sources]
        parts = [[data.get(f"{s}.{m}") for s, data in zip(sources, stored, strict=True)] for m in _MEMBERS]
        codes, scales, zeros = (
            None if any(p is None for p in part) else np.concatenate([p for p in part if p is not None])
            for part in parts
        )
        if codes is None or scales is None or (len(scales), self.widths[sources[0]]) != shape:
            return None
        return PackedBlocks(codes, scales, zeros, shape[1], scheme)


class Calibrator:
    """Runs the layers of one model over calibration text.

    Args:
        model: A transformers causal LM in evaluation mode, parameters on the meta device, buffers real.
        layers: Qualified names of its decoder layers, in order.
        store: The checkpoint's tensors.
        tied: Parameter names absent from the store, and the stored name that stands for each.
        schemes: How each tensor of the checkpoint is to be quantized; those that no linear layer of the
            model owns are left out.
        scale_type: Type of the stored scales.
        folder: Where finished layers are kept, and found again.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[str],
        store: WeightStore,
        tied: Mapping[str, str],
        schemes: Mapping[str, WeightScheme],
        scale_type: ScaleType,
        folder: Path,
    ) -> None:
        self.model = model
        self.layers = [model.get_submodule(name) for name in layers]
        self._names = layers
        self._store = store
        self._tied = tied
        self._schemes = schemes
        self._scale_type = scale_type
        self._folder = folder
        self._files: dict[str, str] = {}
        self._widths: dict[str, int] = {}

    def run(self, windows: Array, note: Callable[[str], None]) -> Calibration:
        """Quantize every layer, then the head, going on from the last layer that is on disk.

        Args:
            windows: (windows, length) int64 token ids.
            note: Told what was taken up again.

        Raises:
            ConfigError: Fewer than LEAST_TOKENS tokens, or a Hessian that is singular.
            CheckpointError: Weights or activations are not finite.
            ResourceError: Disk full.
        """
        import torch

        if windows.size < LEAST_TOKENS:
            raise ConfigError(
                f"{windows.size} tokens of calibration text; at least {LEAST_TOKENS} are needed",
                hint="use a longer calibration text",
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        done = self._finished()
        if done:
            note(f"{done} of {len(self.layers)} layers were calibrated before")
        with torch.inference_mode():
            outside = [
                n for n, _ in self.model.named_parameters() if not n.startswith(tuple(self._prefixes()))
            ]
            self._load(outside)
            states = self._load_states(done) if done else None
            for index in range(done, len(self.layers)):
                states = self._calibrate_layer(index, windows, states)
            self._calibrate_head(windows, states)
        return Calibration(self._folder, self._files, self._schemes, self._widths)

    def _prefixes(self) -> list[str]:
        return [f"{name}." for name in self._names]

    def _calibrate_layer(self, index: int, windows: Array, states: list[Any] | None) -> list[Any]:
        layer, name = self.layers[index], self._names[index]
        parameters = [f"{name}.{n}" for n, _ in layer.named_parameters()]
        self._load(parameters)
        linears = self._linears(layer, f"{name}.")
        with _hessians(linears) as hessians:
            first = [self._pass(layer, row, _at(states, i)) for i, row in enumerate(windows)]
        self._quantize(linears, hessians, f"layer-{index}")
        inputs = [given for given, _ in first] if states is None else states
        results = [self._pass(layer, row, inputs[i])[1] for i, row in enumerate(windows)]
        self._unload(parameters)
        layer.forward = _PassOn(isinstance(results[0], tuple))
        following = [r[0] if isinstance(r, tuple) else r for r in results]
        self._save_states(index + 1, following)
        return following

    def _calibrate_head(self, windows: Array, states: list[Any] | None) -> None:
        """The linear layers outside of the decoder layers that are called after them."""
        inside = tuple(self._prefixes())
        linears = {n: m for n, m in self._linears(self.model, "").items() if not n.startswith(inside)}
        if not linears or self._known("head"):
            return
        last = self.layers[-1]
        with _hessians(linears, keep_going=False) as hessians:
            for i, row in enumerate(windows):
                with _replacing_input(last, _at(states, i)):
                    self._call(row)
        self._quantize({n: m for n, m in linears.items() if n in hessians}, hessians, "head")

    def _linears(self, root: torch.nn.Module, prefix: str) -> dict[str, torch.nn.Linear]:
        """Linear layers below `root` whose weight is to be quantized, by the weight's name in the store."""
        import torch

        found = {}
        for name, module in root.named_modules():
            stored = f"{prefix}{name}.weight"
            stored = self._tied.get(stored, stored)
            if isinstance(module, torch.nn.Linear) and stored in self._schemes:
                found[stored] = module
        return found

    def _pass(self, layer: Any, row: Array, state: Any) -> tuple[Any, Any]:
        """What `layer` is given for one window, and what it returns; `state` takes the place of the former."""
        with _replacing_input(layer, state), _stopping_behind(layer) as seen:
            self._call(row)
        return seen[0]

    def _call(self, row: Array) -> None:
        import torch

        try:
            self.model(input_ids=torch.from_numpy(row[None].copy()), use_cache=False)
        except _Stop:
            return

    def _quantize(self, linears: Mapping[str, Any], hessians: Mapping[str, Any], stem: str) -> None:
        import torch
        from safetensors.numpy import save_file

        data: dict[str, Array] = {}
        for name, module in linears.items():
            if name not in hessians:  # never called: nothing is known of its inputs
                continue
            blocks = quantize_gptq(
                module.weight.numpy(), hessians[name].numpy(), self._schemes[name], self._scale_type, name
            )
            module.weight = torch.nn.Parameter(
                torch.from_numpy(dequantize_blocks(blocks)), requires_grad=False
            )
            for member in _MEMBERS:
                array = getattr(blocks, member)
                if array is not None:
                    data[f"{name}.{member}"] = array
            data[f"{name}.width"] = np.array([blocks.in_features])
        self._write(f"{stem}.safetensors", lambda path: save_file(data, path))
        self._known(stem)

    def _known(self, stem: str) -> bool:
        """Whether this part is on disk; notes where its tensors are."""
        from safetensors import safe_open

        path = self._folder / f"{stem}.safetensors"
        if not path.is_file():
            return False
        with safe_open(path, "np") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                if key.endswith(".width"):
                    name = key.removesuffix(".width")
                    self._files[name] = path.name
                    self._widths[name] = int(file.get_tensor(key)[0])
        return True

    def _finished(self) -> int:
        """Layers that are on disk together with the hidden states behind them."""
        done = 0
        while done < len(self.layers) and self._known(f"layer-{done}"):
            done += 1
        while done and not (self._folder / f"{_STATES}-{done}.safetensors").is_file():
            done -= 1
        for layer in self.layers[:done]:
            layer.forward = _PassOn(False)
        return done

    def _load_states(self, index: int) -> list[Any]:
        from safetensors.torch import load_file

        data = load_file(self._folder / f"{_STATES}-{index}.safetensors")
        return [data[str(i)] for i in range(len(data))]

    def _save_states(self, index: int, states: Sequence[Any]) -> None:
        from safetensors.torch import save_file

        data = {str(i): state.contiguous() for i, state in enumerate(states)}
        self._write(f"{_STATES}-{index}.safetensors", lambda path: save_file(data, path))
        (self._folder / f"{_STATES}-{index - 1}.safetensors").unlink(missing_ok=True)

    def _write(self, name: str, save: Callable[[Path], None]) -> None:
        partial = self._folder / f"{name}.{os.getpid()}.partial"
        with space_errors(partial):
            save(partial)
            os.replace(partial, self._folder / name)

    def _load(self, names: Sequence[str]) -> None:
        """Give parameters their values from the store, float32."""
        import torch

        loaded: dict[str, torch.nn.Parameter] = {}
        for name in names:
            stored = self._tied.get(name, name)
            if stored not in loaded:
                array = self._store.read(stored).astype(np.float32)
                loaded[stored] = torch.nn.Parameter(torch.from_numpy(array), requires_grad=False)
            _place(self.model, name, loaded[stored])
        for name, stored in self._tied.items():
            if stored in loaded:
                _place(self.model, name, loaded[stored])

    def _unload(self, names: Sequence[str]) -> None:
        import torch

        for name in names:
            shape = self.model.get_parameter(name).shape
            _place(
                self.model, name, torch.nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
            )


def _place(model: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    owner, _, key = name.rpartition(".")
    model.get_submodule(owner)._parameters[key] = parameter


def _at(states: list[Any] | None, index: int) -> Any:
    return None if states is None else states[index]


class _Stop(Exception):
    """Ends a call of the model once what was wanted of it is known."""


class _PassOn:
    """In place of a layer's forward: hidden states go on as they are."""

    def __init__(self, as_tuple: bool) -> None:
        self.as_tuple = as_tuple

    def __call__(self, hidden_states: Any, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if self.as_tuple else hidden_states


@contextmanager
def _replacing_input(layer: torch.nn.Module, state: Any) -> Iterator[None]:
    """Within this context `layer` is given `state` as its hidden states; None leaves what arrives."""

    def replace(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if state is None:
            return None
        if args:
            return (state, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": state}

    handle = layer.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _stopping_behind(layer: torch.nn.Module) -> Iterator[list[tuple[Any, Any]]]:
    """Within this context a call of the model ends behind `layer`; gives its hidden states and its result."""
    seen: list[tuple[Any, Any]] = []

    def stop(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], result))
        raise _Stop

    handle = layer.register_forward_hook(stop, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _hessians(linears: Mapping[str, Any], *, keep_going: bool = True) -> Iterator[dict[str, torch.Tensor]]:
    """Within this context sum(x x') of every linear layer's inputs is added up, (K, K) float32 by name.

    Args:
        keep_going: Whether a call goes on behind the linear layer.
    """
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            product = x.T @ x
            sums[name] = product if name not in sums else sums[name].add_(product)
            if not keep_going:
                raise _Stop

        return add

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
