"""A backend is asked what it does, never which one it is."""

import ast
import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmc.artifact.manifest import Manifest
from llmc.backends import backend_of, backends
from llmc.backends.base import Backend, BackendOutput
from llmc.catalog import list_targets
from llmc.config import BackendName, Target
from tests.test_architecture import PACKAGE, ROOT, part_of

#: What tells backends apart: fields of a target and of a manifest, and the graph that one of them asks for.
KIND = {"backend", "engine", "engines", "kernels", "provider", "static_cache"}


def questions_of_kind(file: Path) -> list[str]:
    """Comparisons and tests of what tells backends apart."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        tests: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            tests = [node.left, *node.comparators]
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            tests = [node.test]
        elif isinstance(node, ast.BoolOp):
            tests = list(node.values)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            tests = [node.operand]
        for test in tests:
            if isinstance(test, ast.Attribute) and test.attr in KIND:
                found.append(f"{file.relative_to(ROOT)}:{test.lineno}: {ast.unparse(test)}")
    return found


def test_no_one_asks_a_backend_which_it_is() -> None:
    # artifact/ validates its own records; runtime/, passes/ and validate/ ask a graph how its KV cache grows.
    outside = {"backends", "config", "artifact"}
    graphs = {"runtime", "passes", "validate", "graph"}
    found = []
    for file in PACKAGE.rglob("*.py"):
        if part_of(file) not in outside:
            asked = questions_of_kind(file)
            found += [q for q in asked if part_of(file) not in graphs or not q.endswith(".static_cache")]
    assert found == []


def test_the_rule_sees_a_question_of_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bad.py"
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    file.write_text("a = target.engine\nb = f(target.engine)\n")
    assert questions_of_kind(file) == []
    file.write_text("if target.kernels == 'compiled' or not m.engines or (x and t.backend is B): pass\n")
    assert {q.split()[-1] for q in questions_of_kind(file)} == {"m.engines", "target.kernels", "t.backend"}


def shipped_targets() -> list[Target]:
    return [each.document for each in list_targets()]


def test_every_backend_is_found_and_has_a_target_that_ships() -> None:
    found = {(target.backend, target.kernels): type(backend_of(target)) for target in shipped_targets()}
    assert {name for name, _ in found} == set(BackendName)
    assert {kernels for _, kernels in found} == {"onnxruntime", "compiled"}
    assert len(set(found.values())) == len(found)
    assert set(found.values()) == {type(backend) for backend in backends()} == concrete(Backend)


def test_what_a_backend_made_are_fields_of_the_manifest() -> None:
    optional = {name for name, field in Manifest.model_fields.items() if not field.is_required()}
    assert {"kernels", "engines"} <= set(BackendOutput().records()) <= optional


def concrete(kind: type) -> set[type]:
    """The class and what is derived from it, but for those that are abstract."""
    own = set() if inspect.isabstract(kind) else {kind}
    return own.union(*(concrete(each) for each in kind.__subclasses__()))


@pytest.mark.parametrize("target", shipped_targets(), ids=lambda target: target.name)
def test_a_backend_answers_what_needs_no_artifact(target: Target) -> None:
    backend = backend_of(target)
    slots = backend.capacity(target)
    assert slots is None or slots > 1
    assert isinstance(backend.served_by_genai, bool)
    assert isinstance(backend.several_profiles, bool)
    assert isinstance(backend.rounds_attention, bool)
    assert backend.serving_file.endswith(".json")
    assert find_spec(backend.graph_library) is not None
    bits = backend.quantizer(target).bits
    assert bits is None or 1 < bits <= 8
    for restart in (None, 4097, 12345):
        obstacle = backend.switch_obstacle(target, restart)
        assert obstacle is None or (obstacle and not obstacle.endswith(".") and obstacle[0].islower())
