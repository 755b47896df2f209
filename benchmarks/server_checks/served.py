"""Measure what servers compute from the demo at 4 bits: the same codes in three formats, and their logits."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from common.fidelity import cut_windows
from common.quantizers import GROUPS, Scheme, measure, target
from common.sources import checkpoint

from llmc.checkpoint import open_checkpoint
from llmc.errors import ResourceError
from llmc.servers.answer import Request
from llmc.servers.client import ask
from llmc.servers.environment import Server, find_server
from server_checks.check import Check, Figures, MissingError, Settings

#: The demo with weights off the 4-bit grid of its file.
SOURCE = "rescaled"
#: Targets of the formats that hold the same codes.
_FORMATS = ("vllm-w4a16", "gptq-int4", "awq-int4")
#: The target that ships and divides the demo's inputs, whose gates `llmc verify` knows.
_SHIPPED = "vllm-w4a16-g64"
#: Targets whose folders are damaged and given to `llmc verify`.
_DAMAGED = (
    *("vllm-w4a16", "vllm-w8a8", "vllm-fp8", "vllm-nvfp4"),
    *("gptq-int4", "awq-int4", "modelopt-fp8", "modelopt-nvfp4"),
)
#: Faults that change what a server computes without a reason to refuse the folder.
_SERVED = "nothing,scales of one matrix 2 % off,all scales 2 % off,a tensor renamed,a tensor added,"
_SERVED += "zero points or codes of one matrix one off,two tokens exchanged"
#: What ranks.py compares, and in which type: vLLM has no kernel for 4 bits in float32.
_BY_RANKS = (("llmc", "float32"), ("deepspeed", "float32"), ("vllm-split", "bfloat16"))
_RANKS = 3
_SEQUENCES, _LENGTH = 4, 128
_HERE = Path(__file__).parent


def list_checks() -> list[Check]:
    """Return the checks of servers, of the readers, of ranks and of faults."""
    checks = [
        Check("readers", "8 forms equal, bit for bit", run_readers, missed_readers),
        Check("encodings", "the same codes in three formats: identical in vLLM", compare_formats, unequal),
    ]
    for runtime in ("transformers", "vllm", "deepspeed"):
        goal = "<= 1e-3 in float32" if runtime == "transformers" else "measured; the gate is set by it"
        checks.append(Check(f"logits/{runtime}", goal, partial(verify_logits, runtime), unmeasured))
    checks.append(Check("ranks", "<= 1e-4, each rank <= 0.45 of the memory", compare_ranks))
    checks += [Check(f"sabotage/{name}", "all caught", partial(damage_form, name)) for name in _DAMAGED]
    checks.append(Check("sabotage/served", "all caught by vLLM", damage_served))
    return checks


def build(settings: Settings, output: Path, name: str, *options: str, source: str = SOURCE) -> Path:
    """Build a model by a target, without its gates."""
    command = [sys.executable, "-m", "llmc", "build", str(checkpoint(source, settings.cache))]
    command += ["--target", name, "--profile", "local", "--no-verify", "-o", str(output), *options]
    measure(command, LLMC_CACHE=str(settings.cache / "llmc"))
    return output


def build_codes(settings: Settings, output: Path, extends: str) -> Path:
    """Build the demo by a target of 4-bit codes in symmetric groups, without scaled channels."""
    name = f"codes-{extends}"
    with TemporaryDirectory(dir=settings.cache) as scratch:
        folder = Path(scratch)
        (folder / "targets").mkdir()
        document = target(name, Scheme(GROUPS[SOURCE]), extends)
        (folder / "targets" / f"{name}.yaml").write_text(json.dumps(document))
        return build(settings, output, name, "--path", str(folder))


def compare_formats(settings: Settings) -> Figures:
    """Return the largest difference of vLLM's log-probabilities between formats that hold the same codes."""
    server = require_server("vllm")
    source = open_checkpoint(str(checkpoint(SOURCE, settings.cache)))
    request = Request(sequences=cut_windows(source, _SEQUENCES, _LENGTH).tolist(), threads=1)
    answers = []
    with TemporaryDirectory(dir=settings.cache) as scratch:
        for extends in _FORMATS:
            folder = build_codes(settings, Path(scratch) / extends, extends)
            answer = ask(server, folder, request, Path(scratch))
            if answer.log_probabilities is None:
                raise RuntimeError(f"vLLM gave no log-probabilities of {extends}")
            answers.append(np.concatenate(answer.log_probabilities))
    differences = [float(np.abs(each - answers[0]).max()) for each in answers[1:]]
    named = zip(_FORMATS[1:], differences, strict=True)
    return {"vllm": server.version, "tokens": len(answers[0])} | {f"{n}, nats": d for n, d in named}


def unequal(figures: Figures) -> str | None:
    """Return which formats differ from the first, or None."""
    apart = [name for name, value in figures.items() if name.endswith(", nats") and value != 0]
    return f"not identical: {', '.join(apart)}" if apart else None


