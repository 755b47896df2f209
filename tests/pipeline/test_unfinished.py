"""What was built is kept where its gate was interrupted or could not run, and `llmc verify` finishes it."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from llmc.artifact.manifest import Manifest, State
from llmc.artifact.store.folder import open_artifact
from llmc.errors import ResourceError
from llmc.pipeline import build, verify
from llmc.plan import plan_build
from llmc.progress import PlainProgress, SilentProgress
from tests.caches import own_cache
from tests.models import EOS, save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save_tiny_model("llama", folder / "model", tokenizer=True, eos_token_id=EOS)


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("LLMC_CACHE", own_cache(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def _build(
    model: Path, output: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None
) -> Manifest:
    def fail(*_: object, **__: object) -> None:
        assert error is not None
        raise error

    plan = plan_build(str(model), target="cpu-int4", profile="local", output=output)
    with monkeypatch.context() as patch:
        if error is not None:
            patch.setattr(import_module("llmc.pipeline.build"), "measure_parity", fail)
        return build(plan, PlainProgress()).manifest


INTERRUPTIONS = [
    (KeyboardInterrupt(), KeyboardInterrupt, "interrupted"),
    (ResourceError("a runtime is missing"), ResourceError, "a runtime is missing"),
    (MemoryError(), ResourceError, "MemoryError"),
    (RuntimeError("of torch"), RuntimeError, "RuntimeError: of torch"),
]


@pytest.mark.parametrize(("error", "kind", "reason"), INTERRUPTIONS)
def test_what_was_built_is_kept_and_finished(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    kind: type[BaseException],
    reason: str,
) -> None:
    output = tmp_path / "out"
    with pytest.raises(kind):
        _build(model, output, monkeypatch, error)
    assert f"built, not verified: {output} is kept; llmc verify {output} continues" in capsys.readouterr().err
    kept = open_artifact(output).manifest
    assert kept.state is State.NOT_VERIFIED
    assert kept.unfinished == f"the gates were begun and not finished: {reason}"


def test_verify_finishes_as_the_build_would_have(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _build(model, tmp_path / "out", monkeypatch)
    assert whole.state is State.VERIFIED
    with pytest.raises(KeyboardInterrupt):
        _build(model, tmp_path / "out", monkeypatch, KeyboardInterrupt())
    assert open_artifact(tmp_path / "out").manifest == whole
    (tmp_path / "out.unverified" / "reports" / "mark.json").touch()
    verify(tmp_path / "out.unverified", None, (), SilentProgress(), each_pass=True)
    assert open_artifact(tmp_path / "out").manifest == whole  # with no check that a build does not make
    assert {p.name for p in (tmp_path / "out" / "reports").iterdir()} >= {"mark.json", "parity.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_unfinished_artifact_that_misses_its_gates_is_kept_as_failed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        _build(model, tmp_path / "out", monkeypatch, KeyboardInterrupt())
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    assert verify(tmp_path / "out", None, (), SilentProgress()).failure() is not None
    assert [p.name for p in tmp_path.iterdir()] == ["out.failed"]
    assert open_artifact(tmp_path / "out.failed").manifest.state is State.FAILED
