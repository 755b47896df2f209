"""What ships goes by the table of metrics."""

import pytest

from llmc.catalog import list_targets
from llmc.config import Better


@pytest.mark.parametrize("listed", list_targets(), ids=lambda listed: listed.document.name)
def test_gates_bound_what_is_worse(listed: object) -> None:
    for gate in listed.document.gates:  # type: ignore[attr-defined]
        assert (gate.max is None) == (gate.metric.better is Better.MORE), gate
