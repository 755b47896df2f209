"""Transform graphs with passes: one fusion or lowering per module, each with one object called `PASS`.

A pass mutates the graph that it is given and returns a `PassReport`: how often it applied, and the reason for
each place where it almost applied.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from functools import cache
from typing import Protocol

from llmc.config import PassSpec
from llmc.errors import ConfigError, GraphError, UnsupportedError, did_you_mean
from llmc.graph.model import Graph
from llmc.graph.report import PassReport
from llmc.graph.verify import verify_graph


class Pass(Protocol):
    """One transformation of a graph."""

    @property
    def name(self) -> str:
        """The name that targets use, such as `group-query-attention`."""
        ...

    @property
    def summary(self) -> str:
        """A one-line description."""
        ...

    def run(self, graph: Graph) -> PassReport:
        """Transform `graph` in place."""
        ...


@cache
def registered_passes() -> dict[str, Pass]:
    """Return every pass in this package by name; a module that fails to import is an error."""
    passes: dict[str, Pass] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{info.name}")
        item: Pass = module.PASS
        if item.name in passes:
            raise ConfigError(f"two passes are called {item.name}")
        passes[item.name] = item
    return passes


def resolve_passes(specs: Iterable[PassSpec]) -> list[tuple[Pass, PassSpec]]:
    """Return the passes that a target names, in its order.

    Raises:
        ConfigError: A name is not registered.
    """
    registered = registered_passes()
    resolved = []
    for spec in specs:
        if spec.name not in registered:
            raise ConfigError(f"there is no pass {spec.name!r}", hint=did_you_mean(spec.name, registered))
        resolved.append((registered[spec.name], spec))
    return resolved


def run_passes(
    graph: Graph, specs: Iterable[PassSpec], note: Callable[[PassReport], None] | None = None
) -> list[PassReport]:
    """Run a target's passes in order, verify the graph after each, and enforce the asserted counts.

    Args:
        graph: The graph; changed in place.
        specs: Passes and their expected counts.
        note: Called with each report when it is available.

    Raises:
        GraphError: A pass left an invalid graph; the message names it and the passes before it.
        UnsupportedError: A pass applied fewer or more times than the target asserts.
    """
    reports: list[PassReport] = []
    for item, spec in resolve_passes(specs):
        try:
            report = item.run(graph)
            verify_graph(graph)
        except GraphError as error:
            before = ", ".join(r.name for r in reports) or "none"
            raise GraphError(
                f"pass {item.name}: {error.fact} (passes before it: {before})", hint=error.hint
            ) from error
        reports.append(report)
        if note is not None:
            note(report)
        _check_counts(report, spec, graph.layers)
    return reports


def _check_counts(report: PassReport, spec: PassSpec, layers: int) -> None:
    refused = [r for r in report.refusals if r.code not in spec.accept]
    if refused:
        first = refused[0]
        raise UnsupportedError(
            f"pass {spec.name} declined at {len(refused)} places that the target does not accept, "
            f"first at {first.node}: {first.reason} [{first.code}]",
            hint=f"add {first.code} to the pass's `accept` in the target if this is acceptable",
        )
    if spec.per_layer is None:
        return
    least, most = (spec.per_layer, spec.per_layer) if isinstance(spec.per_layer, int) else spec.per_layer
    for layer in range(layers) if report.layers is None else sorted(report.layers):
        count = report.in_layer(layer, spec.accept)
        if not least <= count <= most:
            expected = str(least) if least == most else f"{least} to {most}"
            near = [f"{r.reason} [{r.code}]" for r in report.refusals if r.layer == layer]
            raise UnsupportedError(
                f"pass {spec.name} applied {count} times in layer {layer}; the target asks for {expected}",
                hint=f"it declined there: {'; '.join(near)}"
                if near
                else "nothing in that layer resembles its pattern",
            )
