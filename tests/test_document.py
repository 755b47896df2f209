"""YAML into strict models: what is read, and what each error says."""

import re
from pathlib import Path

import pytest

from llmc.config import Metric, Target
from llmc.document import Extension, find_origins, load_document, render_document
from llmc.errors import ConfigError
from llmc.profile import Profile

GOOD = """\
schema_version: 1
name: mine
summary: a target
backend: onnxruntime
provider: cpu
dtype: float32
logits: last
passes:
  - name: rms-norm
    per_layer: [1, 2]
quantize: null
gates:
  - metric: prefill.max_abs
    max: 1e-3
    reason: one reason is as good as ten
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def refusal(folder: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_document(write(folder, text), Target)
    assert str(folder) in caught.value.fact
    return caught.value


def test_lists_become_tuples_and_exponents_numbers(tmp_path: Path) -> None:
    target = load_document(write(tmp_path, GOOD), Target)
    assert target.passes[0].per_layer == (1, 2)
    assert target.gates[0].max == 0.001
    assert target.quantize is None


def test_types_stay_strict(tmp_path: Path) -> None:
    error = refusal(tmp_path, GOOD.replace("max: 1e-3", 'max: "1e-3"'))
    assert "mine.yaml:14: gates.0.max is '1e-3': Input should be a valid number" in error.fact


@pytest.mark.parametrize(
    ("old", "new", "fact", "hint"),
    [
        ("provider:", "providor:", "mine.yaml:5: unknown key providor", "did you mean provider?"),
        ("    max:", "    maxx:", "mine.yaml:14: unknown key gates.0.maxx", "did you mean max?"),
        ("summary: a target\n", "", "mine.yaml:1: key summary is missing", None),
        (
            "cpu\n",
            "cpuu\n",
            "mine.yaml:5: provider is 'cpuu', which is not known",
            "did you mean cpu or cuda?",
        ),
        (
            "prefill.max_abs",
            "prefil.max_abs",
            "mine.yaml:13: gates.0.metric is 'prefil.max_abs', which is not known",
            "did you mean prefill.max_abs or",
        ),
        (
            "logits: last",
            "logits: lst",
            "mine.yaml:7: logits is 'lst', which is not known",
            "did you mean last?",
        ),
        ("    max: 1e-3", "    max: 1\n    min: 2", "gates.0: give exactly one of max and min", None),
        ("[1, 2]", "many", "mine.yaml:10: passes.0.per_layer is 'many': ", None),
        ("logits: last", "name: again", "mine.yaml:7: key name was already given in line 2", None),
        ("logits: last", "logits: last: x", "mine.yaml:7 is not valid YAML: mapping values", None),
        ("logits: last", "logits: !!set {a}", "cannot express", None),
        ("summary: a target", "summary: &x [*x]", "mine.yaml:3: this node is an alias of itself", None),
        (GOOD, "", "mine.yaml is empty", "copy one that ships"),
        (GOOD, "just words", "the document is 'just words'", None),
    ],
)
def test_an_error_names_the_place(tmp_path: Path, old: str, new: str, fact: str, hint: str | None) -> None:
    assert old in GOOD
    error = refusal(tmp_path, GOOD.replace(old, new, 1))
    assert fact in error.fact
    assert (error.hint or "").startswith(hint or "")
    assert (error.hint is None) == (hint is None)


def test_several_problems_are_counted(tmp_path: Path) -> None:
    assert refusal(tmp_path, "name: mine").fact.endswith("(and 8 more)")


def test_a_word_is_not_a_boolean(tmp_path: Path) -> None:
    assert load_document(write(tmp_path, GOOD.replace("a target", "no")), Target).summary == "no"


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_document(tmp_path / "absent.yaml", Target)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_document(tmp_path / "latin.yaml", Target)


BOMB = "\n".join(["a0: &a0 x", *(f"a{i}: &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]" for i in range(1, 40))])


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        (BOMB, "values with its aliases expanded; the maximum is 100,000"),
        ("[" * 5000, "nested too deeply"),
        (f"name: {'1' * 5000}", "is not valid YAML: .*digits"),
        (GOOD.replace("1e-3", "1e999"), "contains a value that JSON cannot express: Out of range"),
        ("#" * (1 << 21), "has 2,097,152 bytes"),
    ],
)
def test_hostile_documents(text: str, fact: str, tmp_path: Path) -> None:
    assert re.search(fact, refusal(tmp_path, text).fact)


def test_a_profile_needs_its_sources(tmp_path: Path) -> None:
    text = "schema_version: 1\nname: mine\nkind: gpu\ndevice: X\nmemory_gib: 8\ndense: {fp16: 1.0}\n"
    with pytest.raises(ConfigError, match="no source for dense, memory_gib"):
        load_document(write(tmp_path, text), Profile)


def test_rendered_text_reads_back(tmp_path: Path) -> None:
    target = load_document(write(tmp_path, GOOD), Target)
    assert load_document(write(tmp_path, render_document(target)), Target) == target


BASE = """\
schema_version: 1
logits: last
passes: []
quantize: {accuracy_level: 4, rules: []}
gates:
  - metric: files.mismatches
    max: 0
    reason: "of the base, as every one"
  - metric: text.kl_mean
    max: 0.5
    reason: "of the base, to be tightened"
