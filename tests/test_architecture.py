"""Imports go one way, heavy ones stay lazy, and the version is told once."""

import ast
import re
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

import llmc
from llmc.config import METHODS
from llmc.graph.domains import COMPILED, COMPILED_EXACT, COMPILED_PRODUCTS, MICROSOFT, TENSORRT

PACKAGE = Path(llmc.__file__).parent
ROOT = PACKAGE.parent

STATIONS = ("checkpoint", "trace", "passes", "prune", "quantize", "validate", "report")
BASE = {"arrays", "records", "errors", "profile", "config", "strict_json", "limits", "memory", "gpu"}
STATION = BASE | {"architecture", "graph", "artifact", "data", "progress", "children"}

# What each part of the package may import besides itself; every part is listed.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "strict_json": set(),
    "limits": set(),
    "memory": set(),
    "architecture": set(),
    "progress": set(),
    "children": set(),
    "threads": set(),
    "scratch": set(),
    "data": {"errors"},
    "records": set(),
    "arrays": set(),
    "profile": {"records"},
    "gpu": {"errors"},
    "evaluation": {"errors", "records", "data"},
    "config": {"errors", "profile", "records", "evaluation"},
    "document": {"errors"},
    "machine": BASE | {"memory"},
    "catalog": BASE | {"document", "machine"},
    "plan": BASE | {"catalog", "backends", "evaluation"},
    "defaults": BASE | {"catalog", "machine", "backends"},
    "doctor": BASE | {"memory", "backends", "runtime", "children", "servers"},
    "graph": BASE,
    "artifact": BASE | {"graph"},
    "calibration": BASE | {"architecture", "graph", "artifact"},
    "runtime": BASE | {"graph", "artifact"},
    "servers": STATION,
    **dict.fromkeys(STATIONS, STATION),
    "checkpoint": STATION | {"calibration"},
    "passes": STATION | {"runtime"},
    "validate": STATION | {"runtime", "servers"},
    **{station: STATION | {"calibration", "threads"} for station in ("prune", "quantize")},
    # A backend knows how its graphs store weights, and which targets and machines there are.
    "backends": STATION | {"runtime", "quantize", "catalog", "machine", "servers"},
    "pipeline": BASE
    | {
        "architecture",
        "graph",
        "artifact",
        "data",
        "progress",
        "scratch",
        "children",
        "document",
        "catalog",
        "machine",
        "memory",
    }
    | {"calibration", "runtime", "servers", "backends", "evaluation", *STATIONS},
    "cli": BASE
    | {"progress", "scratch", "document", "machine", "catalog", "plan", "defaults", "doctor", "pipeline"}
    | {"servers"}
    | {"__init__"},
    "__main__": {"cli"},
    "__init__": set(),
}


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(file: Path) -> Iterator[str]:
    """Parts of llmc that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level > 0:
            raise AssertionError(f"{file}:{node.lineno}: imports are absolute here")
        elif isinstance(node, ast.ImportFrom) and node.module == "llmc":
            names = [
                f"llmc.{alias.name}" if not alias.name.startswith("__") else "llmc.__init__"
                for alias in node.names
            ]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module]
        for name in names:
            if name == "llmc":
                yield "__init__"
            elif name.startswith("llmc."):
                yield name.split(".")[1]


def violations(file: Path) -> list[str]:
    part = part_of(file)
    if part not in MAY_IMPORT:
        return [f"{part} is not in the order of imports"]
    allowed = MAY_IMPORT[part] | {part, "__init__"}
    return [
        f"{file.relative_to(ROOT)} imports {other}" for other in imported_parts(file) if other not in allowed
    ]


@pytest.mark.parametrize("part", sorted({part_of(file) for file in PACKAGE.rglob("*.py")}))
def test_imports_go_one_way(part: str) -> None:
    files = [file for file in PACKAGE.rglob("*.py") if part_of(file) == part]
    assert [text for file in files for text in violations(file)] == []


def test_the_order_has_no_cycle() -> None:
    order: list[str] = []
    remaining = {part: set(needs) for part, needs in MAY_IMPORT.items()}
    while remaining:
        free = [part for part, needs in remaining.items() if needs <= {*order, "__init__"}]
        assert free, f"a cycle among {sorted(remaining)}"
        order += free
        for part in free:
            del remaining[part]
    assert order.index("cli") > order.index("pipeline") > max(map(order.index, STATIONS))


def test_the_rule_sees_a_station_that_imports_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "llmc" / "quantize"
    folder.mkdir(parents=True)
    (folder / "bad.py").write_text("def late():\n    from llmc import trace\n    import llmc.passes.norm\n")
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path / "llmc")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert violations(folder / "bad.py") == [
        "llmc/quantize/bad.py imports trace",
        "llmc/quantize/bad.py imports passes",
    ]


def executed_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from executed_nodes(node)


def file_of(module: str) -> Path | None:
    """The file of a module of llmc; None for the name of something within a module."""
    path = ROOT.joinpath(*module.split("."))
    found = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in found if file.is_relative_to(PACKAGE) and file.is_file()), None)


def imported_files(file: Path) -> set[Path]:
    """The files of llmc that a file imports at its top and inside functions."""
    found: set[Path | None] = set()
    for node in executed_nodes(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {file_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {file_of(name) or file_of(node.module) for name in names}
    return {each for each in found if each is not None}


def circle() -> list[str]:
    """The files of a circle of imports, each imported by the one before it; empty where there is none."""
    needs = {file: sorted(imported_files(file)) for file in sorted(PACKAGE.rglob("*.py"))}
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        return [str(file.relative_to(ROOT)) for file in reversed(error.args[1])]
    return []


def test_files_import_each_other_in_no_circle() -> None:
    assert circle() == []


def test_the_rule_sees_a_circle_inside_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "llmc"
    folder.mkdir()
    (folder / "first.py").write_text("from llmc.second import late\n")
    (folder / "second.py").write_text("def late():\n    from llmc import third\n")
    back = folder / "third.py"
    monkeypatch.setattr(f"{__name__}.PACKAGE", folder)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    back.write_text("if TYPE_CHECKING:\n    from llmc.first import late\n")
    assert circle() == []
    back.write_text("def late():\n    import llmc.first\n")
    first, second, third = ("llmc/first.py", "llmc/second.py", "llmc/third.py")
    assert set(pairwise(circle())) == {(first, second), (second, third), (third, first)}


def commands_imported() -> list[str]:
    """Imports of a command's file in the folders of `pipeline` that the commands share."""
    shared = [file for room in ("steps", "gate") for file in (PACKAGE / "pipeline" / room).glob("*.py")]
    return [
        f"{file.relative_to(ROOT)} imports {other.name}"
        for file in shared
        for other in sorted(imported_files(file))
        if other.parent == PACKAGE / "pipeline" and other.name not in ("result.py", "__init__.py")
    ]


