"""What other processes, killed ones included, leave of an output and of those beside it."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmc.artifact.manifest import Manifest, State
from llmc.artifact.store import exchange, workplace
from llmc.artifact.store.folder import Staging, digest_folder, open_artifact, reopened, staging
from llmc.artifact.store.lock import output_lock
from llmc.artifact.store.workplace import lock_path
from llmc.errors import ConfigError

MakeManifest = Callable[..., Manifest]
UNFINISHED = {"state": State.NOT_VERIFIED, "checks": (), "unfinished": "interrupted"}


def _write(draft: Staging, contents: bytes, manifest: MakeManifest, **changes: object) -> Manifest:
    (draft.path / "model.onnx").write_bytes(contents)
    return manifest(files=digest_folder(draft.path, {}), **changes)


def _build(output: Path, contents: bytes, manifest: MakeManifest) -> None:
    with staging(output) as draft:
        draft.commit(_write(draft, contents, manifest))


def _die(*_: object) -> None:
    os._exit(9)


def _die_after(call: Callable[..., object]) -> Callable[..., None]:
    def run(*arguments: object) -> None:
        call(*arguments)
        os._exit(9)

    return run


def _die_between_renames(new: Path, place: Path, aside: Path) -> None:
    place.rename(aside)
    os._exit(9)


#: What dies in a commit, and what stands at the output after the next command.
DEATHS = {
    "before the manifest": ("write_manifest", _die, b"one"),
    "before the exchange": ("put_in_place", _die, b"two"),
    "between two renames": ("put_in_place", _die_between_renames, b"two"),
    "after the exchange": ("put_in_place", _die_after(exchange.put_in_place), b"two"),
}


def _in_a_process_that_dies(act: Callable[[], object]) -> None:
    child = os.fork()
    if child == 0:
        act()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("death", DEATHS)
def test_the_next_command_finishes_or_undoes_a_killed_commit(
    tmp_path: Path, make_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch, death: str
) -> None:
    output = tmp_path / "model"
    _build(output, b"one", make_manifest)
    name, replacement, contents = DEATHS[death]
    with monkeypatch.context() as patch:
        patch.setattr(workplace, name, replacement)
        _in_a_process_that_dies(lambda: _build(output, b"two", make_manifest))
    artifact = open_artifact(output)
    assert (output / "model.onnx").read_bytes() == contents
    assert artifact.manifest.files == digest_folder(output, {})
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("death", ["before the manifest", "before the exchange", "after the exchange"])
def test_an_unverified_artifact_survives_a_death_as_it_is_put_in_its_place(
    tmp_path: Path, make_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch, death: str
) -> None:
    output = tmp_path / "model"
    _build(output, b"one", make_manifest)
    with staging(output) as draft:
        kept = draft.keep_unverified(_write(draft, b"two", make_manifest, **UNFINISHED))
    assert kept.path.name == "model.unverified"

    def finish() -> None:
        with reopened(kept) as draft:
            draft.commit(make_manifest(files=kept.manifest.files))

    with monkeypatch.context() as patch:
        patch.setattr(workplace, *DEATHS[death][:2])
        _in_a_process_that_dies(finish)
    open_artifact(output)
    if death == "before the manifest":
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.unverified"]
        finish()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (output / "model.onnx").read_bytes() == b"two"
    assert open_artifact(output).manifest.state is State.VERIFIED


def test_a_second_unverified_artifact_takes_the_place_of_the_first(
    tmp_path: Path, make_manifest: MakeManifest
) -> None:
    for contents in (b"one", b"two"):
        with staging(tmp_path / "model") as draft:
            kept = draft.keep_unverified(_write(draft, contents, make_manifest, **UNFINISHED))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (kept.path / "model.onnx").read_bytes() == b"two"


@pytest.mark.parametrize("name", ["model.unverified", "model.failed"])
def test_an_artifact_of_its_own_is_not_replaced(
    tmp_path: Path, make_manifest: MakeManifest, name: str
) -> None:
    _build(tmp_path / name, b"one", make_manifest)
    with pytest.raises(ConfigError, match=f"{name} is another artifact"):
        _build(tmp_path / "model", b"two", make_manifest)
    assert (tmp_path / name / "model.onnx").read_bytes() == b"one"


def test_a_changed_artifact_is_not_finished(tmp_path: Path, make_manifest: MakeManifest) -> None:
    with staging(tmp_path / "model") as draft:
        kept = draft.keep_unverified(_write(draft, b"two", make_manifest, **UNFINISHED))
    _build(tmp_path / "model", b"three", make_manifest)
    with pytest.raises(ConfigError, match="model has changed in the meantime"), reopened(kept):
        pytest.fail("was opened")


def test_what_another_output_has_beside_it_is_left_alone(tmp_path: Path, make_manifest: MakeManifest) -> None:
    foreign = [".model.previous", ".model.lock", f"{lock_path(tmp_path / 'model').stem}-notours"]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years")
    with staging(tmp_path / "model.staging-1") as other:
        _build(tmp_path / "model", b"one", make_manifest)
        other.commit(_write(other, b"two", make_manifest))
    assert all((tmp_path / name / "thesis.tex").read_text() == "years" for name in foreign)
    assert (tmp_path / "model.staging-1" / "model.onnx").read_bytes() == b"two"


def test_readers_find_an_artifact_at_all_times(tmp_path: Path, make_manifest: MakeManifest) -> None:
    _build(tmp_path / "model", b"0", make_manifest)
    reader = os.fork()
    if reader == 0:
        count = 0
        while not (tmp_path / "done").exists():
            count += not (tmp_path / "model" / "model.onnx").is_file()
        os._exit(min(count, 1))
    for number in range(100):
        _build(tmp_path / "model", str(number).encode(), make_manifest)
    (tmp_path / "done").touch()
    assert os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) == 0


def test_a_lock_that_is_a_link_or_a_foreign_file_is_refused(tmp_path: Path) -> None:
    lock, victim = tmp_path / "lock", tmp_path / "victim"
    victim.write_text("years of work")
    for plant in (lambda: lock.symlink_to(victim), lambda: os.link(victim, lock)):
        plant()
        with pytest.raises(ConfigError, match="llmc did not write it"), output_lock(lock, tmp_path):
            pytest.fail("was taken")
        assert victim.read_text() == "years of work"
        lock.unlink()


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_flock")
def test_without_flock_the_file_is_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with output_lock(lock, tmp_path):
        fact = f"in use by another run of llmc \\(process {os.getpid()}\\)"
        with pytest.raises(ConfigError, match=fact), output_lock(lock, tmp_path):
            pytest.fail("was taken twice")
    assert not lock.exists()

    def hold_and_die() -> None:
        with output_lock(lock, tmp_path):
            _die()

    _in_a_process_that_dies(hold_and_die)
    assert lock.exists()
    with output_lock(lock, tmp_path):
        assert str(os.getpid()) in lock.read_text()


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_lock_of_another_host_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("llmc process 1 on elsewhere\n")
    taken = output_lock(tmp_path / "lock", tmp_path)
    with pytest.raises(ConfigError, match=r"process 1 on elsewhere\)") as caught, taken:
        pytest.fail("was taken")
    assert caught.value.hint is not None
    assert f"remove {tmp_path / 'lock'}" in caught.value.hint
