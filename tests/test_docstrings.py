"""Docstrings speak of the parameters that there are."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_architecture import PACKAGE, ROOT


def described(docstring: str) -> list[str]:
    """Names in the section Args of a docstring, in order."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", docstring, re.MULTILINE)
    lines = re.findall(r"^    (\w+(?:, \w+)*):", section[1], re.MULTILINE) if section else []
    return [name for line in lines for name in line.split(", ")]


def parameters(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """Parameters of a function; of a class, those of its constructor and its fields."""
    if isinstance(node, ast.FunctionDef):
        a = node.args
        starred = [each for each in (a.vararg, a.kwarg) if each is not None]
        return {each.arg for each in (*a.posonlyargs, *a.args, *a.kwonlyargs, *starred)}
    fields = [n.target for n in node.body if isinstance(n, ast.AnnAssign)]
    names = {field.id for field in fields if isinstance(field, ast.Name)}
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name in ("__init__", "__new__"):
            names |= parameters(each)
    return names


def faults(file: Path) -> Iterator[str]:
    """Names that a docstring describes twice, or that are not a parameter."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names, known = described(ast.get_docstring(node) or ""), parameters(node)
            inherits = isinstance(node, ast.ClassDef) and not known
            wrong = {n for n in names if names.count(n) > 1 or (n not in known and not inherits)}
            yield from (f"{file.name}:{node.lineno}: {node.name}: {name}" for name in sorted(wrong))


@pytest.mark.parametrize("folder", [PACKAGE, ROOT / "benchmarks", ROOT / "tests"], ids=lambda f: f.name)
def test_docstrings_describe_parameters_that_exist(folder: Path) -> None:
    assert [fault for file in sorted(folder.rglob("*.py")) for fault in faults(file)] == []


def test_the_rule_sees_names_that_are_gone(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    entries = "".join(f"        {name}: A number.\n" for name in "aca")
    file.write_text(f'def f(a, *b):\n    """Add.\n\n    Args:\n{entries}    """\n')
    assert list(faults(file)) == ["bad.py:1: f: a", "bad.py:1: f: c"]
