"""What ships is valid, complete and found; a user's own files come first."""

import re
from pathlib import Path

import pytest

from llmc.catalog import (
    PATH_VARIABLE,
    find_target_origins,
    list_profiles,
    list_targets,
    load_profile,
    load_profile_for,
    load_target,
    read_target,
    search_folders,
    shipped_folder,
)
from llmc.config import Metric, Provider
from llmc.errors import ConfigError
from llmc.profile import ProfileKind, find_profile

FILES = [file.stem for file in (Path(__file__).parents[1] / "targets").iterdir()]
TARGETS = {name for name in FILES if not name.startswith("_")}

# From the table "CUDA GPU Compute Capability" of developer.nvidia.com/cuda-gpus.
CAPABILITY = {
    "t4": "7.5",
    "a100-80g": "8.0",
    "a10": "8.6",
    "rtx-3090": "8.6",
    "l4": "8.9",
    "l40s": "8.9",
    "rtx-4090": "8.9",
    "h100-sxm": "9.0",
    "h200": "9.0",
    "b200": "10.0",
    "rtx-5090": "12.0",
    "rtx-pro-6000-blackwell": "12.0",
    "dgx-spark": "12.1",
}

# As nvidia-smi prints them: the table "Compatible GPUs" of NVIDIA/open-gpu-kernel-modules.
DRIVER_NAMES = {
    "t4": "Tesla T4",
    "a100-80g": "NVIDIA A100-SXM4-80GB",
    "a10": "NVIDIA A10",
    "rtx-3090": "NVIDIA GeForce RTX 3090",
    "l4": "NVIDIA L4",
    "l40s": "NVIDIA L40S",
    "rtx-4090": "NVIDIA GeForce RTX 4090",
    "h100-sxm": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
    "rtx-5090": "NVIDIA GeForce RTX 5090",
    "rtx-pro-6000-blackwell": "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
    "dgx-spark": "NVIDIA GB10",
}

PROFILE = "schema_version: 1\nname: {name}\nkind: {kind}\ndevice: {device}\n"


@pytest.fixture(autouse=True)
def _no_path_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PATH_VARIABLE, raising=False)


def own(folder: Path, name: str, *, kind: str = "cpu", device: str = "mine", suffix: str = ".yaml") -> Path:
    (folder / "profiles").mkdir(parents=True, exist_ok=True)
    file = folder / "profiles" / f"{name}{suffix}"
    file.write_text(PROFILE.format(name=name, kind=kind, device=device))
    return folder


def test_every_target_ships() -> None:
    listed = {each.document.name: each for each in list_targets()}
    assert set(listed) == TARGETS
    for name, each in listed.items():
        assert each.file == shipped_folder() / "targets" / f"{name}.yaml"
        assert each.document.gates, f"{name} has no gate"
        metrics = {gate.metric for gate in each.document.gates}
        assert Metric.TEXT_KL_MEAN in metrics
        assert metrics & {Metric.TEXT_TOP1, Metric.TEXT_KL_RATIO}
        assert (each.document.provider is Provider.CUDA) == name.startswith(("cuda-", "tensorrt-"))


def test_float32_on_cpu_is_held_to_the_original() -> None:
    bounds = {gate.metric: gate for gate in load_target("cpu-fp32").gates}
    for metric in (Metric.PREFILL_MAX_ABS, Metric.DECODE_MAX_ABS, Metric.RAGGED_MAX_ABS):
        assert bounds[metric].max == 1e-3
    assert bounds[Metric.GENERATE_EQUAL].min == 1.0


def test_every_profile_ships() -> None:
    listed = {each.document.name: each.document for each in list_profiles()}
    assert set(listed) == {*CAPABILITY, "cpu-avx2", "cpu-avx512-vnni", "cpu-arm64-dotprod"}
    for name, profile in listed.items():
        if name in CAPABILITY:
            assert profile.driver_names == (DRIVER_NAMES[name],)
            assert profile.compute_capability == CAPABILITY[name]
            assert profile.kind is ProfileKind.GPU
            assert profile.memory_gib is not None
            assert profile.bandwidth_gbs is not None
        else:
            assert profile.kind is ProfileKind.CPU
            assert profile.isa
            assert "isa" in profile.sources


def test_the_profile_of_a_gpu_is_found_by_the_name_that_the_driver_gives() -> None:
    listed = [each.document for each in list_profiles()]
    for name, device in DRIVER_NAMES.items():
        found = find_profile(device, listed)
        assert found is not None
        assert found.name == name
    other = (
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "NVIDIA H200 NVL",
        "NVIDIA A100 80GB PCIe",
    )
    assert [find_profile(device, listed) for device in other] == [None] * 3


def test_rates_are_dense_and_ordered() -> None:
    """Halving bits never lowers a rate, and FP16 is the half of FP8 and INT8 at most."""
    for each in list_profiles():
        rates = each.document.dense
        ladder = [rates.tf32, rates.fp16, rates.int8, rates.fp4]
        known = [rate for rate in ladder if rate is not None]
        assert known == sorted(known), each.document.name
        for fast, slow in ((rates.fp4, rates.fp8), (rates.fp8, rates.fp16), (rates.fp16, rates.tf32)):
            if fast is not None and slow is not None:
                assert fast / slow == pytest.approx(2, rel=0.03) or fast / slow == pytest.approx(
                    4, rel=0.03
                ), f"{each.document.name}: {fast} and {slow} differ in sparsity"


