"""Build the same model with other tools, as their users build it.

onnxruntime-genai's builder runs beside llmc. Each other tool has its own environment below the cache folder,
which is created on first use with the versions in RECIPES; PIP_ARGS is passed to every pip install, as in the
Makefile.
"""

import os
import shlex
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from llmc.progress import PlainProgress
from llmc.servers.environment import install_server, python_of
from llmc.servers.recipes import PipCall, Recipe, install

#: Settings of onnxruntime-genai's builder: precision and `key=value` of --extra_options. `int4` is block 32
#: with int8 activations; `int4-tuned` adds what its documentation offers for speed.
GENAI = {
    "fp32": ("fp32", ()),
    "int8": ("int8", ()),
    "int4": ("int4", ("int4_block_size=32", "int4_accuracy_level=4")),
    "int4-tuned": (
        "int4",
        ("int4_block_size=32", "int4_accuracy_level=4", "prune_lm_head=true", "fuse_mlp_gate_up=true"),
    ),
    "k_quant_mixed": ("int4", ("algo_config=k_quant_mixed", "int4_accuracy_level=4")),
}
#: The types of llama.cpp's quantizer.
LLAMA = ("Q4_0", "Q4_K_M", "Q8_0")
#: The options of `optimum-cli export openvino`.
OPENVINO = {
    "int4": ("--weight-format", "int4", "--group-size", "32", "--sym", "--ratio", "1.0"),
    "int8": ("--weight-format", "int8"),
}
NAMES = (
    *(f"genai-{name}" for name in GENAI),
    *(f"llama-{name}" for name in LLAMA),
    *(f"openvino-{name}" for name in OPENVINO),
)
_LLAMA = "llama-cpp-python==0.3.36"
#: No model here has vision, and torchvision for CUDA does not load beside torch for CPUs.
RECIPES = {
    "llama": Recipe("llama", "llama-cpp-python", "0.3.36", (install(_LLAMA),)),
    "openvino": Recipe(
        "openvino",
        "openvino-genai",
        "2026.4.1.0",
        (
            install("torch==2.13.0", "optimum-intel==2.2.0", "openvino-genai==2026.4.1.0"),
            PipCall(("uninstall", "-y", "torchvision")),
        ),
    ),
    "quantizers": Recipe(
        "quantizers",
        "llmcompressor",
        "0.14.0.1",
        (install("torch==2.13.0", "llmcompressor==0.14.0.1", "auto-round==0.15.1"),),
    ),
}
SENTENCEPIECE = "sentencepiece==0.2.1"


@dataclass(frozen=True)
class Peer:
    """The model of another tool.

    Args:
        runtime: Name of the runtime in worker.py.
        python: The interpreter of an environment that has the runtime.
        model: The model argument of the runtime.
        bytes: Size of weights and graph.
    """

    runtime: str
    python: Path
    model: Path
    bytes: int


def build_peer(name: str, source: Path, cache: Path) -> Peer:
    """Build one of NAMES from a Hugging Face folder on first use."""
    runtime, _, setting = name.partition("-")
    output = cache / f"{source.name}-{name}"
    if runtime == "genai":
        if not (output / "genai_config.json").is_file():
            _call(genai_command(source, output, setting))
        return Peer(runtime, Path(sys.executable), output, model_bytes(output))
    python = make_environment(runtime, cache)
    if runtime == "llama":
        file = output.with_suffix(".gguf")
        if not file.is_file():
            _quantize_gguf(python, _gguf(python, source, cache), setting, file)
        return Peer(runtime, python, file, file.stat().st_size)
    if not (output / "openvino_model.bin").is_file():
        tool = python.with_name("optimum-cli")
        export = ("export", "openvino", "-m", source, "--task", "text-generation-with-past")
        _call([tool, *export, *OPENVINO[setting], output])
    return Peer(runtime, python, output, model_bytes(output, "openvino_model."))


def genai_command(checkpoint: Path, output: Path, setting: str) -> list[str]:
    """Return the command line that builds `output` with one of GENAI."""
    precision, options = GENAI[setting]
    return [
        sys.executable,
        *("-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", precision),
        *("-i", str(checkpoint), "-o", str(output), "-c", str(output.with_name(f"{output.name}.cache"))),
        *("--extra_options", *options, "hf_token=false"),
    ]


def make_environment(runtime: str, cache: Path) -> Path:
    """Return the interpreter of the environment of one of RECIPES, which is created on first use."""
    folder = (cache / f"env-{runtime}").resolve()
    install_server(RECIPES[runtime], folder, PlainProgress(), pip_arguments=_pip_arguments())
    return python_of(folder)


def _gguf(python: Path, source: Path, cache: Path) -> Path:
    """Convert the checkpoint to GGUF in float16, with the converter in the source of llama-cpp-python."""
    file = cache / f"{source.name}-llama-f16.gguf"
    if not file.is_file():
        folder = cache / "llama-source"
        if not folder.is_dir():
            _pip(python, "download", "--no-deps", "--no-binary", ":all:", _LLAMA, "-d", str(cache))
            (archive,) = cache.glob("llama_cpp_python-*.tar.gz")
            _pip(python, "install", "--no-deps", "--target", str(cache / "llama-packages"), SENTENCEPIECE)
            with tarfile.open(archive) as packed:
                packed.extractall(folder, filter="data")
        (script,) = folder.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
        # It needs torch and transformers, which are here, gguf of the same source, and sentencepiece.
        path = os.pathsep.join((str(script.parent / "gguf-py"), str((cache / "llama-packages").resolve())))
        command = [sys.executable, script, source, "--outtype", "f16", "--outfile", file]
        _call(command, PYTHONPATH=path)
    return file


def _quantize_gguf(python: Path, full: Path, setting: str, output: Path) -> None:
    code = (
        "import sys, llama_cpp as c;"
        "p = c.llama_model_quantize_default_params();"
        f"p.ftype = c.LLAMA_FTYPE_MOSTLY_{setting};"
        "sys.exit(c.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))"
    )
    part = output.with_suffix(".part")
    _call([python, "-c", code, full, part])
    part.rename(output)


def _pip(python: Path, command: str, *arguments: str) -> None:
    _call([python, "-m", "pip", command, *arguments, *_pip_arguments()])


def _pip_arguments() -> list[str]:
    return shlex.split(os.environ.get("PIP_ARGS", ""))


def _call(command: list[str | Path], **environment: str) -> None:
    """Run a command with its output on stderr, since stdout is for figures."""
    subprocess.run(
        [str(part) for part in command], check=True, stdout=sys.stderr, env={**os.environ, **environment}
    )


def model_bytes(folder: Path, prefix: str = "model.onnx") -> int:
    """Return the size of a model's files, weights and graph."""
    return sum(f.stat().st_size for f in folder.iterdir() if f.name.startswith(prefix))
