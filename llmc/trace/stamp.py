"""Trace one layer of each kind, and stamp the other layers out from it.

While a model is traced, the first decoder layer of each kind runs between two marker nodes (`LayerBegin`,
`LayerEnd`), and every other layer of that kind is a `LayerStub` with the same inputs. Consecutive stubs form
one node, and a negation represents the result of each stub but the last, because tracing spends most of its
time on nodes with many outputs. `llmc.trace.expand` then replaces each stub by a copy of the nodes between
the markers, with that layer's weights. Two layers are of one kind if their modules have the same classes,
parameters, plain attributes and per-layer configuration.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmc.architecture import language_model
from llmc.graph.domains import TRACE
from llmc.trace.layer_index import COMPARISONS, LayerIndex

if TYPE_CHECKING:
    import torch

BEGIN, END, STUB = "LayerBegin", "LayerEnd", "LayerStub"


class NotStampableError(Exception):
    """Layers that look alike behave differently, so the model has to be traced in full."""


class RepeatedLayerError(NotStampableError):
    """A layer runs several times a step, so that no pair of markers can enclose it."""


@dataclass(frozen=True)
class LayerStack:
    """The decoder layers of a model: the names of their modules and their kinds.

    Args:
        names: Qualified module name of each layer, such as `model.layers.0`.
        indices: The index by which each layer addresses the KV cache.
        representatives: For each layer, the index of the first layer of its kind.
    """

    names: tuple[str, ...]
    indices: tuple[int, ...]
    representatives: tuple[int, ...]


#: The layers of a model whose layers are not marked.
NO_LAYERS = LayerStack((), (), ())


@dataclass
class _Call:
    """The arguments and the result of a call to a representative.

    Args:
        held: What `_held_by` found in the arguments before the call.
    """

    arguments: tuple[Any, ...]
    argument_spec: Any
    held: list[dict[Any, Any]]
    result: tuple[Any, ...]
    result_spec: Any


@dataclass
class _Run:
    """A run of consecutive stubs called so far; the last call becomes a node for all of them.

    Args:
        indices: Layers called so far.
        operands: For each of their tensors, its position in `tensors`, or -1 for the previous layer's result.
        counts: Number of operands of each layer.
        tensors: Tensors that they are called with, except results of layers in the run.
        results: Stand-in for the result of each layer: a negation, which export keeps as a node.
    """

    indices: list[int] = field(default_factory=list)
    operands: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)

    def call(self, index: int, leaves: Any) -> None:
        """Record the call of one more layer."""
        mine = _tensors(leaves)
        for tensor in mine:
            if self.results and tensor is self.results[-1]:
                self.operands.append(-1)
                continue
            if any(tensor is result for result in self.results):
                raise NotStampableError(
                    f"layer {index} takes the result of a layer that is not the one before it"
                )
            position = next((n for n, t in enumerate(self.tensors) if t is tensor), None)
            if position is None:
                position = len(self.tensors)
                self.tensors.append(tensor)
            self.operands.append(position)
        self.indices.append(index)
        self.counts.append(len(mine))

    def attributes(self) -> dict[str, list[int]]:
        """Return the run as attributes of its node."""
        return {"indices": self.indices, "operands": self.operands, "counts": self.counts}


def find_layers(model: torch.nn.Module, config: Any, *, stamp: bool) -> LayerStack:
    """Find the model's list of decoder layers and which of them are alike.

    A decoder layer is an element of the longest `ModuleList` whose elements each address the cache by at most
    one index; an element that has no index, such as a layer of experts alone, has its position instead. If
    `stamp` is False, every layer is its own representative.
    """
    import torch

    longest: tuple[str, torch.nn.ModuleList, list[int]] | None = None
    inside = set(language_model(model).modules())
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or not len(module) or module not in inside:
            continue
        indices_by_layer = [_layer_indices(layer) for layer in module]
        if not any(indices_by_layer):
            continue
        owned = [next(iter(i), n) for n, i in enumerate(indices_by_layer) if len(i) <= 1]
        longer = longest is None or len(module) > len(longest[1])
        if longer and len(owned) == len(module) and len(set(owned)) == len(owned):
            longest = (name, module, owned)
    if longest is None:
        return NO_LAYERS
    name, layers, indices = longest
    first: dict[str, int] = {}
    representatives = []
    for i, layer in enumerate(layers):
        kind = _kind(layer, i, len(layers), config) if stamp else str(i)
        representatives.append(first.setdefault(kind, i))
    names = tuple(f"{name}.{key}" for key in layers._modules)
    return LayerStack(names, tuple(indices), tuple(representatives))


def mark_layers(model: torch.nn.Module, stack: LayerStack) -> None:
    """Replace every layer's forward by its marked or stubbed form, for one trace of `model`."""
    calls: dict[int, _Call] = {}
    run = _Run()
    LayerIndex.computed = []
    ran: set[int] = set()
    model.register_forward_pre_hook(lambda *_: ran.clear())
    stubbed = [r != i for i, r in enumerate(stack.representatives)]
    for i, (name, representative) in enumerate(zip(stack.names, stack.representatives, strict=True)):
        layer = model.get_submodule(name)
        if representative == i:
            if stack.representatives.count(i) > 1:
                for module in layer.modules():
                    own = getattr(module, "layer_idx", None)
                    if isinstance(own, int):
                        module.layer_idx = LayerIndex(own)  # type: ignore[assignment]
            layer.forward = _marked(layer.forward, i, calls, alone=stack.representatives.count(i) == 1)
        else:
            first, last = not stubbed[i - 1], not any(stubbed[i + 1 : i + 2])
            layer.forward = _stub(i, representative, calls, run, first=first, last=last)
            for module in layer.modules():  # export takes time for each, used or not
                module._parameters.clear()
                module._buffers.clear()
        layer.forward = _once(layer.forward, i, ran)


