"""The programs in benchmarks/: each is listed, and built on what they share."""

import ast
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
PROGRAMS = sorted(FOLDER.glob("*.py"))


def test_the_readme_lists_every_program() -> None:
    listed = re.findall(r"^\| `python benchmarks/(\w+\.py)", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == [file.name for file in PROGRAMS]


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: str(file.name))
def test_a_program_shares_its_command_line_and_is_imported_by_no_other(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = {node.module: node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "make_parser" in [alias.name for alias in imported["common.options"].names]
    assert not set(imported) & {other.stem for other in PROGRAMS}
