"""Every figure has its row in the table, and what ships goes by it."""

import pytest

from llmc.catalog import list_targets
from llmc.config import Better, Metric
from llmc.config.metrics import DEFINITIONS


def test_every_metric_has_one_definition() -> None:
    assert list(DEFINITIONS) == list(Metric)


@pytest.mark.parametrize("listed", list_targets(), ids=lambda listed: listed.document.name)
def test_gates_bound_what_is_worse(listed: object) -> None:
    for gate in listed.document.gates:  # type: ignore[attr-defined]
        assert (gate.max is None) == (gate.metric.definition.better is Better.MORE), gate