def _once(forward: Callable[..., Any], index: int, ran: set[int]) -> Callable[..., Any]:
    """Return `forward`, except that it fails if `ran` says that layer `index` ran before."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if index in ran:
            raise RepeatedLayerError(f"layer {index} runs several times in one step")
        ran.add(index)
        return forward(*args, **kwargs)

    return run


def fold_runs(program: torch.export.ExportedProgram) -> None:
    """Remove the negations from a traced program once they have served; every node costs time later.

    Raises:
        NotStampableError: The result of a layer inside a run is used by more than the next layer.
    """
    import torch

    for node in list(program.graph.nodes):
        if node.target is not torch.ops.onnx_symbolic._symbolic_multi_out.default or node.args[1] != STUB:
            continue
        tensors, *rest = node.args
        keys, places, numbers = (node.kwargs[f"attr_{part}"] for part in ("keys", "pos", "ints"))
        indices = numbers[slice(*places[keys.index("indices")])]
        links: list[Any] = []
        for _ in indices[1:]:
            link = links[-1].args[0] if links else tensors[0]
            if link.target is not torch.ops.aten.neg.default or len(link.users) != 1:
                raise NotStampableError(f"a result of layers {indices[0]} to {indices[-1]} has another use")
            links.append(link)
        if links:
            node.args = (tensors[1:], *rest)
        for link in links:
            program.graph.erase_node(link)
    program.graph_module.recompile()


def check_indices(*, compared: bool = False) -> None:
    """Raise NotStampableError if a layer's forward computed with its index.

    Args:
        compared: Whether code may compare the index, such as a cache that is asked for a layer.
    """
    if set(LayerIndex.computed) - (COMPARISONS if compared else set()):
        raise NotStampableError("a layer's code computes with its layer index")


def _marked(
    forward: Callable[..., Any], index: int, calls: dict[int, _Call], *, alone: bool
) -> Callable[..., Any]:
    from torch.utils import _pytree as pytree

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inputs = _tensors(leaves)
        marked = _emit(BEGIN, inputs, [(t.dtype, t.shape) for t in inputs], index)
        replaced = {id(t): new for t, new in zip(inputs, marked, strict=True)}
        new_args, new_kwargs = pytree.tree_unflatten([replaced.get(id(x), x) for x in leaves], spec)
        held = _held_by(leaves)
        result = forward(*new_args, **new_kwargs)
        if not alone and _ids(_held_by(leaves)) != _ids(held):
            raise NotStampableError(f"layer {index} stores values that later layers read")
        out_leaves, out_spec = pytree.tree_flatten(result)
        outputs = _tensors(out_leaves)
        marked_outputs = _emit(END, outputs, [(t.dtype, t.shape) for t in outputs], index)
        swapped = {id(t): new for t, new in zip(outputs, marked_outputs, strict=True)}
        calls[index] = _Call(tuple(leaves), spec, held, tuple(out_leaves), out_spec)
        return pytree.tree_unflatten([swapped.get(id(x), x) for x in out_leaves], out_spec)

    return run


def _stub(
    index: int, representative: int, calls: dict[int, _Call], row: _Run, *, first: bool, last: bool
) -> Callable[..., Any]:
    from torch.utils import _pytree as pytree

    def run(*args: Any, **kwargs: Any) -> Any:
        call = calls.get(representative)
        if call is None:
            raise NotStampableError(f"layer {index} runs before layer {representative}, which it resembles")
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != call.argument_spec or len(leaves) != len(call.arguments):
            raise NotStampableError(
                f"layers {representative} and {index} are called with different arguments"
            )
        for mine, theirs in zip(leaves, call.arguments, strict=True):
            if not _alike(mine, theirs):
                raise NotStampableError(
                    f"layers {representative} and {index} are called with different values"
                )
        if _ids(_held_by(leaves)) != _ids(call.held):
            raise NotStampableError(f"layers {representative} and {index} read different stored values")
        if _aliasing(leaves) != _aliasing(call.arguments):
            raise NotStampableError(f"layers {representative} and {index} share different arguments")
        outputs = _tensors(call.result)
        if first:
            row.__init__()  # type: ignore[misc]
        row.call(index, leaves)
        like = next((t for t in _tensors(leaves) if _alike(t, outputs[0])), None)
        if last or len(outputs) != 1 or like is None:
            chain = row.results[-1:]
            sizes = [(t.dtype, t.shape) for t in outputs]
            stand_ins = _emit(STUB, [*chain, *row.tensors], sizes, index, row.attributes())
            row.__init__()  # type: ignore[misc]
        else:
            stand_ins = (-like,)
            row.results.append(stand_ins[0])
        swapped = {id(t): new for t, new in zip(outputs, stand_ins, strict=True)}
        return pytree.tree_unflatten([swapped.get(id(x), x) for x in call.result], call.result_spec)

    return run


def _emit(
    kind: str,
    inputs: list[Any],
    outputs: list[tuple[Any, Any]],
    index: int,
    run: dict[str, list[int]] | None = None,
) -> tuple[Any, ...]:
    import torch

    if not outputs:
        raise NotStampableError(f"layer {index} takes or returns no tensor")
    tensors = torch.onnx.ops.symbolic_multi_out(
        f"{TRACE}::{kind}",
        inputs,
        attrs={"index": index, **(run or {})},
        dtypes=[dtype for dtype, _ in outputs],
        shapes=[shape for _, shape in outputs],
        version=1,
    )
    return tuple(tensors)


def _held_by(leaves: Any) -> list[dict[Any, Any]]:
    """Copy the containers among `leaves` by which layers pass values on to later layers."""
    return [dict(leaf) for leaf in leaves if isinstance(leaf, MutableMapping)]


def _ids(held: list[dict[Any, Any]]) -> list[dict[Any, list[int]]]:
    from torch.utils import _pytree as pytree

    return [{key: [id(x) for x in pytree.tree_leaves(value)] for key, value in h.items()} for h in held]


def _tensors(leaves: Any) -> list[Any]:
    """List the distinct tensors among `leaves`, in order of first appearance."""
    import torch

    distinct: dict[int, Any] = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            distinct.setdefault(id(leaf), leaf)
    return list(distinct.values())


def _aliasing(leaves: Any) -> list[int]:
    """Return, for each tensor leaf, the position of its first appearance."""
    import torch

    first: dict[int, int] = {}
    return [first.setdefault(id(x), n) for n, x in enumerate(leaves) if isinstance(x, torch.Tensor)]


def _alike(mine: Any, theirs: Any) -> bool:
    import torch

    if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return mine.dtype == theirs.dtype and [str(d) for d in mine.shape] == [str(d) for d in theirs.shape]
    if mine is theirs:
        return True
    if isinstance(mine, (bool, int, float, str)):
        return type(mine) is type(theirs) and bool(mine == theirs)
    return False


def _layer_indices(module: torch.nn.Module) -> set[int]:
    indices = {getattr(m, "layer_idx", None) for m in module.modules()}
    return {int(i) for i in indices if isinstance(i, int)}


def _kind(layer: torch.nn.Module, index: int, count: int, config: Any) -> str:
    """Compute a digest of every property of a layer that can affect its trace."""
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        digest.update(repr(parts).encode())

    for name, module in layer.named_modules():
        add("module", name, type(module).__module__, type(module).__qualname__)
        for key, parameter in module._parameters.items():
            add(key, None if parameter is None else (tuple(parameter.shape), parameter.dtype))
        for key, buffer in module._buffers.items():
            add(key, None if buffer is None else (tuple(buffer.shape), buffer.dtype))
        for key, value in sorted(vars(module).items()):
            if key != "layer_idx" and _is_plain(value):
                add(key, value)
    for key, value in sorted(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == count:
            add("config", key, value[index])
    return digest.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))