def test_the_gate_and_the_steps_import_no_command() -> None:
    assert commands_imported() == []


def test_the_rule_sees_a_gate_that_imports_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("steps", "gate"):
        (tmp_path / "llmc" / "pipeline" / room).mkdir(parents=True)
    (tmp_path / "llmc" / "pipeline" / "bisect.py").touch()
    late = "def late():\n    from llmc.pipeline.bisect import graphs\n"
    (tmp_path / "llmc" / "pipeline" / "gate" / "parity.py").write_text(late)
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path / "llmc")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert commands_imported() == ["llmc/pipeline/gate/parity.py imports bisect.py"]


def test_runtimes_are_imported_where_their_telemetry_is_turned_off() -> None:
    allowed = {
        PACKAGE / "runtime" / "libraries.py",
        PACKAGE / "backends" / "onnxruntime" / "tokenizer_worker.py",
    }
    pattern = re.compile(r"^ *(import|from) onnxruntime", re.MULTILINE)
    found = {file for file in PACKAGE.rglob("*.py") if pattern.search(file.read_text(encoding="utf-8"))}
    assert found == allowed
    for file in allowed:
        text = file.read_text(encoding="utf-8")
        assert text.count("disable_telemetry_events()") == len(pattern.findall(text))


def test_operator_domains_are_named_in_one_file() -> None:
    names = {MICROSOFT, TENSORRT, COMPILED, COMPILED_PRODUCTS, COMPILED_EXACT}
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for file in PACKAGE.rglob("*.py")
        if file != PACKAGE / "graph" / "domains.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert found == []


