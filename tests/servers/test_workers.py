"""Each server that can be installed has rows of what it takes, and programs that its environment can run."""

import ast
import sys
from pathlib import Path

import pytest

import llmc.servers
from llmc.servers.recipes import RECIPES
from llmc.servers.support_table import SCHEMES
from llmc.servers.support_terms import Runtime

FOLDER = Path(llmc.servers.__file__).parent
#: What environments have besides the standard library, and what belongs to one server.
SHARED = {"numpy", "torch", "safetensors", "transformers"}
OWN = {"vllm": {"vllm"}, "edgellm": {"tensorrt_edgellm"}, "deepspeed": {"deepspeed"}}
PROGRAMS = {
    **{f"worker_{name}.py": SHARED | OWN.get(name, set()) for name in RECIPES},
    "worker.py": {"numpy"},
    "vllm_layout.py": SHARED | OWN["vllm"],
    "deepspeed_launcher.py": SHARED | OWN["deepspeed"],
}


def imported(file: Path) -> set[str]:
    """Packages that a program imports when it runs; what only a type checker reads is left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.name} is a program, and belongs to no package"
            names.add(str(node.module).partition(".")[0])
    return names


@pytest.mark.parametrize("name", RECIPES)
def test_a_server_that_can_be_installed_has_rows_and_a_worker(name: str) -> None:
    assert any(runtime is Runtime(name) for runtime, _ in SCHEMES)
    worker = ast.parse((FOLDER / f"worker_{name}.py").read_text(encoding="utf-8"))
    mains = [node for node in worker.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert [argument.arg for main in mains for argument in main.args.args] == ["request", "channel"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_for_other_environments_import_what_those_have(program: str) -> None:
    assert imported(FOLDER / program) - set(sys.stdlib_module_names) <= PROGRAMS[program]
