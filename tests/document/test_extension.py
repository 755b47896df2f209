"""Documents that extend another one: what is merged, where each value is from, and what errors say."""

from pathlib import Path

import pytest

from llmc.config import Metric, Target
from llmc.document import Extension, find_origins, load_document, render_document
from llmc.errors import ConfigError

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
    copy = path.with_name("shown.yaml")
    copy.write_text(shown, encoding="utf-8")
    assert load_document(copy, Target) == target


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