def verify_logits(runtime: str, settings: Settings) -> Figures:
    """Return what `llmc verify` measures of the demo in a runtime, against the artifact's own weights."""
    options: list[str] = []
    if runtime != "transformers":
        require_server(runtime)
        options = ["--runtime", runtime]
    with TemporaryDirectory(dir=settings.cache) as scratch:
        folder = build(settings, Path(scratch) / "artifact", _SHIPPED)
        report = Path(scratch) / "report"
        command = [sys.executable, "-m", "llmc", "verify", str(folder), "--report", str(report), *options]
        result = subprocess.run(command, stdout=sys.stderr, check=False)
        if not (report / "report.json").is_file():
            raise RuntimeError(f"llmc verify ended with {result.returncode} and without a report")
        measurements = json.loads((report / "report.json").read_text())["measurements"]
    prefix = ("server.",) if options else ("prefill.", "decode.", "ragged.")
    figures = {m["metric"]: m["value"] for m in measurements if m["metric"].startswith(prefix)}
    return {name: value for name, value in figures.items() if value is not None}


def unmeasured(figures: Figures) -> str | None:
    """Return that nothing was measured, or None."""
    return None if figures else "llmc verify measured nothing: its output says why"


def run_readers(settings: Settings) -> Figures:
    """Return how many forms are equal in every reader of others, and what was not."""
    options: list[str] = []
    for name in ("modelopt", "edgellm"):
        python = getattr(settings, name)
        options += [] if python is None else [f"--{name}", str(python)]
    options += [] if settings.peers is None else ["--auto-round", str(settings.peers)]
    with TemporaryDirectory(dir=settings.cache) as scratch:
        file = Path(scratch) / "comparisons.json"
        run_program("readers.py", settings, *options, "--json", str(file))
        comparisons = json.loads(file.read_text())
    failed = [c for c in comparisons if c["reason"] or not 0 < c["matrices"] == c["equal"] or c["skipped"]]
    forms = {c["form"] for c in comparisons} - {c["form"] for c in failed}
    named = ", ".join(f"{c['form']} by {c['reader']}" for c in failed)
    return {"forms": len(forms), "readings": len(comparisons), "unequal": named or "none"}


def missed_readers(figures: Figures) -> str | None:
    """Return why fewer than all forms were equal, or None."""
    return None if figures["forms"] == 8 else f"{figures['forms']} of 8 forms: {figures['unequal']}"


def compare_ranks(settings: Settings) -> Figures:
    """Return the lines of ranks.py on the demo for three ranks."""
    with TemporaryDirectory(dir=settings.cache) as scratch:
        folder = build(settings, Path(scratch) / "artifact", _SHIPPED, "--shards", str(_RANKS))
        found = {
            by: run_program("ranks.py", settings, str(folder), "--only", by, "--dtype", dtype)
            for by, dtype in _BY_RANKS
        }
        return {f"{by}, {line}": value for by, lines in found.items() for line, value in lines.items()}


def damage_form(target: str, settings: Settings) -> Figures:
    """Return the lines of sabotage.py on a small model, by `llmc verify` on a machine that did not build it.

    Raises:
        RuntimeError: A fault was not caught.
    """
    with TemporaryDirectory(dir=settings.cache) as scratch:
        folder = build(settings, Path(scratch) / "artifact", target, source="small")
        return run_program("sabotage.py", settings, str(folder), str(checkpoint("small", settings.cache)))


def damage_served(settings: Settings) -> Figures:
    """Return the lines of sabotage.py on the demo in vLLM.

    Raises:
        MissingError: vLLM is not installed.
        RuntimeError: A fault was not caught.
    """
    require_server("vllm")
    with TemporaryDirectory(dir=settings.cache) as scratch:
        folder = build(settings, Path(scratch) / "artifact", _SHIPPED)
        asked = (str(folder), str(checkpoint(SOURCE, settings.cache)), "--runtime", "vllm", "--only", _SERVED)
        return run_program("sabotage.py", settings, *asked)


def require_server(name: str) -> Server:
    """Return an installed server.

    Raises:
        MissingError: It is not installed.
    """
    try:
        return find_server(name)
    except ResourceError as error:
        raise MissingError(error.fact) from error


def run_program(name: str, settings: Settings, *arguments: str) -> Figures:
    """Return the last lines of a program beside this file.

    Raises:
        MissingError: The program does not exist.
        RuntimeError: It failed.
    """
    program = _HERE / name
    if not program.is_file():
        raise MissingError(f"{name} does not exist")
    command = [sys.executable, str(program), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(
            f"{name} ended with {result.returncode}: {(result.stdout + result.stderr)[-1500:]}"
        )
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    return {f"line {number}": line for number, line in enumerate(lines[-24:], 1)}
