"""`llmc tune`: constraints, what is remembered, what a kill leaves, a target that builds the same."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmc.artifact.store.folder import open_artifact
from llmc.artifact.store.lock import output_lock
from llmc.artifact.verdict import Measurement, MeasurementStatus
from llmc.catalog import load_target
from llmc.cli import main
from llmc.config import Gate, Metric, Target
from llmc.data import eval_text
from llmc.document import render_document
from llmc.errors import ConfigError, LatencyError, LlmcError, ParityError, ResourceError, UnsupportedError
from llmc.pipeline import build, plan_tune, tune
from llmc.pipeline.tune import plan as tune_plan
from llmc.pipeline.tune import workbench
from llmc.pipeline.tune.candidates import Space, describe
from llmc.pipeline.tune.plan import parse_seconds
from llmc.pipeline.tune.restate import restate_gates
from llmc.pipeline.tune.tune import TuneResult
from llmc.pipeline.tune.workbench import Level
from llmc.plan import plan_build
from llmc.progress import Progress, SilentProgress
from tests.caches import own_cache
from tests.models import EOS, save_tiny_model
from tests.notes import Notes

REASON = "a tiny random model in 4 and 8 bits"


LEVELS = (Level(windows=4, samples=1, rounds=1), Level(windows=8, samples=1, rounds=1))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a short text, and a cache folder, so that the model is traced once."""
    folder = tmp_path_factory.mktemp("home")
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 128}
    save_tiny_model("llama", folder / "model", tokenizer=True, eos_token_id=EOS, **sizes)
    (folder / "text").write_text(eval_text()[:2500])
    return folder


@pytest.fixture(autouse=True)
def _own_tunings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMC_CACHE", own_cache(home / "cache"))
    monkeypatch.setattr(tune_plan, "LEVELS", LEVELS)
    shutil.rmtree(home / "cache" / "tune", ignore_errors=True)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders that candidates were built in, one for each build."""
    made: list[str] = []
    real = workbench.build

    def counted(plan: object, progress: object) -> object:
        made.append(plan.output.name)
        return real(plan, progress)

    monkeypatch.setattr(workbench, "build", counted)
    return made


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder for --path with a base target `small` and a profile `one`."""
    gates = (
        Gate(metric=Metric.PREFILL_MAX_ABS, max=1e-3, reason=REASON),
        Gate(metric=Metric.WEIGHTS_SNR, min=90, reason=REASON),
        Gate(metric=Metric.TEXT_TOP1, min=0.01, reason=REASON),
    )
    base = load_target("cpu-int4").model_copy(update={"name": "small", "gates": gates})
    folder = tmp_path / "mine"
    (folder / "targets").mkdir(parents=True)
    (folder / "targets" / "small.yaml").write_text(render_document(base))
    (folder / "profiles").mkdir()
    (folder / "profiles" / "one.yaml").write_text(
        "{schema_version: 1, name: one, kind: cpu, device: one thread, threads: 1}"
    )
    return folder


Tune = Callable[..., TuneResult]


@pytest.fixture
def run(home: Path, mine: Path) -> Tune:
    """Tunes the model around `small`, by default three candidates."""

    def tune_it(progress: Progress | None = None, **asked: object) -> TuneResult:
        settings: dict[str, object] = {
            "most": 3,
            "budget": "1h",
            "output": mine / "targets" / "best.yaml",
            "eval_text": (str(home / "text"),),
        }
        plan = plan_tune(
            str(home / "model"),
            targets="small",
            profile="one",
            path=mine,
            **{**settings, **asked},
        )
        return tune(plan, progress or SilentProgress())

    return tune_it


