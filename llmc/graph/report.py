"""Report a pass's run: where it applied, and where it declined and why."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """One place where a pass almost applied.

    Args:
        code: Stable identifier of the reason, such as `value-width`; targets may accept it.
        reason: The reason, with its values.
        node: Name of the node.
        layer: Decoder layer of the node; None outside the layers.
    """

    code: str
    reason: str
    node: str
    layer: int | None


@dataclass(frozen=True)
class PassReport:
    """The result of one pass over one graph.

    Args:
        name: Name of the pass.
        applied: The layer of every application, None outside the layers.
        refusals: Places where the pass almost applied.
        layers: Layers that have what the pass is for; None for all.
    """

    name: str
    applied: tuple[int | None, ...]
    refusals: tuple[Refusal, ...] = ()
    layers: frozenset[int] | None = None

    def in_layer(self, layer: int, accept: tuple[str, ...] = ()) -> int:
        """Count the applications in `layer`, including refusals with accepted codes."""
        declined = sum(r.layer == layer and r.code in accept for r in self.refusals)
        return self.applied.count(layer) + declined
