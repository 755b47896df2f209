"""Complex numbers as pairs of real tensors: the numbers of torch, and refusals by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from llmc.errors import UnsupportedError
from llmc.trace.pairs import check_real, pair_class, pairs_for_complex

Tensor = torch.Tensor


def rotate(x: Tensor, angles: Tensor) -> Any:
    turns = torch.polar(torch.ones_like(angles), angles) * 1.5
    numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(numbers * turns[None, :, None].to(x.device)).flatten(3).type_as(x)


def compute(x: Tensor, angles: Tensor) -> Any:
    turns = torch.exp(1j * angles)
    numbers = torch.complex(x[..., 0::2], x[..., 1::2])
    product = turns.conj()[:, None] * numbers / 2 + numbers - turns[:, None]
    both = torch.cat([product, -product], -1)
    return both.real, torch.imag(both), both.abs(), both.angle(), (2.0 / (1 + product * product)).imag


def mix(x: Tensor, angles: Tensor) -> Any:
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2))).transpose(1, 2).transpose(2, 1)
    turned = torch.view_as_real(x[..., :4] * numbers + 1).flatten(-2)
    first, second = numbers.to(torch.complex64).chunk(2, dim=-1)
    return turned, (1 - first).imag, (second * (2 + 1j)).real, (1j * first).real, numbers.is_complex()


@pytest.mark.parametrize("function", [rotate, compute, mix])
def test_pairs_have_the_numbers_of_torch(function: Callable[[Tensor, Tensor], Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 8, generator=generator)
    angles = torch.randn(3, 4, generator=generator)
    expected = pytree.tree_leaves(function(x, angles))
    with pairs_for_complex():
        found = pytree.tree_leaves(function(x, angles))
    assert not any(torch.is_tensor(value) and value.is_complex() for value in found)
    torch.testing.assert_close(found, expected)


def test_a_pair_is_two_tensors_to_what_walks_arguments() -> None:
    with pairs_for_complex():
        numbers = torch.polar(torch.ones(3), torch.arange(3.0))
    leaves, spec = pytree.tree_flatten({"numbers": numbers})
    assert [leaf.dtype for leaf in leaves] == [torch.float32] * 2
    again = pytree.tree_unflatten(leaves, spec)["numbers"]
    assert isinstance(again, pair_class())
    assert (again.shape, again.dtype, len(again)) == (torch.Size([3]), torch.complex64, 3)


def test_a_function_that_pairs_do_not_have_is_refused_by_name() -> None:
    with pairs_for_complex():
        numbers = torch.polar(torch.ones(3), torch.ones(3))
        with pytest.raises(UnsupportedError, match="the model applies cumsum to complex numbers"):
            numbers.cumsum(0)
        with pytest.raises(UnsupportedError, match=r"converts complex numbers to torch\.float32"):
            numbers.to(torch.float32)


def test_complex_numbers_that_remain_are_refused_by_name() -> None:
    class Spectrum(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(x).real

    program = torch.export.export(torch.nn.Sequential(Spectrum()), (torch.ones(4),), strict=False)
    with pytest.raises(UnsupportedError, match=r"fft.* in 0 computes with complex numbers"):
        check_real(program)


def test_complex_tables_of_a_tower_that_is_not_called_are_left_out() -> None:
    class Tower(torch.nn.Linear):
        table: Tensor

    model = Tower(4, 4)
    model.register_buffer("table", torch.ones(3, dtype=torch.complex64))
    program = torch.export.export(model, (torch.ones(1, 4),), strict=False)
    assert any(node.name == "b_table" for node in program.graph.nodes)
    check_real(program)