def test_the_written_target_builds_the_same_and_nothing_is_measured_twice(
    run: Tune, home: Path, mine: Path, tmp_path: Path, builds: list[str]
) -> None:
    report = tmp_path / "report"
    result = run(report=report)
    assert result.failure() is None
    tuning = result.tuning
    assert builds.count("base") == 1
    assert builds.count("candidate") == 3  # the anchor that is the base is known
    assert len(tuning.candidates) + len(tuning.refused) == 4
    assert tuning.candidates[0].step_ratio == tuning.candidates[0].first_ratio == 1
    chosen = tuning.find(str(tuning.chosen))
    assert chosen.kl == min(c.kl for c in tuning.candidates)  # nothing is asked: the most faithful
    assert "8x32s" in chosen.label
    assert chosen.digest in tuning.front

    plan = plan_build(str(home / "model"), target="best", profile="one", output=tmp_path / "again", path=mine)
    rebuilt = build(plan, SilentProgress())
    assert rebuilt.failure() is None
    files = open_artifact(tmp_path / "again").manifest.files
    assert {name: f.sha256 for name, f in files.items() if name.startswith("model.onnx")} == chosen.model
    assert set(chosen.model) == {"model.onnx", "model.onnx.data"}
    gates = {gate.metric: gate for gate in plan.target.gates}
    assert gates[Metric.PREFILL_MAX_ABS].reason == REASON
    assert gates[Metric.TEXT_TOP1].min == 0.01
    assert 30 < gates[Metric.WEIGHTS_SNR].min < 90
    assert "was measured by llmc tune" in gates[Metric.WEIGHTS_SNR].reason

    assert json.loads((report / "tuning.json").read_text()) == json.loads(tuning.model_dump_json())
    page = (report / "tuning.html").read_text()
    assert page.count("<svg") == 3
    assert page.count("CHOSEN") == 1
    text = result.render()
    assert f"llmc build {home / 'model'} --target best --profile one --path {tmp_path / 'mine'}" in text
    assert "CHOSEN" in text
    left = {p.name for p in (home / "cache" / "tune").rglob("*") if p.is_dir()}
    assert not left & {"base", "candidate", "chosen"}

    # The same tuning again: nothing is done.
    before = len(builds)
    assert run().tuning == tuning
    assert builds[before:] == []
    # Another question: a search of its own, and figures that are known.
    # A candidate that is the fastest this time is measured on more windows if it had dropped out before.
    bounded = run(max_kl=5.0).tuning
    known = {c.digest: c for c in tuning.candidates}
    assert {c.digest for c in bounded.candidates} == set(known)
    risen = [c for c in bounded.candidates if c.level > known[c.digest].level]
    assert builds[before:].count("candidate") == len(risen)
    assert len(list((home / "cache" / "tune").rglob("study.log"))) == 2
    for number in range(8):  # tunings of other days, the first of them under way in another process
        other = home / "cache" / "tune" / f"other{number}"
        other.mkdir()
        (other / "study.log").write_text("")
        os.utime(other, (number + 1, number + 1))
    with output_lock(home / "cache" / "tune" / "other0" / ".lock", home):
        os.utime(home / "cache" / "tune" / "other0", (1, 1))
        run(max_kl=5.0)
    left = {p.parent.name for p in (home / "cache" / "tune").rglob("study.log")}
    assert {p for p in left if p.startswith("other")} == {f"other{n}" for n in (0, 2, 3, 4, 5, 6, 7)}
    taken = bounded.find(str(bounded.chosen))
    assert taken.step_ratio == min(c.step_ratio for c in bounded.candidates)
    assert taken.kl == known[taken.digest].kl or taken in risen
    gates = {gate.metric: gate for gate in load_target("best", mine).gates}
    assert gates[Metric.TEXT_KL_MEAN].max == 5.0


