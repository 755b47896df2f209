"""Walk over the decoder layers of a model on a text, with one layer in memory at a time.

The model's own modules run, with parameters on the meta device except for the current layer. The whole model
is called for each layer: layers before it pass their input through, the stored hidden states replace its
input, and the call ends behind it. Masks, positions and all other inputs of a layer are therefore the model's
own. A `LayerTask` defines what is done with each layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from llmc.architecture import values_by_layer
from llmc.arrays import Array
from llmc.artifact.store.disk import space_errors
from llmc.errors import ConfigError, LlmcError, UnsupportedError
from llmc.graph.weights import WeightStore
from llmc.memory import trim_heap

if TYPE_CHECKING:
    import torch

#: Minimum number of calibration tokens.
LEAST_TOKENS = 256
#: Maximum bytes of an activation of all calibration windows.
TOGETHER_BYTES = 1 << 30
_STATES = "states"
_HEAD = "head"


def finished_files(folder: Path, layers: int) -> list[Path] | None:
    """Return the files of a finished `LayerWalk.run` over so many layers; None if one is missing."""
    files = [folder / f"{stem}.safetensors" for stem in (*(f"layer-{i}" for i in range(layers)), _HEAD)]
    return files if all(file.is_file() for file in files) else None


class LayerTask(Protocol):
    """The work that is done for each layer of a walk.

    Args:
        changes: Whether `conclude` changes weights: later layers then see the results of the changed layers.
        together: Whether all windows run in one call of the model, if `LayerWalk.runs_together` says so.
    """

    changes: bool
    together: bool

    def watch(self, name: str, module: torch.nn.Module) -> AbstractContextManager[None]:
        """Observe `module`, called `name` in the model, which runs over every window within this context."""
        ...

    def conclude(self, name: str, module: torch.nn.Module) -> Mapping[str, Array]:
        """Return the data of `module` to store on disk, by name."""
        ...


class LayerWalk:
    """The walk of a model over a text, layer by layer, which continues where it was interrupted.

    Args:
        model: A transformers causal LM in evaluation mode, parameters on the meta device, buffers real.
        layers: Qualified names of its decoder layers, in order.
        store: The checkpoint's tensors.
        tied: Parameter names absent from the store, and the stored name of the tensor that each is tied to.
        folder: Folder in which the data of finished layers is stored, and found again.
        keep_states: Whether to keep the hidden states behind every layer, not only behind the last finished
            one.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[str],
        store: WeightStore,
        tied: Mapping[str, str],
        folder: Path,
        *,
        keep_states: bool = False,
    ) -> None:
        self.model = model
        self.layers = [model.get_submodule(name) for name in layers]
        self._names = layers
        self._store = store
        self._tied = tied
        self._folder = folder
        self._keep_states = keep_states

    def run(self, windows: Array, task: LayerTask, note: Callable[[str], None]) -> list[Path]:
        """Run the task on every layer in turn, and on what the model does behind the last one.

        Args:
            windows: (windows, length) int64 token ids.
            note: Called with a description of the work that was resumed.

        Returns:
            A safetensors file for each layer with its data, and one for the head.

        Raises:
            ConfigError: Fewer than LEAST_TOKENS tokens, or the task raises it.
            CheckpointError: The task raises it.
            UnsupportedError: The model cannot be run layer by layer.
            ResourceError: Disk full.
        """
        import torch

        if windows.size < LEAST_TOKENS:
            raise ConfigError(
                f"the calibration text has {windows.size} tokens; at least {LEAST_TOKENS} are needed",
                hint="use a longer calibration text",
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        done = self._finished()
        if done:
            note(f"{done} of {len(self.layers)} layers were calibrated before")
        together = task.together and self.runs_together(windows)
        batches = [windows] if together else [row[None] for row in windows]
        with torch.inference_mode():
            self._load_outside()
            states = self._load_states(done) if done else None
            for index in range(done, len(self.layers)):
                states = self._walk_layer(index, batches, states, task)
            if not self._file(_HEAD).is_file():
                self._walk_head(batches, states, task)
        return [self._file(f"layer-{i}") for i in range(len(self.layers))] + [self._file(_HEAD)]

    def runs_together(self, windows: Array) -> bool:
        """Whether all windows run in one call: layers are linear, and results of a call take TOGETHER_BYTES.

        Those are the widest activation, and the scores of attention where it is computed as a whole.
        """
        heads = max(int(each or 1) for each in values_by_layer(self.model.config, "num_attention_heads"))
        widest = max(map(_largest_width, self.layers))
        fits = 4 * windows.size * max(widest, heads * windows.shape[1]) <= TOGETHER_BYTES
        return fits and all(map(_is_linear, self.layers))

    def _walk_layer(
        self, index: int, batches: Sequence[Array], states: list[Any] | None, task: LayerTask
    ) -> list[Any]:
        layer, name = self.layers[index], self._names[index]
        parameters = [f"{name}.{n}" for n, _ in layer.named_parameters()]
        self._load(parameters)
        with task.watch(name, layer):
            passes = [self._pass(layer, rows, _at(states, i)) for i, rows in enumerate(batches)]
        self._keep(f"layer-{index}", task.conclude(name, layer))
        if task.changes:
            passes = [self._pass(layer, rows, passes[i][0]) for i, rows in enumerate(batches)]
        results = [result for _, result in passes]
        self._unload(parameters)
        layer.forward = _PassOn(isinstance(results[0], tuple))
        following = [r[0] if isinstance(r, tuple) else r for r in results]
        self._save_states(index + 1, following)
        del passes, results
        trim_heap()
        return following

    def _walk_head(self, batches: Sequence[Array], states: list[Any] | None, task: LayerTask) -> None:
        """Run the model with every layer passing its input through, to observe the other modules."""
        last = self.layers[-1]
        with task.watch("", self.model):
            for i, rows in enumerate(batches):
                with replacing_input(last, _at(states, i)):
                    self._call(rows)
        self._keep(_HEAD, task.conclude("", self.model))

    def _pass(self, layer: Any, rows: Array, state: Any) -> tuple[Any, Any]:
        """Return the input of `layer` for some windows (`state` if it is known) and its result."""
        with replacing_input(layer, state), _stopping_behind(layer) as seen:
            self._call(rows)
        return seen[0]

    def _call(self, rows: Array) -> Any:
        """Return the model's result; None if a task ended the call."""
        import torch

        try:
            return self.model(input_ids=torch.from_numpy(rows.copy()), **self.over())
        except StopCallError:
            return None
        except LlmcError:  # the task's
            raise
        except Exception as error:  # transformers' model code raises any error if it cannot be walked
            raise UnsupportedError(
                f"the model cannot be run layer by layer: {type(error).__name__}: {error}"
            ) from error

    def over(self) -> dict[str, Any]:
        """Return what the model is told about a KV cache: that it needs none."""
        return {"use_cache": False}

    def _file(self, stem: str) -> Path:
        return self._folder / f"{stem}.safetensors"

    def _state_file(self, index: int) -> Path:
        """Return the file of the hidden states behind the first `index` layers."""
        return self._file(f"{_STATES}-{index}")

    def _keep(self, stem: str, data: Mapping[str, Array]) -> None:
        from safetensors.numpy import save_file

        self._write(self._file(stem), lambda path: save_file(dict(data), path))

    def _finished(self) -> int:
        """Return the number of layers that are on disk together with the hidden states behind them."""
        done = 0
        while done < len(self.layers) and self._file(f"layer-{done}").is_file():
            done += 1
        while done and not self._state_file(done).is_file():
            done -= 1
        for layer in self.layers[:done]:
            layer.forward = _PassOn(False)
        return done

    def _load_states(self, index: int) -> list[Any]:
        from safetensors.torch import load_file

        data = load_file(self._state_file(index))
        return [data[str(i)] for i in range(len(data))]

    def _save_states(self, index: int, states: Sequence[Any]) -> None:
        from safetensors.torch import save_file

        data = {str(i): state.contiguous() for i, state in enumerate(states)}
        self._write(self._state_file(index), lambda path: save_file(data, path))
        if not self._keep_states:
            self._state_file(index - 1).unlink(missing_ok=True)

    def _write(self, path: Path, save: Callable[[Path], None]) -> None:
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with space_errors(partial):
            save(partial)
            os.replace(partial, path)

    def _load_outside(self) -> None:
        """Load all parameters outside of the layers."""
        inside = tuple(f"{name}." for name in self._names)
        self._load([n for n, _ in self.model.named_parameters() if not n.startswith(inside)])

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


def _is_linear(layer: torch.nn.Module) -> bool:
    """Whether all matrices of a layer are linear layers.

    Layers with states of their own (Mamba) hold large intermediate results of each token, and stacked experts
    are no linear layers.
    """
    import torch

    owners = (m for m in layer.modules() if any(p.ndim > 1 for p in m.parameters(recurse=False)))
    return all(isinstance(owner, torch.nn.Linear) for owner in owners)


def _largest_width(layer: torch.nn.Module) -> int:
    """Return the largest number of features of an activation that a matrix of the layer reads or writes."""
    return max((max(p.shape) for p in layer.parameters() if p.ndim > 1), default=0)


def named_linears(
    name: str, module: torch.nn.Module, tied: Mapping[str, str]
) -> dict[str, tuple[str, torch.nn.Linear]]:
    """Return linear layers below `module`, called `name`: path and layer by the stored name of the weight."""
    import torch

    prefix = f"{name}." if name else ""
    linears = {}
    for path, each in module.named_modules():
        if isinstance(each, torch.nn.Linear):
            weight = f"{prefix}{path}.weight"
            linears[tied.get(weight, weight)] = (f"{prefix}{path}", each)
    return linears


def _place(model: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    owner, _, key = name.rpartition(".")
    model.get_submodule(owner)._parameters[key] = parameter


def _at(states: list[Any] | None, index: int) -> Any:
    return None if states is None else states[index]


class StopCallError(Exception):
    """Raised to end a call of the model once its task has what it needs."""


class _PassOn:
    """Replace a layer's forward by one that returns the hidden states unchanged."""

    def __init__(self, as_tuple: bool) -> None:
        self.as_tuple = as_tuple

    def __call__(self, hidden_states: Any, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if self.as_tuple else hidden_states


@contextmanager
def replacing_input(layer: torch.nn.Module, state: Any) -> Iterator[None]:
    """Give `layer` `state` as its hidden states within this context; None leaves its input unchanged."""

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
    """End calls of the model behind `layer` within this context; yield its hidden states and its result."""
    seen: list[tuple[Any, Any]] = []

    def stop(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], result))
        raise StopCallError

    handle = layer.register_forward_hook(stop, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
