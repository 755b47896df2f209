"""The document that `benchmarks/architectures.py` writes about every type."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from common.architecture_rows import (
    CRASHED,
    DIFFERENT,
    EQUAL,
    NO_MODEL,
    REFUSED,
    ROUNDED,
    Result,
    Row,
    describe_capture,
    read_rows,
    render_document,
    totals,
    write_rows,
)

TARGETS = ("cpu-fp32", "cpu-int4")
ROWS = [
    Row("whole", "3 of 32", [], "3 CachedAttention", {"cpu-fp32": Result(EQUAL, "1e-6 in decode.max_abs")}),
    Row("partial", "3 of 8", ["TinyExperts"], "plain operators", {"cpu-fp32": Result(EQUAL, "0")}),
    Row("rounded", "3 of 8", [], "", {"cpu-fp32": Result(ROUNDED, "3e-4 in decode.max_abs")}),
    Row("wrong", "3 of 8", [], "", {"cpu-fp32": Result(DIFFERENT, "2e+0 in ragged.max_abs")}),
    Row("stateful", "3 of 8", [], "", {"cpu-fp32": Result(REFUSED, "OneForCausalLM keeps 3 states")}),
    Row("recurrent", "3 of 8", [], "", {"cpu-fp32": Result(REFUSED, "TwoForCausalLM keeps 4 states")}),
    Row("huge", "", [], "", {"cpu-fp32": Result(NO_MODEL, "ValueError: a | b")}),
    Row("silent"),
]


def section(document: str, title: str) -> str:
    return document.split(f"# {title}\n", 1)[1].split("\n#", 1)[0]


def test_the_count_leaves_out_what_was_not_tried_and_names_what_is_partial() -> None:
    assert totals(ROWS) == (
        "8 types, 7 of which can be made tiny; 3 are built and equal (43%): "
        "1 of them but for rounding, 2 of them with every kind of layer of their default config."
    )


def test_causal_models_are_counted_apart() -> None:
    document = render_document("a machine", ROWS, TARGETS, {"whole", "wrong"})
    assert "- Causal LM: 2 types, 2 of which can be made tiny; 1 are built and equal (50%)" in document


def test_every_type_stands_in_one_table_of_outcomes() -> None:
    document = render_document("a machine", ROWS, TARGETS, {"whole", "wrong"})
    without = "Types without a tiny model that PyTorch runs on text alone"
    tables = [section(document, title) for title in ("Built", "By type", without)]
    for row in ROWS:
        assert [f"\n| {row.type} |" in table for table in tables].count(True) == 1
    assert "| partial | TinyExperts |" in section(document, "Kinds of layers that the tiny model lacks")
    assert "| huge | ValueError: a \\| b |" in tables[2]
    assert f"| silent |  | {CRASHED} | no answer |" in tables[1]


def test_refusals_that_differ_by_a_name_and_a_number_have_one_cause() -> None:
    assert "| 2 | … keeps N states |" in section(
        render_document("a machine", ROWS, TARGETS, {"whole", "wrong"}), "By cause"
    )


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json", "a machine", ROWS)
    assert list(read_rows(tmp_path / "rows.json").values()) == ROWS


def test_what_is_computed_in_plain_operators_is_named() -> None:
    operators = {"llmc::CachedAttention": 3, "MatMul": 20}
    notes = ["experts traced as dense products in 3 layers, kept in float: clamped", "a batch is padded left"]
    assert describe_capture(operators, notes) == "3 CachedAttention; experts as dense products"
    notes = ["attention is traced as the model computes it: it has biases"]
    assert describe_capture({"MatMul": 20}, notes) == "attention in plain operators"
    assert describe_capture({"MatMul": 20}, []) == "plain operators"
