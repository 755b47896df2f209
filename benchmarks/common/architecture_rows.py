"""Keep what the sweep over architectures found for each type, and write it as a document."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

EQUAL, ROUNDED, DIFFERENT = "built and equal", "built, equal but for rounding", "built, not equal"
HELD, MISSED = "built, gates held", "built, gates missed"
REFUSED, CRASHED, NO_MODEL = "refused", "crashed", "no tiny model"
BUILT = (EQUAL, ROUNDED, DIFFERENT, HELD, MISSED)

INTRODUCTION = """\
# Architectures

`python benchmarks/architectures.py` writes this document; it is not edited by hand. The program builds a tiny
model with random weights of every type that transformers lists as causal LM or as image-text-to-text, the
latter from text alone. Its layers are the shortest prefix of the type's default config that has every kind of
layer (`tests/architectures.py`); what a type needs besides is listed in `tests/tiny_fields.py`.

For cpu-fp32, "equal" means that the artifact's logits are within 1e-4 of PyTorch's for a prompt, for the same
prompt in pieces, in cached decode, in a ragged batch and with a sliding window. "Equal but for rounding"
means that they are farther apart at some positions, and that changes of PyTorch's own results by a few units
in the last place of float32 move its logits as far there ([trust.md](trust.md)). Matrices have a deviation of
0.15, so that attention is far from uniform and an error shows.

Wanted types are built for two more targets under their own gates. There, whatever the type, matrices of the
layers have a deviation of 0.5 / sqrt(inputs), and the weights of their norms are halved (their medians in
SmolLM2-135M, which is trained, are 0.25 and 0.31). Where each of n products has noise of relative size e, the
logits then move by 0.1 to 0.6 e sqrt(n); in SmolLM2 they move by 0.7 e sqrt(n), and with the weights for
cpu-fp32 by 1 to 5 e sqrt(n): PyTorch in float32 is up to 5e-4 from itself in float64, routers and attention
decide near ties, and any rounding leads to another text. Logits are flatter than trained ones (deviation 1.2
instead of 3.5), so that a KL divergence does not forecast that of a trained model.

llmc itself has no list of types: a type that transformers adds later is traced like these.
"""


@dataclass
class Result:
    """The outcome of building one type for one target."""

    outcome: str
    detail: str


@dataclass
class Row:
    """What was found of one type.

    Args:
        layers: The layers that were kept, such as `4 of 48 layers`.
        lacks: Module classes and kinds of layers of the default model that the tiny one lacks.
        captured: The operators of the dialect, and what is computed in plain operators.
        results: Outcomes by target.
    """

    type: str
    layers: str = ""
    lacks: list[str] = field(default_factory=list)
    captured: str = ""
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def first(self) -> Result:
        """The result for the first target."""
        return next(iter(self.results.values()), Result(CRASHED, "no answer"))


def read_rows(file: Path) -> dict[str, Row]:
    """Read the rows that an earlier run wrote as JSON, by type."""
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        row["results"] = {name: Result(**result) for name, result in row["results"].items()}
    return {row["type"]: Row(**row) for row in rows}


def write_rows(file: Path, machine: str, rows: Iterable[Row]) -> None:
    """Write rows as JSON."""
    document = {"machine": machine, "rows": [asdict(row) for row in rows]}
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def totals(rows: Iterable[Row]) -> str:
    """State in a sentence how many types there are, can be made tiny, and are built and equal."""
    rows = list(rows)
    tiny = [row for row in rows if row.first.outcome != NO_MODEL]
    equal = [row for row in tiny if row.first.outcome in (EQUAL, ROUNDED)]
    rounded = [row for row in equal if row.first.outcome == ROUNDED]
    whole = [row for row in equal if not row.lacks]
    share = f" ({len(equal) / len(tiny):.0%})" if tiny else ""
    return (
        f"{len(rows)} types, {len(tiny)} of which can be made tiny; {len(equal)} are built and equal{share}: "
        f"{len(rounded)} of them but for rounding, "
        f"{len(whole)} of them with every kind of layer of their default config."
    )


def render_document(
    machine: str, rows: Iterable[Row], targets: Iterable[str], causal: Collection[str]
) -> str:
    """Return the whole document as Markdown.

    Args:
        causal: The types that transformers lists as causal LM; the others are image-text-to-text only.
    """
    rows, targets = sorted(rows, key=lambda row: row.type), list(targets)
    text = [row for row in rows if row.type in causal]
    tiny = [row for row in rows if row.first.outcome != NO_MODEL]
    built = [row for row in tiny if row.first.outcome in BUILT]
    others = [row for row in tiny if row not in built]
    outcomes = Counter(row.first.outcome for row in rows)
    causes = Counter(cause(row.first.detail) for row in others)
    sections = [
        INTRODUCTION,
        f"- All: {totals(rows)}\n- Causal LM: {totals(text)}\n\nMeasured on {machine}.\n",
        "## Totals\n",
        _table((f"outcome for {targets[0]}", "types"), outcomes.most_common()),
        "## Built\n",
        _table(
            ("type", "layers", "operators of the dialect; plain operators", *targets),
            [
                (r.type, r.layers, r.captured, *(_cell(r.results.get(target)) for target in targets))
                for r in built
            ],
        ),
        "## Refused\n\n### By cause\n",
        _table(("types", "cause"), [(count, text) for text, count in causes.most_common()]),
        "### By type\n",
        _table(("type", "layers", "outcome", "reason"), [_refusal(row) for row in others]),
        "## Kinds of layers that the tiny model lacks\n",
        _table(("type", "lacks"), [(row.type, ", ".join(row.lacks)) for row in tiny if row.lacks]),
        "## Types without a tiny model that PyTorch runs on text alone\n",
        _table(("type", "reason"), [(row.type, row.first.detail) for row in rows if row not in tiny]),
    ]
    return "\n".join(sections)


def cause(detail: str) -> str:
    """Return the part of a reason that does not depend on the type."""
    words = re.sub(r"; its attention is not captured either.*", "", detail)
    words = re.sub(r"\b[A-Z]\w*(Model|For\w+|Config|Attention\w*)\b", "…", words)
    return re.sub(r"\d+", "N", words).strip()


def _refusal(row: Row) -> tuple[str, str, str, str]:
    return row.type, row.layers, row.first.outcome, row.first.detail


def _cell(result: Result | None) -> str:
    return "" if result is None else f"{result.outcome}: {result.detail}"


def _table(head: Iterable[object], lines: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table; "None." if it has no lines."""
    head, lines = list(head), [list(line) for line in lines]
    if not lines:
        return "None.\n"
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(_escape(cell) for cell in row)} |\n" for row in rows)


def _escape(cell: object) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")


def describe_capture(operators: Mapping[str, int], notes: Iterable[str]) -> str:
    """Describe which operators of the dialect a canonical graph has, and what it computes in plain ones."""
    ours = {name.removeprefix("llmc::"): n for name, n in operators.items() if name.startswith("llmc::")}
    plain = [_PLAIN[start] for note in notes for start in _PLAIN if note.startswith(start)]
    named = ", ".join(f"{count} {name}" for name, count in sorted(ours.items()))
    return "; ".join(filter(None, [named, *plain])) or "plain operators"


_PLAIN = {
    "attention is traced as the model computes it": "attention in plain operators",
    "experts traced as dense products": "experts as dense products",
    "traced layer by layer": "traced layer by layer",
}