def functions_of(file: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The functions and classes that a file defines at its top level."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node


def body_of(function: ast.FunctionDef) -> str:
    """The parameters' names and the statements of a function, without its docstring and its types."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return f"{names} {[ast.dump(statement) for statement in body]}"


def copies(files: Iterable[Path]) -> list[list[str]]:
    """Places of functions of one name and one body, leading underscores aside."""
    found: dict[tuple[str, str], list[str]] = {}
    for file in sorted(files):
        for node in functions_of(file):
            if isinstance(node, ast.FunctionDef):
                place = f"{file.name}: {node.name}"
                found.setdefault((node.name.lstrip("_"), body_of(node)), []).append(place)
    return [places for places in found.values() if len(places) > 1]


@pytest.mark.parametrize("folder", [PACKAGE, ROOT / "benchmarks"], ids=lambda folder: str(folder.name))
def test_no_function_is_written_twice(folder: Path) -> None:
    assert copies(folder.rglob("*.py")) == []


def test_the_rule_sees_a_copy_under_another_docstring(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("def dims(v):\n    'Sizes.'\n    return v.shape or ()\n")
    (tmp_path / "two.py").write_text("def _dims(v: object) -> object:\n    return v.shape or ()\n")
    (tmp_path / "three.py").write_text("def dims(v):\n    return v.shape\n")
    assert copies(tmp_path.glob("*.py")) == [["one.py: dims", "two.py: _dims"]]


def homonyms(files: Iterable[Path]) -> dict[str, list[str]]:
    """Public classes and functions that several files define under one name, with these files.

    A command is a function of `cli` and one of `pipeline`; each program that is its own process has a `main`.
    """
    found: dict[str, list[str]] = {}
    for file in sorted(files):
        for node in functions_of(file):
            command = isinstance(node, ast.FunctionDef) and (file.parent.name == "cli" or node.name == "main")
            if not command and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(f"{file.parent.name}/{file.name}")
    return {name: places for name, places in found.items() if len(places) > 1}


def test_a_public_name_has_one_definition() -> None:
    assert homonyms(PACKAGE.rglob("*.py")) == {}


def test_the_rule_sees_two_classes_of_one_name(tmp_path: Path) -> None:
    texts = {
        "cli/build.py": "def build(): pass\n",
        "pipeline/build.py": "def build(): pass\nclass Subject: pass\nclass _Run: pass\n",
        "trace/stamp.py": "class Subject: pass\nclass _Run: pass\ndef main(): pass\n",
        "validate/settings.py": "def compare(): pass\ndef main(): pass\n",
        "validate/weights.py": "def compare(): pass\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert homonyms(tmp_path.rglob("*.py")) == {
        "Subject": ["pipeline/build.py", "trace/stamp.py"],
        "compare": ["validate/settings.py", "validate/weights.py"],
    }


def test_helpers_for_graphs_have_one_definition() -> None:
    homes = [PACKAGE / "graph" / name for name in ("match.py", "edit.py")]
    helpers = {node.name for home in homes for node in functions_of(home)}
    assert {"dims_of", "scalar_of", "add_constant", "take_over"} <= helpers
    found = [
        f"{file.relative_to(ROOT)}: {node.name}"
        for file in PACKAGE.rglob("*.py")
        if file not in homes and "import onnx_ir" in file.read_text(encoding="utf-8")
        for node in functions_of(file)
        if node.name.lstrip("_") in helpers
    ]
    assert found == []


def store_imported() -> list[str]:
    """Imports of the store by files that state the records of artifacts."""
    store = PACKAGE / "artifact" / "store"
    return [
        f"{file.relative_to(ROOT)} imports {other.relative_to(store)}"
        for file in (PACKAGE / "artifact").glob("*.py")
        for other in sorted(imported_files(file))
        if other.is_relative_to(store)
    ]


def test_records_of_artifacts_do_not_know_the_store() -> None:
    assert store_imported() == []


def test_the_rule_sees_a_record_that_imports_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "llmc" / "artifact"
    (folder / "store").mkdir(parents=True)
    (folder / "store" / "disk.py").touch()
    (folder / "store" / "lock.py").write_text("from llmc.artifact.store.disk import sync\n")
    (folder / "manifest.py").write_text("def save():\n    from llmc.artifact.store.disk import sync\n")
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path / "llmc")
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert store_imported() == ["llmc/artifact/manifest.py imports disk.py"]


def test_records_have_one_base() -> None:
    stated = [file for file in PACKAGE.rglob("*.py") if 'extra="forbid"' in file.read_text(encoding="utf-8")]
    assert stated == [PACKAGE / "records.py"]


@pytest.mark.parametrize("folder", ["llmc", "tests", "benchmarks"])
def test_files_stay_short(folder: str) -> None:
    files = (ROOT / folder).rglob("*.py")
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {str(file.relative_to(ROOT)): count for file, count in lines.items() if count > 450} == {}


def long_functions(files: Iterable[Path]) -> list[str]:
    """Functions of more than 80 lines, counted from their first line to their last."""
    return [
        f"{file.parent.name}/{file.name}: {node.name} has {lines} lines"
        for file in sorted(files)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > 80
    ]


def test_functions_stay_short() -> None:
    assert long_functions(PACKAGE.rglob("*.py")) == []


def test_the_rule_sees_a_long_method(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("class A:\n    def f(self):\n" + "        pass\n" * 80)
    (tmp_path / "short.py").write_text("def f():\n" + "    pass\n" * 79)
    assert long_functions(tmp_path.glob("*.py")) == [f"{tmp_path.name}/long.py: f has 81 lines"]


def test_no_method_of_quantization_is_named_outside_its_config_class() -> None:
    # Names in checkpoint/ and config/checkpoint.py are those of formats that other tools have.
    own = {PACKAGE / "config" / "method.py", PACKAGE / "config" / "checkpoint.py"}
    elsewhere = (file for file in PACKAGE.rglob("*.py") if file not in own and part_of(file) != "checkpoint")
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {node.value}"
        for file in elsewhere
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in METHODS
    ]
    assert found == []


def test_the_changelog_tells_the_version() -> None:
    top = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert top is not None
    assert top.group(1) == llmc.__version__
