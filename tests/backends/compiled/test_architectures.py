"""Kernels for another CPU: chosen by the profile, built and not executed, refused before they are loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmc.artifact.manifest import State
from llmc.artifact.store.folder import open_artifact
from llmc.backends.compiled import stage, toolchain
from llmc.backends.compiled.isa import INSTRUCTION_SETS, InstructionSet, choose_isa
from llmc.backends.compiled.toolchain import find_compiler, host_machine
from llmc.catalog import load_profile
from llmc.errors import ConfigError, ExitCode, LlmcError, ParityError, ResourceError
from llmc.pipeline import bench, build, run, verify
from llmc.pipeline.result import GateReport
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.models import save_tiny_model

PROFILES = {"x86_64": "cpu-avx2", "aarch64": "cpu-arm64-dotprod"}
FOREIGN = next(machine for machine in PROFILES if machine != host_machine())
COMMANDS: list[Callable[[Path], object]] = [
    lambda path: run(path, "hello", 4, lambda text: None, SilentProgress()),
    lambda path: verify(path, None, (), SilentProgress()),
    lambda path: bench(path, None, SilentProgress()),
]


def _require_success(result: object) -> None:
    """Raise what a report of `verify` amounts to."""
    if isinstance(result, GateReport) and (failure := result.failure()) is not None:
        raise failure


def foreign_set() -> InstructionSet:
    return next(known for known in INSTRUCTION_SETS if known.machine == FOREIGN)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    model = save_tiny_model("llama", folder / "model", tokenizer=True)
    output = folder / "out"
    build(
        plan_build(str(model), target="cpu-int4-compiled", profile="local", output=output, verify=False),
        SilentProgress(),
    )
    return output


@pytest.mark.parametrize("machine", sorted(PROFILES))
def test_a_profile_decides_the_architecture(machine: str) -> None:
    profile = load_profile(PROFILES[machine])
    assert choose_isa(profile.isa, profile.name).machine == machine


def test_no_cross_compiler_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLMC_CXX", raising=False)
    with pytest.raises(ResourceError, match=rf"need a C\+\+ compiler for {FOREIGN}") as caught:
        find_compiler(FOREIGN)
    assert caught.value.exit_code is ExitCode.RESOURCES
    assert f"install {FOREIGN}-linux-gnu-g++" in str(caught.value.hint)


def test_a_compiler_for_another_architecture_keeps_what_was_there(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_artifact(artifact).manifest
    monkeypatch.setenv("LLMC_CXX", "g++")
    plan = plan_build(
        before.model.ref,
        target="cpu-int4-compiled",
        profile=PROFILES[FOREIGN],
        output=artifact,
        verify=False,
    )
    with pytest.raises(
        ResourceError, match=rf"g\+\+ compiles for {host_machine()}.*, but the profile's CPU is {FOREIGN}"
    ) as caught:
        build(plan, SilentProgress())
    assert caught.value.exit_code is ExitCode.RESOURCES
    assert open_artifact(artifact).manifest == before


def test_what_this_machine_cannot_execute_is_built_and_not_executed(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a machine of another architecture, this one's compiler is a cross compiler."""
    monkeypatch.setenv("LLMC_CXX", "g++")
    for module in (toolchain, stage):
        monkeypatch.setattr(module, "host_machine", lambda: "riscv64")
    before = open_artifact(artifact).manifest
    plan = plan_build(before.model.ref, target="cpu-int4-compiled", profile="local", output=tmp_path / "out")
    result = build(plan, SilentProgress())
    assert result.failure() is None
    assert result.verdict is None
    assert result.manifest.state is State.NOT_EXECUTED
    assert result.manifest.kernels is not None
    assert before.kernels is not None
    assert result.manifest.kernels.isa == before.kernels.isa
    assert "not executed, so nothing was measured" in result.render()
    with pytest.raises(ResourceError, match=r"compiled for .* CPUs .*, but this machine is riscv64"):
        run(tmp_path / "out", "hello", 4, lambda text: None, SilentProgress())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("isa", "message"),
    [
        (foreign_set().name, f"compiled for {FOREIGN} CPUs with {foreign_set().name}, but this machine is"),
        ("AVX10", "are for AVX10, which this version of llmc does not know"),
    ],
)
def test_kernels_for_another_cpu_are_refused_before_they_are_loaded(
    isa: str, message: str, command: Callable[[Path], object], artifact: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    data = json.loads((copy / "manifest.json").read_text())
    data["kernels"]["isa"] = isa
    (copy / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(ResourceError, match=message) as caught:
        command(copy)
    assert caught.value.exit_code is ExitCode.RESOURCES


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("gone", [False, True])
def test_a_library_that_is_not_the_manifests_is_not_loaded(
    gone: bool, command: Callable[[Path], object], artifact: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(artifact, tmp_path / "copy")
    library = copy / "kernels.so"
    if gone:
        library.unlink()
    else:
        library.write_bytes(library.read_bytes() + b"x")
    with pytest.raises(LlmcError, match=r"is damaged: kernels\.so|gates: files\.mismatches") as caught:
        _require_success(command(copy))
    assert isinstance(caught.value, ConfigError | ParityError)
