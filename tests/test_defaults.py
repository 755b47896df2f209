"""The target of a build that names none."""

from pathlib import Path

import pytest

from llmc.catalog import list_targets
from llmc.defaults import choose_target
from llmc.errors import ConfigError


def test_kernels_are_compiled_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose_target("cpu-avx2")
    assert choice.target == "cpu-mixed-compiled"
    assert choice.reason == "target cpu-mixed-compiled, the default where kernels can be compiled"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CXX", "no-such-compiler")
    choice = choose_target("cpu-avx2")
    assert choice.target == "cpu-mixed"
    assert "no-such-compiler" in choice.reason


def test_without_an_instruction_set_that_has_kernels(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "old.yaml").write_text(
        "schema_version: 1\nname: old\nkind: cpu\ndevice: an old CPU\nisa: [sse2]\nsources: {isa: mine}\n"
    )
    choice = choose_target("old", tmp_path)
    assert choice.target == "cpu-mixed"
    assert "there are kernels for AVX-512 VNNI" in choice.reason


@pytest.mark.parametrize("profile", ["l4", "rtx-4090,rtx-3090"])
def test_a_gpu(profile: str) -> None:
    assert choose_target(profile).target == "cuda-int4"


def test_every_default_ships() -> None:
    shipped = {each.document.name for each in list_targets()}
    assert {choose_target(name).target for name in ("local", "cpu-avx512-vnni", "l4")} <= shipped


def test_an_unknown_profile() -> None:
    with pytest.raises(ConfigError, match="no profile is named nowhere"):
        choose_target("nowhere")
