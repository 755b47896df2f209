"""Copies of a server's own loader are recorded as boxes; vLLM itself is run by a benchmark."""

from collections.abc import Callable

import pytest
import torch

from llmc.servers.vllm_layout import Copies, NotCopiedError, box_of, storage

Load = Callable[[torch.Tensor, torch.Tensor], object]


def record(load: Load, shape: tuple[int, ...] = (6, 4), source: tuple[int, ...] = (8, 4)) -> list[object]:
    """Boxes that `load(parameter, tensor)` copies, on the device `meta`."""
    parameter = torch.nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
    tensor = torch.empty(source, device="meta")
    with Copies({storage(tensor): ("w", source)}, {"p": parameter}) as copies:
        load(parameter, tensor)
    return [tuple(tuple(part) for part in list(each.values())[1:]) for each in copies.pieces["p"].values()]


def test_slices_of_a_fused_matrix_are_boxes() -> None:
    def load(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
        parameter.data.narrow(0, 2, 4).copy_(tensor.narrow(0, 4, 4))
        parameter.data[:2].copy_(tensor[0:2])

    assert record(load) == [((4, 0), (4, 4), (2, 0), (4, 4)), ((0, 0), (2, 4), (0, 0), (2, 4))]


def test_columns_and_vectors_are_boxes() -> None:
    assert record(lambda p, t: p.data.copy_(t[2:, 4:]), (6, 4), (8, 8)) == [((2, 4), (6, 4), (0, 0), (6, 4))]
    assert record(lambda p, t: p.data[1].copy_(t), (3,), ()) == [((), (), (1,), (1,))]
    assert record(lambda p, t: p.data.copy_(t.squeeze(1)), (8,), (8, 1)) == [((0, 0), (8, 1), (0,), (8,))]


def test_a_later_copy_replaces_the_earlier() -> None:
    def load(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
        parameter.data.copy_(tensor[:6])
        parameter.data.copy_(tensor[2:])

    assert record(load) == [((2, 0), (6, 4), (0, 0), (6, 4))]


def test_padding_is_no_piece() -> None:
    def load(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
        parameter.data[:4].copy_(tensor[:4])
        parameter.data[4:].fill_(0)

    assert len(record(load)) == 1


def test_a_scalar_that_is_read_has_a_value() -> None:
    parameter = torch.nn.Parameter(torch.empty(1, device="meta"), requires_grad=False)
    with Copies({}, {"p": parameter}) as copies:
        parameter.data.fill_(0.5)
    assert copies.values == {"p": [0.5]}


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (lambda p, t: p.data.copy_(t[:6] * 2), "is computed by copy_"),
        (lambda p, t: p.data.copy_(t.reshape(4, 8).T[:6]), "another order"),
        (lambda p, t: p.data.fill_(1), "is computed by fill_"),
        (lambda p, t: p.data.add_(t[:6]), "is computed by add_"),
        (lambda p, t: p.data.copy_(t[:1]), "repeats w"),
    ],
)
def test_what_is_not_copied_is_refused(load: Load, reason: str) -> None:
    with pytest.raises(NotCopiedError, match=reason):
        record(load)


def test_rows_with_steps_are_no_box() -> None:
    with pytest.raises(NotCopiedError, match="another order"):
        box_of(torch.empty(8, 4)[::2], (8, 4))
