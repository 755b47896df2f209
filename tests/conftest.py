"""`--without-torch` runs the tests that need none of the heavy packages, and fails if torch is imported."""

import ast
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "onnxruntime", "onnxruntime_genai", "tensorrt", "tensorrt_rtx", "gguf"}
OPTION = "--without-torch"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, action="store_true", help="only tests that need no torch and no runtime")


def pytest_configure(config: pytest.Config) -> None:
    from tests.caches import share

    # Before xdist starts its processes, which take the variables along. Threads that wait for each other's
    # small products cost more than they give, and the processes of xdist fill the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = share()
    if folder is not None:
        config.add_cleanup(folder.cleanup)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    wanted = config.getoption(OPTION) and collection_path.match("test_*.py")
    return True if wanted and needs_heavy(collection_path) else None


@pytest.fixture(autouse=True)
def _no_torch(pytestconfig: pytest.Config) -> Iterator[None]:
    yield
    if pytestconfig.getoption(OPTION):
        assert "torch" not in sys.modules, "this test imports torch, and nothing in its file says so"


@pytest.fixture(scope="session")
def cuda_stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the libraries that stand in for CUDA (`tests.cuda`), and return their folder."""
    from tests.cuda import build_stub

    folder = tmp_path_factory.mktemp("cuda_stub")
    build_stub(folder)
    return folder


@cache
def needs_heavy(file: Path) -> bool:
    """Whether a test needs a heavy package.

    It imports one; or it imports a module of tests, benchmarks or llmc, or uses a fixture of its folder, in
    whose file one is imported.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {name for node in ast.walk(tree) for name in imported(node, file)}
    if any(name.partition(".")[0] in HEAVY for name in names):
        return True
    if file.is_relative_to(ROOT / "llmc"):
        names = {name for node in tree.body for name in imported(node, file)}
    paths = [Path(*name.split(".")).with_suffix(".py") for name in names]
    modules = [folder / path for path in paths for folder in (ROOT, ROOT / "benchmarks")]
    shared = file.with_name("conftest.py")
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    if shared.is_file() and shared != file and arguments & fixtures(shared):
        modules.append(shared)
    return any(module.is_file() and needs_heavy(module) for module in modules)


def imported(node: ast.AST, file: Path) -> list[str]:
    """Full names of the modules, and of what is taken out of them, that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    above = file.relative_to(ROOT).parts[: -node.level] if node.level else ()
    base = ".".join((*above, *([node.module] if node.module else [])))
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def fixtures(file: Path) -> set[str]:
    """Names of the functions of a conftest."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
