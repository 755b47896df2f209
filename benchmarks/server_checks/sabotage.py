"""Damage a checkpoint's folder, and see which gate of `llmc verify` or of a server fails.

    python benchmarks/server_checks/sabotage.py ARTIFACT MODEL [--runtime vllm] [--only NAME,…]

Without --runtime, `llmc verify` opens each damaged copy, whose manifest describes it, as a wrong writer would
have left it: llmc reads the files back, and transformers loads them where it has a reader. It has none of
what the build calibrated, as on another machine. With --runtime, a server loads the damaged copy, and is
compared with the weights of the artifact itself: so would a server be caught that reads a sound checkpoint
wrongly. `faults.py` has the faults.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from faults import FAULTS, NOTHING, Fault
from safetensors.torch import load_file, save_file

from llmc.artifact.manifest import MANIFEST
from llmc.artifact.store.folder import digest_folder
from llmc.artifact.verdict import CheckStatus
from llmc.catalog import load_target
from llmc.checkpoint import open_checkpoint
from llmc.config import Family, Metric
from llmc.data import prompts
from llmc.errors import LlmcError
from llmc.evaluation import read_text
from llmc.pipeline import verify
from llmc.pipeline.steps.original import tokenize
from llmc.progress import SilentProgress
from llmc.servers.client import ask
from llmc.servers.environment import Server, find_server, parse_environments
from llmc.servers.support import treatments
from llmc.servers.support_terms import Runtime, Status
from llmc.validate.gates import evaluate
from llmc.validate.reference import TorchModel
from llmc.validate.servers import measure_server, merge_figures, plan_questions
from llmc.validate.settings import describe_original

_TEXT = "The river bends twice before the mill; a compiler reads a model and writes a program. " * 40
_SHOWN = 160

#: What a check of a folder found: whether it misses a gate, and what to print.
Finding = tuple[bool, str]


def main() -> None:
    """Print a line for each fault, and exit with 1 if one is not seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("model", help="the original")
    parser.add_argument("--target", default="vllm-w4a16", help="its gates apply to what the server computes")
    parser.add_argument("--runtime", help="ask this server instead of `llmc verify`")
    parser.add_argument("--environment", action="append", default=[], help="NAME=FOLDER")
    parser.add_argument("--only", type=lambda names: names.split(","), help="names of faults, with commas")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        unseen = check_faults(options, Path(temporary))
    sys.exit(f"wrong: {', '.join(unseen)}" if unseen else 0)


def check_faults(options: argparse.Namespace, temporary: Path) -> list[str]:
    """Print a line for each fault; return those that no gate saw, and the sound artifact if one saw it."""
    if options.runtime is None:
        check = verifier(options.artifact, temporary)
    else:
        stated = parse_environments(options.environment).get(options.runtime)
        check = asker(find_server(options.runtime, stated), options, temporary)
    unseen = []
    for fault in FAULTS:
        if options.only and fault.name not in options.only:
            continue
        folder = temporary / "artifact"
        if damage(options.artifact, folder, fault):
            missed, told = check(folder)
            print(f"{fault.name}: {'caught' if missed else 'passed'}: {told}", flush=True)
            if missed == (fault is NOTHING):
                unseen.append(fault.name)
        else:
            print(f"{fault.name}: the format has nothing of the kind", flush=True)
        shutil.rmtree(folder)
    return unseen


def damage(artifact: Path, folder: Path, fault: Fault) -> bool:
    """Copy an artifact with a fault, and let its manifest describe it; return whether its format has it."""
    shutil.copytree(artifact, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    if not fault.tensors(tensors) or not fault.files(folder):
        return False
    file.unlink()
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})
    stated = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    stated["files"] = {name: digest.model_dump() for name, digest in digest_folder(folder, {}).items()}
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).write_text(json.dumps(stated), encoding="utf-8")
    return True


def verifier(artifact: Path, temporary: Path) -> Callable[[Path], Finding]:
    """Return the function that runs `llmc verify`.

    Gates that the artifact itself misses do not count: a random model loses more to few bits than targets
    allow.
    """
    os.environ["LLMC_CACHE"] = str(temporary / "cache")
    text = temporary / "text"
    text.write_text(_TEXT, encoding="utf-8")

    def measure(folder: Path) -> dict[Metric, str]:
        options: dict[str, Any] = {"own_gates": True, "budget": 1.0, "seed": 0}
        report = verify(folder, None, (str(text),), SilentProgress(), **options).report
        details = {each.metric: each.detail or "" for each in report.measurements}
        failed = {each.metric for each in report.verdict.checks if each.status is CheckStatus.FAIL}
        return {metric: details[metric] for metric in Metric if metric in failed}

    always = measure(artifact)

    def check(folder: Path) -> Finding:
        try:
            missed = {m: told for m, told in measure(folder).items() if m not in always}
        except LlmcError as error:
            return True, f"exit code {error.exit_code.value}: {error.fact[:_SHOWN]}"
        if not missed:
            return False, "no gate missed"
        return True, f"{', '.join(m.value for m in missed)}: {next(iter(missed.values()))[:_SHOWN]}"

    return check


def asker(server: Server, options: argparse.Namespace, temporary: Path) -> Callable[[Path], Finding]:
    """Return the function that asks a server about a folder and compares it with the artifact."""
    target = load_target(options.target)
    gates = [gate for gate in target.gates if gate.metric.family is Family.SERVER]
    original, sound = open_checkpoint(options.model), open_checkpoint(str(options.artifact))
    tokenizer, text = original.tokenizer(), read_text(()).text
    stop = describe_original(original.config, original.generation_config(), tokenizer).stop
    config = original.config
    questions = plan_questions(
        *(text, tokenize(tokenizer, text)[0], prompts(), tokenizer, stop),
        *(config.max_position_embeddings, config.vocab_size),
    )
    references = TorchModel(original.fill_reference()), TorchModel(sound.fill_reference())
    known = treatments(Runtime(server.name), target)
    gpu_only = any(treatment.status is Status.GPU_ONLY for treatment in known)
    request = replace(questions.request(None), gpu_only=gpu_only)

    def matrix(module: str) -> Any:
        name = f"{module}.weight"
        known = name in sound.tensors.infos()
        return sound.tensors.read(name).astype(np.float32) if known else None

    def check(folder: Path) -> Finding:
        with tempfile.TemporaryDirectory(dir=temporary) as scratch:
            try:
                answer = ask(server, folder, request, Path(scratch))
            except LlmcError as error:
                return True, error.fact[:_SHOWN]
            figures = measure_server(answer, questions, *references, matrix)
        applied = [gate for gate in gates if gate.metric in figures]
        verdict = evaluate(applied, merge_figures({server.name: figures}, ()))
        shown = {metric.value: f"{value:.3g}" for metric, (value, _) in figures.items()}
        missed = [check.metric.value for check in verdict.checks if check.status is CheckStatus.FAIL]
        return bool(missed), f"{', '.join(missed) or 'no gate missed'}; {_line(shown)}"

    return check


def _line(figures: Mapping[str, str]) -> str:
    return ", ".join(f"{name.partition('.')[2]} {value}" for name, value in figures.items())


if __name__ == "__main__":
    main()
