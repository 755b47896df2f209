"""Damage what a server reads, and see that the gate of the served path fails.

The server loads a damaged copy of an artifact, while it is compared with the weights of the artifact itself:
so would a server be caught that reads a sound checkpoint wrongly.

    python benchmarks/server_checks/sabotage.py ARTIFACT MODEL --runtime vllm
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llmc.artifact.verdict import CheckStatus
from llmc.catalog import load_target
from llmc.checkpoint import open_checkpoint
from llmc.config import Family
from llmc.data import prompts
from llmc.errors import LlmcError
from llmc.evaluation import read_text
from llmc.pipeline.steps.original import tokenize
from llmc.servers.client import ask
from llmc.servers.environment import find_server, parse_environments
from llmc.validate.gates import evaluate
from llmc.validate.reference import TorchModel
from llmc.validate.servers import measure_server, merge_figures, plan_questions
from llmc.validate.settings import describe_original

Tensors = dict[str, torch.Tensor]
_MATRIX = "model.layers.3.mlp.up_proj"
_SCALES = (".weight_scale", ".scales")


@dataclass(frozen=True)
class Sabotage:
    """One damage.

    Args:
        name: What it is.
        tensors: Changes the tensors of the files; returns whether the format has what it changes.
        files: Changes other files of the folder.
    """

    name: str
    tensors: Callable[[Tensors], bool] = lambda tensors: True
    files: Callable[[Path], None] = lambda folder: None


def scale_one(tensors: Tensors) -> bool:
    """Make the scales of one matrix 2 percent larger."""
    return _change(tensors, [f"{_MATRIX}{end}" for end in _SCALES], lambda scale: scale * 1.02)


def scale_all(tensors: Tensors) -> bool:
    """Make all scales 2 percent larger."""
    names = [name for name in tensors if name.endswith(_SCALES)]
    return _change(tensors, names, lambda scale: scale * 1.02)


def shift_zero_points(tensors: Tensors) -> bool:
    """Move the zero points of one matrix by one, or its codes where the format has no zero points."""
    nibbles = sum(1 << (4 * place) for place in range(8)) - (1 << 32)
    moved = _change(tensors, [f"{_MATRIX}.qzeros"], lambda zeros: zeros + nibbles)
    return moved or _change(tensors, [f"{_MATRIX}.weight_packed"], _next_codes)


def lose(tensors: Tensors) -> bool:
    """Give one tensor a name that no server knows."""
    names = [f"{_MATRIX}{end}" for end in (".weight_packed", ".qweight", ".weight")]
    name = next((name for name in names if name in tensors), None)
    if name is not None:
        tensors[f"{name}_lost"] = tensors.pop(name)
    return name is not None


def add(tensors: Tensors) -> bool:
    """Add a tensor that no server takes."""
    tensors["model.layers.0.mlp.up_proj.weight_forgotten"] = torch.zeros(4)
    return True


def exchange_tokens(folder: Path) -> None:
    """Exchange the ids of two tokens of the tokenizer."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = "Ġthe", "Ġof"
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.unlink()
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


SABOTAGES = (
    Sabotage("nothing"),
    Sabotage("scales of one matrix 2 % off", scale_one),
    Sabotage("all scales 2 % off", scale_all),
    Sabotage("zero points of one matrix one off", shift_zero_points),
    Sabotage("a tensor lost", lose),
    Sabotage("a tensor skipped", add),
    Sabotage("two tokens exchanged", files=exchange_tokens),
)


def main() -> None:
    """Print a line for each damage, and exit with 1 if one is not seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("model", help="the original")
    parser.add_argument("--target", default="vllm-w4a16", help="its gates apply")
    parser.add_argument("--runtime", default="vllm")
    parser.add_argument("--environment", action="append", default=[], help="NAME=FOLDER")
    options = parser.parse_args()
    server = find_server(options.runtime, parse_environments(options.environment).get(options.runtime))
    check = _checker(options.artifact, options.model, options.target)
    unseen = []
    for sabotage in SABOTAGES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "artifact"
            if not _copy(options.artifact, folder, sabotage):
                print(f"{sabotage.name}: the format has nothing of the kind", flush=True)
                continue
            scratch = Path(temporary) / "scratch"
            scratch.mkdir()
            missed, told = check(server, folder, scratch)
        print(f"{sabotage.name}: {'caught' if missed else 'passed'}: {told}", flush=True)
        if missed == (sabotage.name == "nothing"):
            unseen.append(sabotage.name)
    sys.exit(f"wrong: {', '.join(unseen)}" if unseen else 0)


def _checker(artifact: Path, model: str, target: str) -> Callable[[Any, Path, Path], tuple[bool, str]]:
    """Return the function that asks a server about a folder and compares it with the artifact."""
    gates = [gate for gate in load_target(target).gates if gate.metric.family is Family.SERVER]
    original, sound = open_checkpoint(model), open_checkpoint(str(artifact))
    tokenizer, text = original.tokenizer(), read_text(()).text
    stop = describe_original(original.config, original.generation_config(), tokenizer).stop
    config = original.config
    questions = plan_questions(
        *(text, tokenize(tokenizer, text)[0], prompts(), tokenizer, stop),
        *(config.max_position_embeddings, config.vocab_size),
    )
    references = TorchModel(original.fill_reference()), TorchModel(sound.fill_reference())

    def matrix(module: str) -> Any:
        name = f"{module}.weight"
        known = name in sound.tensors.infos()
        return sound.tensors.read(name).astype(np.float32) if known else None

    def check(server: Any, folder: Path, scratch: Path) -> tuple[bool, str]:
        try:
            answer = ask(server, folder, questions.request(None), scratch)
        except LlmcError as error:
            return True, error.fact[:160]
        figures = measure_server(answer, questions, *references, matrix)
        applied = [gate for gate in gates if gate.metric in figures]
        verdict = evaluate(applied, merge_figures({server.name: figures}, ()))
        shown = {metric.value: f"{value:.3g}" for metric, (value, _) in figures.items()}
        missed = [check.metric.value for check in verdict.checks if check.status is CheckStatus.FAIL]
        return bool(missed), f"{', '.join(missed) or 'no gate missed'}; {_line(shown)}"

    return check


def _line(figures: Mapping[str, str]) -> str:
    return ", ".join(f"{name.partition('.')[2]} {value}" for name, value in figures.items())


def _copy(artifact: Path, folder: Path, sabotage: Sabotage) -> bool:
    """Copy an artifact with its damage; return whether its format has what is damaged."""
    shutil.copytree(artifact, folder, ignore=shutil.ignore_patterns("*.safetensors", "reports"))
    (file,) = artifact.glob("*.safetensors")
    tensors = load_file(file)
    if not sabotage.tensors(tensors):
        return False
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / file.name, {"format": "pt"})
    sabotage.files(folder)
    return True


def _change(tensors: Tensors, names: list[str], change: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    found = [name for name in names if name in tensors]
    for name in found:
        tensors[name] = change(tensors[name]).to(tensors[name].dtype)
    return bool(found)


def _next_codes(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes plus one, 15 staying as it is, of eight codes in each word."""
    places = [((packed.to(torch.int64) >> (4 * place)) & 15).clamp(max=14) + 1 for place in range(8)]
    words = sum(code << (4 * place) for place, code in enumerate(places))
    return torch.where(words >= 1 << 31, words - (1 << 32), words)


if __name__ == "__main__":
    main()
