"""Decode speed, time to first token, size and fidelity beside onnxruntime-genai's own int4 model.

    python benchmarks/serving.py [--checkpoint demo|rescaled|llama-1b] [--target cpu-int4 …] [--json FILE]

Builds the artifacts and the peer's model (int4, block 32, accuracy level 4) from one Hugging Face folder.
Every runner is a process of its own with onnxruntime-genai; they are asked in turn, so that the noise of the
machine falls on all alike. Ratios are ours / the peer's, of the medians over all rounds, with the range of
the rounds' own ratios. KL divergence and top-1 agreement are those of the parity gate, for the peer too.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from peers import SETTINGS, genai_command, genai_interface
from sources import NAMES, checkpoint

from llmc.artifact.store import open_artifact
from llmc.checkpoint import open_checkpoint
from llmc.config import Metric
from llmc.data import eval_text
from llmc.graph.interface import Interface
from llmc.pipeline.original import tokenize
from llmc.validate.quality import measure_quality, plan_windows
from llmc.validate.reference import TorchModel
from llmc.validate.session import OrtModel

#: Rest before a runner's turn, seconds: the threads of the one before spin a while after work.
REST = 0.3


@dataclass
class Runner:
    """One model and what was measured on it.

    Args:
        bytes: model.onnx and its data.
        ttft_ms: By prompt length, one figure a round.
        step_ms: By prompt length, the median step of each round.
    """

    name: str
    folder: Path
    bytes: int
    kl: float | None = None
    top1: float | None = None
    perplexity_ratio: float | None = None
    peak_bytes: int = 0
    ttft_ms: dict[int, list[float]] = field(default_factory=dict)
    step_ms: dict[int, list[float]] = field(default_factory=dict)
    process: Any = field(default=None, repr=False)

    def start(self, threads: int) -> None:
        worker = Path(__file__).with_name("worker.py")
        command = [sys.executable, str(worker), str(self.folder), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{self.name} cannot be served: {' '.join(command)}")

    def ask(self, prompt: int, steps: int, *, counted: bool) -> None:
        time.sleep(REST)
        self.process.stdin.write(json.dumps({"prompt": prompt, "steps": steps}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if counted:
            self.ttft_ms.setdefault(prompt, []).append(answer["ttft_ms"])
            self.step_ms.setdefault(prompt, []).append(float(np.median(answer["step_ms"])))
            self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", choices=NAMES, default="demo")
    parser.add_argument("--target", action="append", help="default: cpu-int4; may be given several times")
    parser.add_argument("--peer", choices=SETTINGS, default="int4", help="how the peer's model is built")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-quality", action="store_true", help="skip KL divergence and top-1 agreement")
    parser.add_argument("--cache", type=Path, default=Path("artifacts/benchmarks"))
    parser.add_argument("--path", type=Path, help="a folder with targets/ of your own")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    source = checkpoint(options.checkpoint, options.cache)
    targets = options.target or ["cpu-int4"]
    ours = [build_ours(source, name, options) for name in targets]
    peer, interface = build_peer(source, options)
    if not options.no_quality:
        interfaces = [open_artifact(r.folder).manifest.interface for r in ours]
        measure(source, [*zip(ours, interfaces, strict=True), (peer, interface)])
    runners = [*ours, peer]
    for runner in runners:
        runner.start(options.threads)
    for prompt in options.prompts:
        for round_ in range(-1, options.rounds):
            for runner in runners if round_ % 2 else reversed(runners):
                runner.ask(prompt, options.steps, counted=round_ >= 0)
            print(f"\rprompt {prompt}, round {round_ + 1} of {options.rounds} ", end="", file=sys.stderr)
    for runner in runners:
        runner.stop()
    print(file=sys.stderr)
    report(ours, peer, options)


def build_ours(source: Path, target: str, options: argparse.Namespace) -> Runner:
    output = options.cache / f"{source.name}-{target}"
    command = [
        sys.executable,
        "-m",
        "llmc",
        "build",
        str(source),
        "--target",
        target,
        "--no-verify",
    ]
    if options.path:
        command += ["--path", str(options.path)]
    subprocess.run([*command, "-o", str(output)], check=True)
    return Runner(target, output, model_bytes(output))


def build_peer(source: Path, options: argparse.Namespace) -> tuple[Runner, Interface]:
    name = f"genai-{options.peer}"
    output = options.cache / f"{source.name}-{name}"
    if not (output / "genai_config.json").is_file():
        subprocess.run(genai_command(source, output, options.peer), check=True, stdout=sys.stderr)
    return Runner(name, output, model_bytes(output)), genai_interface(output)


def model_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir() if f.name.startswith("model.onnx"))


def measure(source: Path, runners: list[tuple[Runner, Interface]]) -> None:
    """Quality of each runner's model.onnx in onnxruntime, held against the original in float32."""
    origin = open_checkpoint(str(source))
    tokens, start = tokenize(origin.tokenizer(), eval_text())
    reference = TorchModel(origin.load_reference())
    for runner, interface in runners:
        model = OrtModel(runner.folder, interface, threads=None, share_buffer=False)
        made = {
            m.metric: m for m in measure_quality(model, reference, plan_windows(interface, tokens, start))
        }
        kl, top1 = made[Metric.TEXT_KL_MEAN], made[Metric.TEXT_TOP1]
        runner.kl, runner.top1 = kl.value, top1.value
        runner.perplexity_ratio = made[Metric.TEXT_PERPLEXITY_RATIO].value
        print(f"{runner.name}: KL {kl.value:.4f}, top-1 {top1.value:.4f}", file=sys.stderr)