@pytest.mark.parametrize("name", ["local", "l4"])
def test_a_profile_by_name(name: str) -> None:
    assert load_profile(name).name == name


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="no target is named cpu-int5") as caught:
        load_target("cpu-int5")
    assert "cpu-int4" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match="no profile is named loca") as caught:
        load_profile("loca")
    assert caught.value.hint == "did you mean local?"


def test_the_order_of_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, listed = own(tmp_path / "a", "l4", device="of --path"), tmp_path / "b"
    own(listed, "l4", device="of the variable")
    own(listed, "t4", device="of the variable")
    monkeypatch.setenv(PATH_VARIABLE, str(listed))
    assert search_folders(named) == (named, listed, shipped_folder())
    assert load_profile("l4", named).device == "of --path"
    assert load_profile("l4").device == "of the variable"
    assert load_profile("t4", named).device == "of the variable"
    assert load_profile("a10", named).device == "NVIDIA A10"
    assert sum(each.document.name == "l4" for each in list_profiles(named)) == 1


def test_folders_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(str(tmp_path))} \\(from --path\\) has neither"):
        load_target("cpu-fp32", tmp_path)
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="from LLMC_PATH"):
        list_targets()


def test_two_files_of_one_name(tmp_path: Path) -> None:
    own(own(tmp_path, "twice"), "twice", suffix=".yml")
    with pytest.raises(ConfigError, match=r"twice\.yml and twice\.yaml both define twice"):
        load_profile("l4", tmp_path)


def test_a_file_carries_its_name(tmp_path: Path) -> None:
    own(tmp_path, "one").joinpath("profiles", "one.yaml").rename(tmp_path / "profiles" / "two.yaml")
    with pytest.raises(ConfigError, match="name is one and the file is named two"):
        load_profile("two", tmp_path)


def test_local_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has the name local"):
        load_profile("l4", own(tmp_path, "local"))


def test_a_profile_fits_its_target() -> None:
    cuda, cpu = load_target("cuda-int4"), load_target("cpu-int4")
    assert load_profile_for(cuda, "l4").kind is ProfileKind.GPU
    assert load_profile_for(cpu, "local").kind is ProfileKind.CPU
    with pytest.raises(ConfigError, match="target cpu-int4 runs on a CPU and profile l4 describes a GPU"):
        load_profile_for(cpu, "l4")
    with pytest.raises(ConfigError, match="target cuda-int4 runs on a GPU and profile cpu-avx2"):
        load_profile_for(cuda, "cpu-avx2")
    assert load_profile_for(cuda, "local").name == "local"


def test_every_part_of_targets_is_extended_by_a_target() -> None:
    read = {file.stem for name in TARGETS for file in find_target_origins(name).values()}
    assert read == set(FILES)


def test_a_target_of_ones_own_extends_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "mine.yaml").write_text(
        "name: mine\nsummary: tighter\nextends: cpu-int4\ngates:\n  - {metric: text.kl_mean, max: 0.1}\n"
    )
    mine, base = load_target("mine", tmp_path), load_target("cpu-int4")
    bounds = {gate.metric: gate.max for gate in mine.gates}
    assert bounds == {g.metric: g.max for g in base.gates} | {Metric.TEXT_KL_MEAN: 0.1}
    assert mine.model_copy(update={"name": base.name, "summary": base.summary, "gates": base.gates}) == base
    assert read_target(str(tmp_path / "targets" / "mine.yaml")) == mine


def test_a_copy_of_a_shipped_target_extends_what_that_extends(tmp_path: Path) -> None:
    (tmp_path / "targets").mkdir()
    text = (shipped_folder() / "targets" / "cpu-mixed-4.6.yaml").read_text()
    (tmp_path / "targets" / "mine.yaml").write_text(text.replace("name: cpu-mixed-4.6", "name: mine"))
    assert load_target("mine", tmp_path).gates == load_target("cpu-mixed-4.6").gates
    text = (shipped_folder() / "targets" / "cpu-mixed.yaml").read_text()
    (tmp_path / "targets" / "mine.yaml").write_text(text.replace("name: cpu-mixed", "name: mine"))
    assert load_target("mine", tmp_path).passes == load_target("cpu-mixed").passes


def test_a_path_is_not_a_name_to_extend(tmp_path: Path) -> None:
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "mine.yaml").write_text("name: mine\nsummary: x\nextends: ../cpu-int4\n")
    with pytest.raises(ConfigError, match=r"mine.yaml:3: extends \.\./cpu-int4: no target is named"):
        load_target("mine", tmp_path)


def test_a_part_is_no_target() -> None:
    with pytest.raises(ConfigError, match="no target is named _cpu"):
        load_target("_cpu")
