"""Every pass is found by its module, and has a file of tests beside its name."""

import ast
from pathlib import Path

import pytest

import llmc.passes
from llmc.passes import registered_passes

MODULES = sorted(
    file.stem for file in Path(llmc.passes.__file__).parent.glob("*.py") if not file.stem.startswith("_")
)


def _tests_in(file: Path) -> list[str]:
    """Names of the tests at the top level of a file; none if there is no such file."""
    body = ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []
    return [n.name for n in body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]


def test_a_pass_has_the_name_of_its_module() -> None:
    assert sorted(name.replace("-", "_") for name in registered_passes()) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_pass_has_tests_of_its_own(module: str) -> None:
    assert _tests_in(Path(__file__).with_name(f"test_{module}.py"))


def test_a_missing_file_and_one_without_tests_are_seen(tmp_path: Path) -> None:
    empty = tmp_path / "test_empty.py"
    empty.write_text("def helper():\n    def test_inner(): ...\n")
    assert _tests_in(empty) == _tests_in(tmp_path / "test_absent.py") == []
