"""Artifacts on disk: whole or not there, whatever happens to the build."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmc.artifact.manifest import CheckRecord, FileDigest, KernelRecord, Manifest, State
from llmc.artifact.store.disk import require_space, space_errors
from llmc.artifact.store.folder import Artifact, digest_file, digest_folder, open_artifact, staging
from llmc.artifact.store.integrity import find_damage, require_intact
from llmc.artifact.store.workplace import lock_path
from llmc.artifact.verdict import CheckStatus
from llmc.config import Metric
from llmc.errors import ConfigError, ExitCode, ResourceError

MakeManifest = Callable[..., Manifest]
Build = Callable[[Path, bytes], None]


@pytest.fixture
def build(make_manifest: MakeManifest) -> Build:
    """Builds an artifact of one file with these contents."""

    def run(output: Path, contents: bytes) -> None:
        with staging(output) as draft:
            (draft.path / "model.onnx").write_bytes(contents)
            draft.commit(make_manifest(files=digest_folder(draft.path, {})))

    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_build_leaves_the_artifact_and_nothing_else(tmp_path: Path, build: Build) -> None:
    output = tmp_path / "deep" / "model"
    build(output, b"one")
    assert [p.name for p in output.parent.iterdir()] == ["model"]
    artifact = open_artifact(output)
    assert artifact.manifest.files == {"model.onnx": digest_file(output / "model.onnx")}
    require_intact(artifact)


def test_a_second_build_replaces_the_first_whole(tmp_path: Path, build: Build) -> None:
    build(tmp_path / "model", b"one")
    (tmp_path / "model" / "reports").mkdir()
    build(tmp_path / "model", b"two")
    assert snapshot(tmp_path / "model").keys() == {"model.onnx", "manifest.json"}
    assert (tmp_path / "model" / "model.onnx").read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_two_builds_give_the_same_bytes(tmp_path: Path, build: Build) -> None:
    build(tmp_path / "a", b"same")
    build(tmp_path / "b", b"same")
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, ValueError])
def test_an_interrupted_build_leaves_the_old_artifact_alone(
    tmp_path: Path, build: Build, interrupt: type[BaseException]
) -> None:
    build(tmp_path / "model", b"one")
    before = snapshot(tmp_path)

    def interrupted() -> None:
        with staging(tmp_path / "model") as draft:
            (draft.path / "model.onnx").write_bytes(b"half")
            raise interrupt

    with pytest.raises(interrupt):
        interrupted()
    assert snapshot(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_build_that_does_not_commit_leaves_nothing(tmp_path: Path) -> None:
    with staging(tmp_path / "model") as draft:
        (draft.path / "model.onnx").write_bytes(b"one")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_a_failed_swap_restores_the_old_artifact(
    tmp_path: Path, build: Build, make_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    build(tmp_path / "model", b"one")
    before = snapshot(tmp_path)
    rename = Path.rename

    def refuse(source: Path, target: Path) -> Path:
        if source.name.startswith("output-") and target.name == "model":
            raise KeyboardInterrupt
        return rename(source, target)

    def refuse_exchange(*_: Path) -> bool:
        raise KeyboardInterrupt

    swap = refuse_exchange if exchange else lambda *_: False
    monkeypatch.setattr("llmc.artifact.store.exchange._exchange", swap)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(KeyboardInterrupt), staging(tmp_path / "model") as draft:
        draft.commit(make_manifest())
    assert snapshot(tmp_path) == before


def test_a_failed_artifact_is_kept_beside_the_old_one(
    tmp_path: Path, build: Build, make_manifest: MakeManifest
) -> None:
    build(tmp_path / "model", b"good")
    missed = CheckRecord(metric=Metric.PREFILL_MAX_ABS, status=CheckStatus.FAIL, where="onnxruntime")
    for contents in (b"bad", b"worse"):
        with staging(tmp_path / "model") as draft:
            (draft.path / "model.onnx").write_bytes(contents)
            kept = draft.keep_failed(make_manifest(state=State.FAILED, checks=(missed,)))
    assert kept.path == tmp_path / "model.failed"
    assert (kept.path / "model.onnx").read_bytes() == b"worse"
    assert (tmp_path / "model" / "model.onnx").read_bytes() == b"good"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.failed"]


# A shell's background job inherits an ignored SIGINT; a build at a terminal does not.
BUILDER = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from llmc.artifact.store.folder import staging
with staging(Path(sys.argv[1])) as draft:
    (draft.path / "model.onnx.data").write_bytes(b"half" * 1000)
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_build(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A build of tmp_path/model in another process, in the middle of writing."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(tmp_path / "model")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.communicate()


def test_a_killed_build_leaves_the_old_artifact_and_is_cleaned_up_after(
    tmp_path: Path, build: Build, request: pytest.FixtureRequest
) -> None:
    build(tmp_path / "model", b"one")
    before = snapshot(tmp_path / "model")
    process: subprocess.Popen[str] = request.getfixturevalue("other_build")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert snapshot(tmp_path / "model") == before
    assert len(list(tmp_path.glob(".llmc-*/new"))) == 1
    build(tmp_path / "model", b"two")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.onnx").read_bytes() == b"two"


def test_ctrl_c_in_another_process_leaves_nothing(tmp_path: Path, other_build: subprocess.Popen[str]) -> None:
    other_build.send_signal(signal.SIGINT)
    other_build.wait(timeout=20)
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_use_is_refused(
    tmp_path: Path, build: Build, other_build: subprocess.Popen[str]
) -> None:
    fact = f"model is in use by another run of llmc \\(process {other_build.pid}\\)"
    with pytest.raises(ConfigError, match=fact) as caught:
        build(tmp_path / "model", b"two")
    assert caught.value.exit_code is ExitCode.USAGE
    assert len(list(tmp_path.glob(".llmc-*/new"))) == 1, "the running build lost its directory"


def test_the_lock_of_a_dead_process_is_taken_over(
    tmp_path: Path, build: Build, other_build: subprocess.Popen[str]
) -> None:
    other_build.kill()
    other_build.wait()
    assert lock_path(tmp_path / "model").exists()
    build(tmp_path / "model", b"one")
    assert open_artifact(tmp_path / "model").manifest.files["model.onnx"].bytes == 3


@pytest.mark.parametrize("place", ["model", "model.failed"])
@pytest.mark.parametrize("manifest", [None, '{"name": "a web application"}', "{damaged"])
def test_a_directory_that_is_no_artifact_is_refused(
    tmp_path: Path, build: Build, place: str, manifest: str | None
) -> None:
    (tmp_path / place).mkdir()
    (tmp_path / place / "thesis.tex").write_text("years")
    if manifest is not None:
        (tmp_path / place / "manifest.json").write_text(manifest)
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=f"{place} is not empty and is not an artifact") as caught:
        build(tmp_path / "model", b"one")
    assert caught.value.hint == "choose another output, or remove it yourself"
    assert snapshot(tmp_path) == before


def test_an_empty_directory_is_taken(tmp_path: Path, build: Build) -> None:
    (tmp_path / "model").mkdir()
    build(tmp_path / "model", b"one")
    require_intact(open_artifact(tmp_path / "model"))


def test_an_output_that_is_a_file_is_refused(tmp_path: Path, build: Build) -> None:
    (tmp_path / "model").write_text("file")
    with pytest.raises(ConfigError, match="model is a file"):
        build(tmp_path / "model", b"one")
    with pytest.raises(ConfigError, match="model/below cannot be an output directory"):
        build(tmp_path / "model" / "below", b"one")


def test_the_root_is_no_output(build: Build) -> None:
    with pytest.raises(ConfigError, match="/ cannot be an output directory"):
        build(Path("/"), b"one")


def test_a_mounted_file_system_is_no_output(build: Build) -> None:
    with pytest.raises(ConfigError, match="output /proc is a mount point"):
        build(Path("/proc"), b"one")


def test_a_folder_that_takes_no_files_is_no_output(build: Build) -> None:
    with pytest.raises(ConfigError, match="/proc takes no new files"):
        build(Path("/proc/artifact"), b"1")


@pytest.mark.parametrize("length", [255, 300])
def test_a_name_that_is_too_long_is_no_output(tmp_path: Path, build: Build, length: int) -> None:
    with pytest.raises(ConfigError, match="cannot be written: File name too long"):
        build(tmp_path / ("x" * length), b"1")


def test_too_little_space_is_told_before_writing(tmp_path: Path) -> None:
    fact = r"has [\d,]+ bytes free, but the build writes 1,152,921,504,606,846,976"
    with pytest.raises(ResourceError, match=fact) as caught, staging(tmp_path / "model", 1 << 60):
        pytest.fail("began to write")
    assert caught.value.exit_code is ExitCode.RESOURCES
    assert list(tmp_path.iterdir()) == []
    require_space(tmp_path, 0)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB: the kernel itself refuses, as it does on a full disk."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.usefixtures("small_files")
def test_a_write_that_the_disk_refuses_is_a_resource_error(tmp_path: Path, build: Build) -> None:
    build(tmp_path / "model", b"one")
    before = snapshot(tmp_path)
    with pytest.raises(ResourceError, match="model cannot be written: File too large"):
        build(tmp_path / "model", bytes(1 << 17))
    assert snapshot(tmp_path) == before


def test_a_full_disk_is_a_resource_error_and_other_errors_pass() -> None:
    full = Path("/dev/full")
    fact = "model cannot be written: No space left on device"
    with pytest.raises(ResourceError, match=fact), space_errors(Path("model")):
        full.write_bytes(b"one")
    with pytest.raises(FileNotFoundError), space_errors(Path("model")):
        Path("nowhere").read_bytes()


def test_an_open_artifact_needs_a_directory_with_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no artifact at"):
        open_artifact(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"is not an artifact: it has no manifest\.json"):
        open_artifact(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b'{"schema_version": 1, "\xff')
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged: it is not UTF-8 at byte 23"):
        open_artifact(tmp_path)


def test_changed_and_missing_files_are_all_named(tmp_path: Path, make_manifest: MakeManifest) -> None:
    with staging(tmp_path / "model") as draft:
        for name in ("a.onnx", "b.onnx", "c.onnx", "d.onnx"):
            (draft.path / name).write_bytes(b"1234")
        draft.commit(make_manifest(files=digest_folder(draft.path, {})))
    model = tmp_path / "model"
    (model / "a.onnx").write_bytes(b"1235")
    (model / "b.onnx").write_bytes(b"12345")
    (model / "c.onnx").unlink()
    fact = r"b\.onnx has 5 bytes instead of 4; c\.onnx is missing"
    with pytest.raises(ConfigError, match=rf"model is damaged: a\.onnx has changed; {fact}$"):
        require_intact(open_artifact(model))


def test_files_that_the_manifest_does_not_list_are_named(tmp_path: Path, make_manifest: MakeManifest) -> None:
    with staging(tmp_path / "model") as draft:
        draft.commit(make_manifest(files={}))
    model = tmp_path / "model"
    for name in ("reports/today/report.json", "reports/junit.xml", "reports/run.so", "more/a.json"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(b"1234")
    wrong = ("more/a.json", "reports/run.so")
    assert find_damage(open_artifact(model)).files == tuple(
        f"{n} is not listed in the manifest" for n in wrong
    )


def test_what_a_record_names_is_code_whatever_its_suffix(tmp_path: Path, make_manifest: MakeManifest) -> None:
    kernels = KernelRecord(library="ops.bin", isa="avx2", compiler="c++", source="0" * 64, regions=1, nodes=1)
    (tmp_path / "ops.bin").write_bytes(b"now")
    listed = {"ops.bin": FileDigest(sha256=hashlib.sha256(b"was").hexdigest(), bytes=3)}
    for files, wrong in (
        (listed, "ops.bin has changed"),
        ({}, "the manifest has no digest of library ops.bin"),
    ):
        manifest = make_manifest(kernels=kernels, files=files)
        assert find_damage(Artifact(tmp_path, manifest)).code == (wrong,)


def test_digests_leave_out_reports_and_the_manifest_and_trust_what_is_known(tmp_path: Path) -> None:
    for name in ("model.onnx", "manifest.json", "reports/parity.json", "extra/tokens.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    known = FileDigest(sha256="b" * 64, bytes=1)
    found = digest_folder(tmp_path, {"model.onnx": known})
    assert found == {"extra/tokens.json": digest_file(tmp_path / "extra/tokens.json"), "model.onnx": known}
    assert found["extra/tokens.json"].sha256 == hashlib.sha256(b"extra/tokens.json").hexdigest()


def test_files_get_the_permissions_of_the_user(tmp_path: Path, build: Build) -> None:
    mask = os.umask(0o027)
    try:
        build(tmp_path / "model", b"one")
    finally:
        os.umask(mask)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750


def test_opening_imports_neither_torch_nor_onnx(tmp_path: Path, build: Build) -> None:
    build(tmp_path / "model", b"one")
    code = """
import sys
from pathlib import Path
from llmc.artifact.store.folder import open_artifact
open_artifact(Path(sys.argv[1]))
print([name for name in ("torch", "transformers", "onnx") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")], capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