"""
OWN = """\
name: mine
summary: "one of mine"
extends: _base
backend: onnxruntime
provider: cpu
dtype: float32
quantize: {rules: [{scheme: {bits: 4, block_size: 32, symmetric: false, method: rtn}}]}
gates:
  - {metric: text.kl_mean, max: 0.1}
  - {metric: graph.mismatches, max: 0, reason: "my own, in its place"}
"""


def extended(folder: Path, own: str = OWN, base: str = BASE) -> tuple[Path, Extension]:
    (folder / "_base.yaml").write_text(base)
    (folder / "mine.yaml").write_text(own)

    def find(name: str, file: Path) -> Path:
        if not (found := file.with_name(f"{name}.yaml")).is_file():
            raise ConfigError(f"no target is named {name}")
        return found

    return folder / "mine.yaml", Extension(find, {"gates": ("metric", [m.value for m in Metric])})


def test_a_document_adds_to_the_one_that_it_extends(tmp_path: Path) -> None:
    path, extension = extended(tmp_path)
    target = load_document(path, Target, extension)
    assert target.quantize is not None
    assert (target.logits, target.quantize.accuracy_level, len(target.quantize.rules)) == ("last", 4, 1)
    assert [(g.metric.value, g.max, g.reason[:6]) for g in target.gates] == [
        ("files.mismatches", 0, "of the"),
        ("graph.mismatches", 0, "my own"),
        ("text.kl_mean", 0.1, "of the"),
    ]
    origins = find_origins(path, extension)
    names = {"/".join(keys): file.name for keys, file in origins.items()}
    assert (names["logits"], names["dtype"]) == ("_base.yaml", "mine.yaml")
    assert (names["quantize/accuracy_level"], names["quantize/rules"]) == ("_base.yaml", "mine.yaml")
    assert (names["gates/files.mismatches"], names["gates/text.kl_mean"]) == ("_base.yaml", "mine.yaml")
    shown = render_document(target, origins)
    assert "logits: last  # _base.yaml" in shown
    assert "- metric: graph.mismatches  # mine.yaml" in shown
    assert load_document(write(tmp_path, shown), Target) == target


@pytest.mark.parametrize(
    ("own", "base", "told"),
    [
        (OWN.replace("dtype", "dtipe"), BASE, r"mine.yaml:6: unknown key dtipe"),
        (OWN, BASE.replace("logits", "logit"), r"_base.yaml:2: unknown key logit.*, which .* extends"),
        (OWN.replace("max: 0.1", "min: 0.1"), BASE, r"mine.yaml:9: gates.2.*give exactly one of"),
        (OWN.replace("_base", "_other"), BASE, r"mine.yaml:3: extends _other: no target is named _other"),
        (OWN.replace("_base", "[_base]"), BASE, r"mine.yaml:3: extends needs the name of one document"),
        (OWN, BASE + "extends: mine", r"extends mine: a document extends itself: .* extends .*mine.yaml"),
        (OWN.replace("graph.mism", "text.kl_mean #"), BASE, r"mine.yaml:\d+ is not valid YAML"),
        (OWN.replace("graph.mismatches", "text.kl_mean"), BASE, r"mine.yaml:9: each entry .* needs a metric"),
        (OWN + "? [a, b]\n: c\n", BASE, r"mine.yaml:11: a key of this document is a list or a mapping"),
        (OWN.split("gates:")[0] + "gates: null\n", BASE, r"mine.yaml:8: gates is None: .*"),
        (OWN, BASE.replace("quantize:", "quantize: ["), r"extends _base: .*_base.yaml:\d+ is not valid"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_the_file_that_states_it(
    own: str, base: str, told: str, tmp_path: Path
) -> None:
    path, extension = extended(tmp_path, own, base)
    with pytest.raises(ConfigError, match=told):
        load_document(path, Target, extension)
