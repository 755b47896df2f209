"""Two good artifacts pass; each of those that were broken on purpose fails with the right check named."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from llmc.artifact.manifest import REPORTS
from llmc.artifact.verdict import CheckStatus, MeasurementStatus
from llmc.checkpoint import Checkpoint
from llmc.config import Gate, Metric
from llmc.errors import ConfigError, ParityError
from llmc.pipeline import build, compare, report
from llmc.pipeline import verify as verify_artifact
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.report import read_report
from tests.caches import own_cache
from tests.models import save_tiny_model
from tests.validate.questions import write_task

from .sabotage import PARITY, SABOTAGES, Edit, Sabotage, copy_artifact, reseal
from .sabotage_contents import CONTENT_SABOTAGES
from .sabotage_files import FILE_SABOTAGES

TEXT = "The river bends twice before the mill; a compiler reads a model and writes a program. " * 40
#: A random model of three layers loses more to 4 bits than the targets allow a trained one.
RANDOM = {
    Metric.TEXT_KL_MEAN: ("max", 0.5),
    Metric.TEXT_TOP1: ("min", 0.2),
    Metric.TEXT_PERPLEXITY_RATIO: ("max", 1.6),
}
#: The target of the 4-bit artifact is none that ships.
verify = partial(verify_artifact, own_gates=True)


def _gates(gates: tuple[Gate, ...]) -> Iterator[Gate]:
    for gate in gates:
        direction, bound = RANDOM.get(gate.metric, (None, None))
        if direction is None:
            yield gate
        else:
            yield Gate(metric=gate.metric, reason="a random model of three layers", **{direction: bound})


def build_good(root: Path) -> dict[str, Path]:
    """One artifact in float32, and two in 4 bits, of the same tiny model, below `root`."""
    built = {}
    model = save_tiny_model("mistral", root / "model", tokenizer=True, tie_word_embeddings=True)
    for name, target in (("float", "cpu-fp32"), ("int4", "cpu-int4"), ("compiled", "cpu-int4-compiled")):
        plan = plan_build(str(model), target=target, profile="local", output=root / name, verify=False)
        gates = plan.target.gates if name == "float" else tuple(_gates(plan.target.gates))
        changes = {
            "target": plan.target.model_copy(update={"gates": gates}),
            "profile": plan.profile.model_copy(update={"threads": 1}),
        }
        built[name] = build(plan.model_copy(update=changes), SilentProgress()).path
    return built


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """PyTorch's side is computed once for all tests."""
    import torch

    root = tmp_path_factory.mktemp("good")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (root / "text").write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CACHE", own_cache(root / "cache"))
        yield build_good(root)
    torch.set_num_threads(threads)


def _check(folder: Path, artifacts: dict[str, Path], *, every: bool = True) -> dict[Metric, CheckStatus]:
    text = artifacts["float"].parent / "text"
    report = verify(folder, None, (str(text),), SilentProgress(), every=every).report
    assert report.verdict.passed == (not report.verdict.missed)
    return {c.metric: c.status for c in report.verdict.checks}