def report(ours: list[Runner], peer: Runner, options: argparse.Namespace) -> None:
    print(describe())
    print(
        f"{options.checkpoint}, {options.threads} threads, {options.rounds} rounds of {options.steps} steps"
    )
    header = ["", "MB", "KL", "top-1", "ppl ratio", "peak MB"]
    header += [f"TTFT {p}" for p in options.prompts] + [f"tok/s @{p}" for p in options.prompts]
    rows = [header]
    for runner in [*ours, peer]:
        row = [runner.name, f"{runner.bytes / 1e6:.1f}"]
        row += ["-" if v is None else f"{v:.4f}" for v in (runner.kl, runner.top1, runner.perplexity_ratio)]
        row.append(f"{runner.peak_bytes / 1e6:.0f}")
        row += [f"{np.median(runner.ttft_ms[p]):.0f} ms" for p in options.prompts]
        row += [f"{1e3 / np.median(runner.step_ms[p]):.1f}" for p in options.prompts]
        rows.append(row)
    for runner in ours:
        row = [f"{runner.name} / {peer.name}", f"{runner.bytes / peer.bytes:.3f}"]
        row += ["" if runner.kl is None else f"{runner.kl / peer.kl:.3f}", "", ""]
        row.append(f"{runner.peak_bytes / peer.peak_bytes:.2f}")
        row += [ratio(runner.ttft_ms[p], peer.ttft_ms[p]) for p in options.prompts]
        row += [ratio(peer.step_ms[p], runner.step_ms[p]) for p in options.prompts]
        rows.append(row)
    widths = [max(len(r[i]) for r in rows) for i in range(len(header))]
    for row in rows:
        cells = (
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells))
    if options.json:
        made = [{k: v for k, v in vars(r).items() if k not in ("process", "folder")} for r in [*ours, peer]]
        options.json.write_text(json.dumps({"machine": describe(), "runners": made}, indent=1))


def ratio(a: list[float], b: list[float]) -> str:
    rounds = [x / y for x, y in zip(a, b, strict=True)]
    return f"{np.median(a) / np.median(b):.2f} ({min(rounds):.2f}-{max(rounds):.2f})"


if __name__ == "__main__":
    main()
