"""YAML into strict models: what is read, and what each error says."""

import re
from pathlib import Path

import pytest

from llmc.config import Target
from llmc.document import load_document, render_document
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
