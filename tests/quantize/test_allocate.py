"""Allocations against trying all of them."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.errors import ConfigError
from llmc.quantize.allocate import PricedScheme, allocate
from tests.quantize.reference import scheme

CHOICES = (scheme(4, 128, True), scheme(4, 32, False), scheme(8, 128, True))


@st.composite
def candidates(draw: st.DrawFn) -> dict[str, list[PricedScheme]]:
    count = draw(st.integers(1, 5))
    return {
        f"w{i}": [
            PricedScheme(choice, draw(st.integers(1, 10**6)), draw(st.floats(1e-6, 1.0)))
            for choice in CHOICES
        ]
        for i in range(count)
    }


@settings(max_examples=50, deadline=None)
@given(candidates(), st.floats(0.0, 1.0))
def test_nothing_within_the_budget_is_better(given_: dict[str, list[PricedScheme]], part: float) -> None:
    everything = list(itertools.product(*given_.values()))
    sizes = [sum(c.bytes for c in each) for each in everything]
    prices = [sum(c.kl for c in each) for each in everything]
    most_bytes = min(sizes) + part * (max(sizes) - min(sizes))
    found = allocate(given_, most_bytes=most_bytes)
    assert list(found) == list(given_)
    assert sum(c.bytes for c in found.values()) <= most_bytes * (1 + 1e-6)
    best = min(p for p, s in zip(prices, sizes, strict=True) if s <= most_bytes)
    assert sum(c.kl for c in found.values()) <= best * 1.01 + 1e-6
    most_kl = min(prices) + part * (max(prices) - min(prices))
    found = allocate(given_, most_kl=most_kl)
    assert sum(c.kl for c in found.values()) <= most_kl * (1 + 1e-6)
    fewest = min(s for p, s in zip(prices, sizes, strict=True) if p <= most_kl)
    assert sum(c.bytes for c in found.values()) <= fewest * 1.01 + 1


def test_the_nearest_is_said_where_none_fits() -> None:
    given_ = {n: [PricedScheme(c, 100 * (i + 1), 0.5**i) for i, c in enumerate(CHOICES)] for n in "ab"}
    with pytest.raises(ConfigError, match="within 150 bytes; the nearest needs 200"):
        allocate(given_, most_bytes=150)
    with pytest.raises(ConfigError, match=r"within 0\.1 nats per token; the nearest needs 0\.5"):
        allocate(given_, most_kl=0.1)
