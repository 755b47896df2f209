"""Marking the layers of a model and folding runs of stubs, on stacks that torch.export really traces."""

from collections import UserDict
from types import SimpleNamespace

import pytest
import torch

from llmc.trace.stamp import NotStampableError, RepeatedLayerError, find_layers, fold_runs, mark_layers


class Layer(torch.nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(hidden)
        return result


class Stack(torch.nn.Module):
    """Layers in a row; `also` is a layer whose result is added to the last one's."""

    def __init__(self, layers: int, also: int | None) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(i) for i in range(layers))
        self.also = also

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        results = []
        for layer in self.layers:
            hidden = layer(hidden)
            results.append(hidden)
        return hidden if self.also is None else hidden + results[self.also]


def export(model: torch.nn.Module) -> torch.export.ExportedProgram:
    mark_layers(model, find_layers(model, SimpleNamespace(), stamp=True))
    with torch.no_grad():
        return torch.export.export(model, (torch.zeros(2, 4),), strict=False)


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_a_run_of_stubs_is_one_node(layers: int) -> None:
    program = export(Stack(layers, None))
    fold_runs(program)
    program.graph.lint()
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("neg" in target for target in targets) == 0
    assert sum("symbolic_multi_out" in target for target in targets) == min(layers, 2) + 1


def test_a_result_inside_of_a_run_that_is_used_again_is_noticed() -> None:
    with pytest.raises(NotStampableError, match="a result of layers 1 to 5 has another use"):
        fold_runs(export(Stack(6, 3)))


def test_the_results_at_the_ends_of_a_run_may_be_used_again() -> None:
    fold_runs(export(Stack(6, 0)))


class Sharing(torch.nn.Module):
    """Layers that read what others store: each of them, or a store before the last."""

    def __init__(self, *, by_layers: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(SharingLayer(i, stores=by_layers) for i in range(3))
        self.by_layers = by_layers

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        stored = UserDict({"keys": hidden})
        for layer in self.layers:
            if layer.layer_idx == 2 and not self.by_layers:
                stored["keys"] = hidden
            hidden = layer(hidden, stored)
        return hidden


class SharingLayer(Layer):
    def __init__(self, index: int, *, stores: bool) -> None:
        super().__init__(index)
        self.stores = stores

    def forward(self, hidden: torch.Tensor, stored: UserDict[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        result: torch.Tensor = self.linear(hidden) + stored["keys"]
        if self.stores:
            stored["keys"] = result
        return result


@pytest.mark.parametrize(
    ("by_layers", "message"),
    [
        (True, "layer 0 stores values that later layers read"),
        (False, "layers 0 and 2 read different stored values"),
    ],
)
def test_layers_that_pass_values_on_by_a_container_are_not_stamped(by_layers: bool, message: str) -> None:
    with pytest.raises(NotStampableError, match=message):
        export(Sharing(by_layers=by_layers))


class Looping(Stack):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(hidden))


@pytest.mark.parametrize("layers", [1, 3])
def test_a_layer_that_runs_again_is_noticed(layers: int) -> None:
    with pytest.raises(RepeatedLayerError, match="layer 0 runs several times in one step"):
        export(Looping(layers, None))