class Killed(Notes):
    """Interrupts as Ctrl-C would, when the candidate of this number has been told of."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def note(self, text: str) -> None:
        super().note(text)
        if text.lstrip().startswith(f"{self.at} "):
            raise KeyboardInterrupt


def test_a_killed_tuning_goes_on(
    run: Tune, home: Path, mine: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Killed(2)
    with pytest.raises(KeyboardInterrupt):
        run(progress, max_size=0.001)
    assert progress.notes[-1] == "the measurements are kept: the same command continues from here"
    assert not (mine / "targets" / "best.yaml").exists()
    before = builds.count("candidate")
    assert before == 2

    # Killed in the midst of a candidate: its trial was begun, and its artifact never came to be.
    real, under_way = workbench.build, []

    def killed(plan: object, progress: object) -> object:
        if plan.output.name == "candidate":
            under_way.append(describe(plan.target))
            raise KeyboardInterrupt
        return real(plan, progress)

    with monkeypatch.context() as patch:
        patch.setattr(workbench, "build", killed)
        with pytest.raises(KeyboardInterrupt):
            run(max_size=0.001)
    journal = next((home / "cache" / "tune").rglob("study.log"))
    with journal.open("ab") as file:
        file.write(b'{"op_code":')  # half a line
    result = run(max_size=0.001)
    assert len(result.tuning.candidates) + len(result.tuning.refused) == 4
    assert builds.count("candidate") == before + 1
    labels = [c.label for c in result.tuning.candidates] + [r.label for r in result.tuning.refused]
    assert len(under_way) == 1
    assert under_way[0] in labels


def _bounded(run: Tune, **asked: float) -> LlmcError | None:
    result = run(**asked)
    assert (result.target is None) == (result.failure() is not None)
    return result.failure()


def test_constraints_that_nothing_meets_are_refused_with_the_nearest(
    run: Tune, home: Path, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missed = _bounded(run, max_kl=1e-7, most=1)
    assert type(missed) is ParityError
    assert missed.fact.startswith("none of 2 candidates meets the constraints; the nearest is ")
    assert "at most 1e-07 is requested" in missed.fact
    missed = _bounded(run, min_tok_s=1e9, most=1)
    assert type(missed) is LatencyError
    assert "at least 1000000000.0 are requested" in missed.fact
    missed = _bounded(run, max_size=0.001, most=1)
    assert type(missed) is ParityError
    assert "MB, at most 0.001 MB are requested" in missed.fact
    arguments = [str(home / "model"), "--target", "small", "--profile", "one", "--path", str(mine), "--json"]
    arguments += ["--candidates", "1", "--eval-text", str(home / "text"), "--min-tok-s", "1e9"]
    arguments += ["-o", str(mine / "targets" / "fast.yaml")]
    with pytest.raises(SystemExit) as caught:
        main(["tune", *arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 6
    assert json.loads(captured.out)["target"] is None
    assert "error: none of 2 candidates meets the constraints" in captured.err, captured.err
    assert [p.name for p in (mine / "targets").iterdir()] == ["small.yaml"]


def test_what_is_wrong_is_not_taken(
    run: Tune, home: Path, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the text from standard input, which can be read once only."""
    gates = (Gate(metric=Metric.PREFILL_MAX_ABS, max=1e-12, reason=REASON),)
    base = load_target("small", mine).model_copy(update={"gates": gates})
    (mine / "targets" / "small.yaml").write_text(render_document(base))
    progress = Notes()
    with (home / "text").open(encoding="utf-8") as text:
        monkeypatch.setattr(sys, "stdin", text)
        failure = run(progress, most=1, eval_text=("-",)).failure()
    assert type(failure) is ParityError
    assert failure.fact.startswith("of 2 candidates, none that meets the constraints passes the gates of its")
    refused = [note for note in progress.notes if "is rejected: " in note]
    assert len(refused) == 2
    assert all("the artifact misses 1 of its gates: prefill.max_abs" in note for note in refused)
    assert not (mine / "targets" / "best.yaml").exists()


def test_optuna_is_an_extra(run: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ResourceError, match="optuna, which proposes candidates, is not") as caught:
        run()
    assert caught.value.hint == "pip install 'llmc[tune]'"


