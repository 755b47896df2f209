"""What made an artifact: releases, and the source that a cache depends on."""

from pathlib import Path

import pytest

from llmc.artifact.provenance import code_digest


@pytest.mark.parametrize("name", ["__init__.py", "one.py", "inner/two.py", "inner/three.h", "inner/four.cpp"])
def test_every_source_of_a_package_counts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = f"package_{name.replace('/', '_').replace('.', '_')}"
    file = tmp_path / package / name
    file.parent.mkdir(parents=True)
    (tmp_path / package / "__init__.py").touch()
    file.write_text("1\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = code_digest(package)
    code_digest.cache_clear()
    (tmp_path / package / "notes.txt").touch()
    assert code_digest(package) == before
    code_digest.cache_clear()
    file.write_text("2\n")
    assert code_digest(package) != before


def test_a_module_counts_alone() -> None:
    assert code_digest("llmc.architecture") != code_digest("llmc.errors")
