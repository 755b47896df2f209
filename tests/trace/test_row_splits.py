"""Rows split by sizes that a step computes, as code for mixtures of experts does."""

from collections.abc import Sequence

import pytest
import torch

from llmc.errors import UnsupportedError
from llmc.trace.capture import capturing
from llmc.trace.failure import check_splits
from llmc.trace.row_splits import splitting_by_computed_sizes

EXPERTS, WIDTH = 3, 4


class _Sorted(torch.nn.Module):
    """Sends every row of x to one expert, as sparse experts do."""

    def __init__(self, *, join: bool = True, axis: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
        self.join, self.axis = join, axis

    def parts(self, x: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
        return torch.split(x, sizes, dim=0) if self.axis == 0 else x.T.split(sizes, self.axis)

    def forward(self, x: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        sizes = torch.zeros(EXPERTS, dtype=torch.long).index_add(0, choice, torch.ones_like(choice)).tolist()
        order = choice.argsort()
        parts = self.parts(x[order], sizes)
        if self.axis:
            return torch.cat([part.T for part in parts])
        results = [torch.nn.functional.linear(part, self.weight[i]) for i, part in enumerate(parts)]
        if not self.join:
            return results[0]
        return torch.zeros_like(x).index_add(0, order, torch.cat(results, dim=0))


def _export(model: torch.nn.Module) -> torch.export.ExportedProgram:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
            with splitting_by_computed_sizes():
                return self.model(x, choice)  # type: ignore[no-any-return]

    rows = torch.export.Dim("rows")
    example = (torch.randn(5, WIDTH), torch.tensor([0, 2, 2, 1, 0]))
    with capturing():
        return torch.export.export(Step(), example, dynamic_shapes=({0: rows}, {0: rows}), strict=False)


@pytest.mark.parametrize("choice", [[2, 0, 1, 0, 2, 2, 1], [1, 1, 1], [2, 0]])
def test_every_row_has_the_result_of_its_part(choice: list[int]) -> None:
    model = _Sorted()
    x, chosen = torch.randn(len(choice), WIDTH), torch.tensor(choice)
    torch.testing.assert_close(_export(model).module()(x, chosen), model(x, chosen))


def test_parts_that_are_not_concatenated_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="does not concatenate the parts"):
        _export(_Sorted(join=False))


def test_parts_of_another_axis_are_refused_by_their_module() -> None:
    model = _Sorted(axis=1)
    with pytest.raises(UnsupportedError, match="splits tokens in model into parts whose sizes depend"):
        check_splits(model, _export(model))