def test_bad_input(run: Tune, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"best.yaml would not be found as a target"):
        run(output=tmp_path / "best.yaml")
    with pytest.raises(ConfigError, match="--max-kl -1 is not above zero"):
        run(max_kl=-1.0)
    for text in ("", "soon", "0s", "-3m"):
        with pytest.raises(ConfigError, match="is not a time"):
            parse_seconds(text)
    assert [parse_seconds(text) for text in ("90s", "30m", "1.5h", "7")] == [90, 1800, 5400, 7]
    shipped = {name: load_target(name) for name in ("cpu-fp32", "cuda-int4", "cpu-int4")}
    with pytest.raises(ConfigError, match="target cpu-fp32 has no general scheme for weights"):
        Space.around((shipped["cpu-fp32"],))
    with pytest.raises(UnsupportedError, match="target cuda-int4 runs on a GPU"):
        Space.around((shipped["cuda-int4"],))
    with pytest.raises(ConfigError, match="--target cpu-int4,cpu-int4 names a target twice"):
        Space.around((shipped["cpu-int4"], shipped["cpu-int4"]))


@contextmanager
def _chosen(choices: dict[str, object]) -> Iterator[Callable[[str, object], object]]:
    """Takes what is stated, and finds that nothing stated was left over."""
    taken: set[str] = set()

    def choose(name: str, options: object) -> object:
        taken.add(name)
        assert choices[name] in options
        return choices[name]

    yield choose
    assert taken == set(choices)


@pytest.mark.parametrize(
    "name",
    [
        *("cpu-int4", "cpu-int8", "cpu-int4-gptq", "cpu-mixed"),
        *("cpu-int4-compiled", "cpu-int8-compiled", "cpu-mixed-compiled"),
    ],
)
def test_a_base_is_one_of_its_candidates(name: str) -> None:
    base = load_target(name)
    space = Space.around((base,))
    targets = []
    for choices in space.anchors():
        with _chosen(choices) as choose_:
            targets.append(space.target(choose_))
    assert targets[0] == base
    assert all(Target.model_validate_json(t.model_dump_json()) == t for t in targets)
    assert describe(targets[-1]).startswith(f"{name}, 5.2 bits allocated, mse")


def test_several_bases_bring_their_own_passes_and_kernels() -> None:
    bases = (load_target("cpu-int4"), load_target("cpu-int4-compiled"))
    space = Space.around(bases)
    made = []
    for choices in space.anchors():
        with _chosen(choices) as choose_:
            made.append(space.target(choose_))
    assert [t.kernels for t in made[:2]] == ["onnxruntime", "compiled"]
    assert made[:2] == list(bases)


def test_gates_are_restated_only_where_they_would_be_missed() -> None:
    def measured(metric: Metric, value: float, low: float | None = None, high: float | None = None):
        status = MeasurementStatus.MEASURED
        return Measurement(metric=metric, value=value, low=low, high=high, status=status, detail="", where="")

    gates = tuple(
        Gate(metric=metric, reason=REASON, **bound)
        for metric, bound in (
            (Metric.PREFILL_MAX_ABS, {"max": 1e-3}),
            (Metric.TEXT_KL_MEAN, {"max": 0.2}),
            (Metric.TEXT_TOP1, {"min": 0.9}),
            (Metric.TEXT_PERPLEXITY_RATIO, {"max": 1.5}),
        )
    )
    found = (
        measured(Metric.PREFILL_MAX_ABS, 5.0),
        measured(Metric.TEXT_KL_MEAN, 0.19, 0.18, 0.25),
        measured(Metric.TEXT_TOP1, 0.8, 0.7, 0.85),
        measured(Metric.TEXT_PERPLEXITY_RATIO, 1.2, 1.1, 1.3),
    )
    made = restate_gates(gates, found, None)
    assert [(g.metric, g.max, g.min) for g in made] == [
        (Metric.PREFILL_MAX_ABS, 1e-3, None),
        (Metric.TEXT_KL_MEAN, 0.275, None),
        (Metric.TEXT_TOP1, None, 0.63),
        (Metric.TEXT_PERPLEXITY_RATIO, 1.5, None),
    ]
    asked = restate_gates(gates, found, 0.3)
    assert [g.max for g in asked if g.metric is Metric.TEXT_KL_MEAN] == [0.3]
