"""Code in an artifact runs only if the manifest vouches for it, however a library was smuggled in."""

import ctypes
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import llmc
from llmc.artifact.manifest import MANIFEST
from llmc.artifact.store.folder import digest_file
from llmc.artifact.verdict import CheckStatus
from llmc.backends.compiled.toolchain import TranslationUnit, compile_library, find_compiler
from llmc.backends.onnxruntime.genai import GENAI_CONFIG
from llmc.backends.onnxruntime.tokenizer_worker import Answers, TokenizerQuestion, ask_runtime
from llmc.config import Metric
from llmc.errors import ConfigError, ParityError
from llmc.pipeline import bench, bisect, build, inspect, run, verify
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from tests.caches import own_cache
from tests.models import save_tiny_model

from .sabotage import copy_artifact, reseal

#: Leaves a file as soon as it is loaded, and again where the runtime registers its operators.
SOURCE = """
#include <cstdio>
#include <cstdlib>
static void leave() {{ if (FILE* file = std::fopen("{marker}", "w")) std::fclose(file); }}
__attribute__((constructor)) static void loaded() {{ leave(); }}
extern "C" void* RegisterCustomOps(void*, const void*) {{ leave(); return nullptr; }}
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("native")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CACHE", own_cache(root / "cache"))
        model = save_tiny_model("llama", root / "model", tokenizer=True)
        plan = plan_build(str(model), target="cpu-fp32", profile="local", output=root / "out", verify=False)
        yield build(plan, SilentProgress()).path


@pytest.fixture(scope="module")
def library(good: Path) -> tuple[Path, Path]:
    """A library, and the file that it leaves when it is loaded."""
    marker = good.parent / "it-ran"
    path = good.parent / "evil.so"
    sources = {"evil.cpp": SOURCE.format(marker=marker)}
    path.write_bytes(compile_library(find_compiler(), sources, (TranslationUnit("evil.cpp"),), ("-fPIC",)))
    ctypes.CDLL(str(path))
    marker.unlink()  # the trap works
    return path, marker


def name_library(folder: Path, name: str) -> None:
    path = folder / GENAI_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = name
    path.write_text(json.dumps(config), encoding="utf-8")


def absolute(folder: Path, library: Path) -> None:
    name_library(folder, str(library))
    reseal(folder)


def upwards(folder: Path, library: Path) -> None:
    name_library(folder, os.path.relpath(library, folder))
    reseal(folder)


def link(folder: Path, library: Path) -> None:
    name_library(folder, "kernels.so")
    (folder / "kernels.so").symlink_to(library)
    reseal(folder)


def beside(folder: Path, library: Path) -> None:
    name_library(folder, "kernels.so")
    reseal(folder)
    shutil.copy(library, folder / "kernels.so")


def listed_without_a_record(folder: Path, library: Path) -> None:
    """Every digest fits, and no kernels were compiled for the artifact."""
    name_library(folder, "kernels.so")
    shutil.copy(library, folder / "kernels.so")
    reseal(folder)


def changed(folder: Path, library: Path) -> None:
    """The manifest has a library of this name and size, and another digest."""
    listed_without_a_record(folder, library)
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"]["kernels.so"]["sha256"] = "0" * 64
    facts = {"isa": "AVX2", "compiler": "c++", "source": "0" * 64, "regions": 1, "nodes": 1}
    manifest["kernels"] = {"library": "kernels.so", **facts}
    path.write_text(json.dumps(manifest), encoding="utf-8")


def twice(folder: Path, library: Path) -> None:
    """A key that a reader may take from either place."""
    path = folder / GENAI_CONFIG
    text = path.read_text(encoding="utf-8")
    key = '"log_id": "llmc"'
    name_library(folder, str(library))
    assert key in text
    path.write_text(text.replace(key, f'"custom_ops_library": "{library}", "custom_ops_library": "", {key}'))
    reseal(folder)


COMMANDS: dict[str, Callable[[Path], object]] = {
    "run": lambda folder: run(folder, "Hello", 2, lambda _: None, SilentProgress()),
    "bench": lambda folder: bench(folder, None, SilentProgress()),
    "bisect": lambda folder: bisect(folder, None, SilentProgress()),
}


@pytest.mark.parametrize(
    ("smuggle", "fact"),
    [
        (absolute, r"names the library /.*evil\.so, which the manifest does not"),
        (upwards, r"names the library \.\./.*evil\.so, which the manifest does not"),
        (link, r"kernels\.so is a link to a file outside of the artifact"),
        (beside, r"names the library kernels\.so, which the manifest does not"),
        (listed_without_a_record, r"names the library kernels\.so, which the manifest does not"),
        (changed, r"kernels\.so has changed"),
        (twice, r"names the library /.*evil\.so, which the manifest does not"),
    ],
)
def test_code_that_the_manifest_does_not_vouch_for_never_runs(
    smuggle: Callable[[Path, Path], None],
    fact: str,
    good: Path,
    library: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    path, marker = library
    folder = copy_artifact(good, tmp_path / "artifact")
    smuggle(folder, path)
    for name, command in COMMANDS.items():
        with pytest.raises(ConfigError, match=fact):
            command(folder)
        assert not marker.exists(), name
    verdict = verify(folder, None, (), SilentProgress(), every=True).report.verdict
    (failed,) = (c for c in verdict.checks if c.status is CheckStatus.FAIL)
    assert failed.metric is Metric.FILES
    assert not marker.exists()
    assert "DAMAGED, does not match the manifest: " in inspect(str(folder)).render()


def test_zeroed_weights_are_refused(good: Path, tmp_path: Path) -> None:
    folder = copy_artifact(good, tmp_path / "artifact")
    weights = folder / "model.onnx.data"
    times = weights.stat()
    with weights.open("r+b") as file:
        file.seek(4000)
        file.write(bytes(2000))
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ConfigError, match=r"is damaged: model\.onnx\.data has changed"):
        COMMANDS["run"](folder)
    assert inspect(str(folder)).render().splitlines()[1].endswith("model.onnx.data has changed")


def test_a_graph_may_not_read_other_files(good: Path, tmp_path: Path) -> None:
    import onnx

    folder = copy_artifact(good, tmp_path / "artifact")
    shutil.copy(folder / "model.onnx.data", tmp_path / "secret")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret"
    onnx.save(model, folder / "model.onnx")
    reseal(folder)
    with pytest.raises(ConfigError, match=r"reads tensors from \.\./secret, outside of the artifact"):
        COMMANDS["run"](folder)


def test_what_lies_in_the_folder_is_listed(good: Path, tmp_path: Path) -> None:
    """A file that transformers would pick up, and the manifest itself by a link."""
    folder = copy_artifact(good, tmp_path / "artifact")
    (folder / "added_tokens.json").write_text("{}")
    shutil.move(folder / MANIFEST, tmp_path / MANIFEST)
    (folder / MANIFEST).symlink_to(tmp_path / MANIFEST)
    fact = r"added_tokens\.json is not listed in the manifest; manifest\.json is a link to a place outside"
    with pytest.raises(ConfigError, match=fact):
        COMMANDS["run"](folder)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (
            {"enable_profiling": "notes"},
            "has enable_profiling among its session_options, which no",
        ),
        ({"provider_options": [{"qnn": {}}]}, "has qnn among its provider_options, which no build writes"),
        ({"log_id": "/etc/passwd"}, "names /etc/passwd as log_id, outside of the artifact"),
    ],
)
def test_options_that_no_build_writes_are_refused(
    options: dict[str, object], fact: str, good: Path, tmp_path: Path
) -> None:
    folder = copy_artifact(good, tmp_path / "artifact")
    path = folder / GENAI_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"].update(options)
    path.write_text(json.dumps(config), encoding="utf-8")
    reseal(folder)
    with pytest.raises(ConfigError, match=fact):
        COMMANDS["run"](folder)


def test_a_large_file_is_read_once(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.artifact.store import integrity
    from llmc.artifact.store.folder import open_artifact

    monkeypatch.setenv("LLMC_CACHE", own_cache(tmp_path / "cache"))
    monkeypatch.setattr(integrity, "_REMEMBERED_BYTES", 1 << 16)
    monkeypatch.setattr(integrity, "_SETTLED_SECONDS", 0.0)
    read: list[str] = []
    monkeypatch.setattr(integrity, "digest_file", lambda path: read.append(path.name) or digest_file(path))
    artifact = open_artifact(copy_artifact(good, tmp_path / "artifact"))
    for expected in (1, 1):
        integrity.require_intact(artifact)
        assert read.count("model.onnx.data") == expected
    (artifact.path / "loop").symlink_to("loop")
    with (artifact.path / "model.onnx.data").open("r+b") as file:
        file.write(b"\0")
    with pytest.raises(ConfigError, match=r"is damaged: loop is not listed in the manifest$"):
        integrity.require_intact(artifact)
    (artifact.path / "loop").unlink()
    with pytest.raises(ConfigError, match=r"model\.onnx\.data has changed"):
        integrity.require_intact(artifact)


def test_modules_in_a_folder_are_not_imported(tmp_path: Path) -> None:
    """A child process that works in an artifact takes Python's own modules, not what lies there."""
    (tmp_path / "json.py").write_text("open('it-ran', 'w').close()\n", encoding="utf-8")
    with pytest.raises(ParityError, match="genai_config"):
        Answers.read(TokenizerQuestion((), (), ()), ask_runtime(tmp_path, TokenizerQuestion((), (), ())))
    assert not (tmp_path / "it-ran").exists()


def test_every_child_process_leaves_the_working_folder_out() -> None:
    for file in Path(llmc.__file__).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        # The default of a parameter does not start a process.
        for option in re.findall(r"(?<!= )sys\.executable,(?! sys\.orig_argv) *([^,]*),", text):
            assert option == '"-P"', file
