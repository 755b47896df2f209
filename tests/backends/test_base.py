"""A backend is asked what it does, never which one it is."""

import ast
from pathlib import Path

import pytest

from tests.test_architecture import PACKAGE, ROOT, part_of

#: What tells backends apart: fields of a target and of a manifest, and the graph that one of them asks for.
KIND = {"backend", "engine", "engines", "kernels", "provider", "static_cache"}


def questions_of_kind(file: Path) -> list[str]:
    """Comparisons and tests of what tells backends apart."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        tests: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            tests = [node.left, *node.comparators]
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            tests = [node.test]
        elif isinstance(node, ast.BoolOp):
            tests = list(node.values)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            tests = [node.operand]
        for test in tests:
            if isinstance(test, ast.Attribute) and test.attr in KIND:
                found.append(f"{file.relative_to(ROOT)}:{test.lineno}: {ast.unparse(test)}")
    return found


def test_no_one_asks_a_backend_which_it_is() -> None:
    # artifact/ validates its own records; runtime/, passes/ and validate/ ask a graph how its KV cache grows.
    outside = {"backends", "config", "artifact"}
    graphs = {"runtime", "passes", "validate", "graph"}
    found = []
    for file in PACKAGE.rglob("*.py"):
        if part_of(file) not in outside:
            asked = questions_of_kind(file)
            found += [q for q in asked if part_of(file) not in graphs or not q.endswith(".static_cache")]
    assert found == []


def test_the_rule_sees_a_question_of_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bad.py"
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    file.write_text("a = target.engine\nb = f(target.engine)\n")
    assert questions_of_kind(file) == []
    file.write_text("if target.kernels == 'compiled' or not m.engines or (x and t.backend is B): pass\n")
    assert {q.split()[-1] for q in questions_of_kind(file)} == {"m.engines", "target.kernels", "t.backend"}