@pytest.mark.parametrize("name", ["float", "int4", "compiled"])
def test_a_good_artifact_passes(name: str, artifacts: dict[str, Path]) -> None:
    found = _check(artifacts[name], artifacts)
    assert {m for m, s in found.items() if s is not CheckStatus.PASS} == set()


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda s: f"{s.name} ({s.artifact})")
def test_a_broken_artifact_fails_the_right_check(
    sabotage: Sabotage, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_artifact(artifacts[sabotage.artifact], tmp_path / "broken")
    sabotage.apply(folder)
    if sabotage.sealed:
        reseal(folder)
    found = _check(folder, artifacts)
    missed = {m for m, s in found.items() if s is CheckStatus.FAIL}
    expected = {m for m in sabotage.caught if m in found}
    assert expected
    assert expected <= missed


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("a weight changed on disk", {Metric.FILES}),
        ("end token missing", {Metric.FILES, Metric.SERVING, Metric.TOKENIZER_EQUAL, Metric.CHAT_EQUAL}),
    ],
)
def test_a_cheap_check_that_misses_ends_the_run(
    name: str,
    reached: set[Metric],
    artifacts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is loaded after it, and what was not measured is no pass."""
    sabotage = next(s for s in SABOTAGES if s.name == name)
    folder = copy_artifact(artifacts[sabotage.artifact], tmp_path / "broken")
    sabotage.apply(folder)
    if sabotage.sealed:
        reseal(folder)
    monkeypatch.setattr(Checkpoint, "fill_reference", None)
    monkeypatch.setattr("llmc.runtime.ort_model.open_session", None)
    text = str(artifacts["float"].parent / "text")
    verdict = verify(folder, None, (text,), SilentProgress()).report.verdict
    assert {c.metric for c in verdict.checks if c.status is not CheckStatus.NOT_MEASURED} == reached
    assert not verdict.passed
    left = next(c for c in verdict.checks if c.metric is Metric.TEXT_KL_MEAN)
    missed = next(c.metric for c in verdict.checks if c.status is CheckStatus.FAIL)
    assert left.detail == f"{missed} missed before"


@pytest.mark.parametrize(
    "sabotage", [*CONTENT_SABOTAGES, *FILE_SABOTAGES], ids=lambda s: f"{s.name} ({s.artifact})"
)
def test_what_no_build_gives_fails_before_anything_is_loaded(
    sabotage: Sabotage, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy_artifact(artifacts[sabotage.artifact], tmp_path / "broken")
    sabotage.apply(folder)
    reseal(folder)
    found = _check(folder, artifacts, every=False)
    assert sabotage.caught <= {m for m, s in found.items() if s is CheckStatus.FAIL}
    assert found[Metric.PREFILL_MAX_ABS] is CheckStatus.NOT_MEASURED


def test_another_model_is_refused_unless_forced(artifacts: dict[str, Path], tmp_path: Path) -> None:
    other = save_tiny_model("mistral", tmp_path / "other", tokenizer=True, tie_word_embeddings=True, seed=1)
    text = (str(artifacts["float"].parent / "text"),)
    with pytest.raises(ConfigError, match=r"other is not the model that .*float was built from") as caught:
        verify(artifacts["float"], str(other), text, SilentProgress())
    assert "--force" in str(caught.value.hint)
    report = verify(artifacts["float"], str(other), text, SilentProgress(), force=True, every=True).report
    assert {Metric.WEIGHTS_SNR, Metric.TEXT_KL_MEAN} <= {c.metric for c in report.verdict.missed}


def test_reports_in_all_forms(artifacts: dict[str, Path], tmp_path: Path) -> None:
    text = (str(artifacts["float"].parent / "text"),)
    made = verify(artifacts["int4"], None, text, SilentProgress(), folder=tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
        "junit.xml",
    }
    assert read_report(tmp_path / "out" / "report.json").model_dump_json() == made.report.model_dump_json()
    assert sum(made.report.sizes.values()) > 0
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the report cannot be written to .*file"):
        verify(artifacts["int4"], None, text, SilentProgress(), folder=tmp_path / "file")


def test_a_release_that_is_worse_than_the_last(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """The report of the float artifact as the baseline of the 4-bit one, and the other way round."""
    text = (str(artifacts["float"].parent / "text"),)
    for name in ("float", "int4"):
        verify(artifacts[name], None, text, SilentProgress(), folder=tmp_path / name)
    last = tmp_path / "float" / "report.json"
    worse = verify(artifacts["int4"], None, text, SilentProgress(), folder=tmp_path / "new", baseline=last)
    assert worse.report.verdict.passed
    lost = {c.name for c in worse.report.changes if c.regression is not None}
    assert "text.kl_mean" in lost
    failure = worse.failure()
    assert isinstance(failure, ParityError)
    assert "worse beyond both intervals" in failure.fact
    assert "text.kl_mean" in worse.render().partition("against the baseline")[2]
    for form in ("report.md", "report.html", "junit.xml"):
        assert "worse beyond both intervals" in (tmp_path / "new" / form).read_text(encoding="utf-8")
    last = tmp_path / "int4" / "report.json"
    better = verify(artifacts["float"], None, text, SilentProgress(), baseline=last, allow=("size=1",))
    lost = {c.name for c in better.report.changes if c.regression is not None}
    assert "size" in lost
    assert "text.kl_mean" not in lost


def test_two_artifacts_and_the_page_of_one(artifacts: dict[str, Path], tmp_path: Path) -> None:
    text = (str(artifacts["float"].parent / "text"),)
    folders = {name: copy_artifact(artifacts[name], tmp_path / name) for name in ("float", "int4")}
    with pytest.raises(ConfigError, match="float has no report"):
        compare(folders["float"], folders["int4"], ())
    for folder in folders.values():
        verify(folder, None, text, SilentProgress(), folder=folder / "reports" / "today")
    found = compare(folders["float"], folders["int4"], ())
    differing = {(d.kind, d.name) for d in found.differences}
    assert {("operator", "com.microsoft::MatMulNBits"), ("weights", "all")} <= differing
    size = next(c for c in found.changes if c.name == "size")
    assert size.before is not None
    assert size.after is not None
    assert size.after < size.before
    assert isinstance(found.failure(), ParityError)
    assert "weights" in found.render()
    same = compare(folders["int4"], folders["int4"], ())
    assert (same.differences, same.failure()) == ((), None)

    shown = report(folders["int4"]).path.read_text(encoding="utf-8")
    assert "Size and quality of the artifacts of this model" in shown
    assert '"title": "float"' in shown
    neighbour = folders["float"] / REPORTS / "today" / "report.json"
    neighbour.write_text('{"schema_version": 1}', encoding="utf-8")
    page = report(folders["int4"])
    assert '"title": "float"' not in page.path.read_text(encoding="utf-8")
    assert "left out: " in page.render()
    assert "has schema version 1, but this version of llmc reads" in page.left_out[0]

    shutil.move(folders["int4"] / REPORTS, tmp_path / "elsewhere")
    (folders["int4"] / REPORTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"int4/reports points outside of the artifact, to .*elsewhere"):
        report(folders["int4"])

    other = save_tiny_model("mistral", tmp_path / "model2", tokenizer=True, tie_word_embeddings=True, seed=1)
    plan = plan_build(str(other), target="cpu-fp32", profile="local", output=tmp_path / "other", verify=False)
    with pytest.raises(ConfigError, match="which are different models"):
        compare(folders["float"], build(plan, SilentProgress()).path, ())


def test_weights_that_are_not_read_back_leave_levels_unmeasured(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    """The same numbers under other names: the original cannot be given them, and that is no pass."""
    folder = copy_artifact(artifacts["int4"], tmp_path / "renamed")
    with Edit(folder) as edit:
        node = next(n for n in edit.nodes("MatMulNBits") if "down_proj" in n.input[1])
        node.input[1] = edit.constant("packed", edit.array(node.input[1]))
    reseal(folder)
    text = str(artifacts["float"].parent / "text")
    made = verify(folder, None, (text,), SilentProgress(), every=True).report
    unmeasured = {m.metric for m in made.measurements if m.status is MeasurementStatus.NOT_MEASURED}
    assert PARITY | {Metric.GENERATE_GAP, Metric.GENERATE_SEEDED} <= unmeasured
    assert {c.metric for c in made.verdict.missed} >= PARITY
    told = next(m.detail for m in made.measurements if m.metric is Metric.PREFILL_MAX_ABS)
    assert "down_proj" in told
    assert "1 weights are stored in a form that cannot be read back, the first" in told
    # Quality needs no weights: it is measured all the same.
    assert next(m for m in made.measurements if m.metric is Metric.TEXT_KL_MEAN).value is not None


def test_bad_input_is_told_before_any_long_work(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """An artifact of a newer llmc, a baseline that is none, a text that is too short to say anything."""
    folder = copy_artifact(artifacts["float"], tmp_path / "newer")
    manifest = folder / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"schema_version": 1,\n  "state"', '"schema_version": 9,\n  "state"')
    )
    with pytest.raises(
        ConfigError, match=r"manifest\.json has schema version 9, but this version of llmc reads only up to 1"
    ):
        verify(folder, None, (), SilentProgress())
    (tmp_path / "notes.txt").write_text("not a report")
    with pytest.raises(ConfigError, match=r"notes\.txt is not a report"):
        verify(artifacts["float"], None, (), SilentProgress(), baseline=tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match="there is no figure 'sise'") as caught:
        verify(artifacts["float"], None, (), SilentProgress(), allow=("sise=2",))
    assert caught.value.hint == "did you mean size?"
    (tmp_path / "short").write_text("Too short.")
    with pytest.raises(ConfigError, match=r"tokens of text and .* positions leave"):
        verify(artifacts["float"], None, (str(tmp_path / "short"),), SilentProgress())


def test_a_task_is_answered_by_both_sides(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """A good artifact in float answers as the original does; the report has it, and no gate asks for it."""
    items = [
        {"question": f"Stone {n} lies in", "choices": ["rivers", "meadow"], "answer": 0} for n in range(6)
    ]
    task = write_task(tmp_path, items)
    text = str(artifacts["float"].parent / "text")
    folder = tmp_path / "out"
    made = verify(
        artifacts["float"], None, (text,), SilentProgress(), tasks=(task,), task_items=4, folder=folder
    ).report
    assert made.verdict.passed
    found = next(m for m in made.measurements if m.metric is Metric.TASK_ACCURACY_CHANGE)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    assert found.detail.startswith("4 items of rivers: ")
    assert "task.accuracy_change" in (folder / "report.md").read_text(encoding="utf-8")


def test_an_original_larger_than_memory_gives_the_same_numbers(
    artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Module by module from disk, with the artifact's own weights as well."""
    text = (str(artifacts["float"].parent / "text"),)
    whole = verify(artifacts["int4"], None, text, SilentProgress()).report
    loaded: list[str] = []
    monkeypatch.setattr(Checkpoint, "fill_reference", lambda *_: loaded.append("whole"))
    monkeypatch.setattr("llmc.pipeline.steps.original.available_memory", lambda: 1000)
    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    streamed = verify(artifacts["int4"], None, text, SilentProgress()).report
    assert loaded == []
    assert streamed.verdict.passed
    for a, b in zip(whole.measurements, streamed.measurements, strict=True):
        assert (a.metric, a.status) == (b.metric, b.status)
        if a.metric is Metric.ORIGINAL_DECODE:  # of a streamed original, fewer steps are compared
            assert max(a.value, b.value) < 1e-5
            continue
        assert a.value == b.value or a.value == pytest.approx(b.value, rel=1e-5, abs=1e-6)
