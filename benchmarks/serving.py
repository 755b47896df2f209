"""Compare decode speed, time to first token, size, memory and fidelity with the tools that others would use.

    python benchmarks/serving.py [--checkpoint demo|rescaled|llama-1b] [--target cpu-int4 …]
        [--peer genai-int4 llama-Q4_0 openvino-int4 …] [--batch 1] [--json FILE]

Builds the artifacts and the peers' models from one Hugging Face folder. Every runner is a separate process,
with onnxruntime-genai for llmc's; they are asked in turn, so that noise of the machine affects all alike.
Ratios are ours / the peer's, of the medians over all rounds, with the range over the rounds. A batch consists
of as many prompts at once, in ours and in onnxruntime-genai's; its tokens per second are the sum.

Fidelity is measured on what is served: windows of 512 tokens of the evaluation text, 32 tokens of each
prefilled and the rest decoded one by one, compared with PyTorch in float32. dNLL and KL divergence are in
nats per token; sizes are those of the model's files, including its graph.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from faithfulness import PREFIX, WINDOW, WINDOWS, compare_logits, cut_windows, reference
from machine import describe
from peers import NAMES as PEERS
from peers import build_peer, model_bytes
from sources import NAMES, checkpoint

from llmc.checkpoint import open_checkpoint

#: Seconds of rest before a runner's turn: the threads of the one before spin for a while after work.
REST = 0.3


@dataclass
class Runner:
    """The model of one runner, and its measurements.

    Args:
        model: The model argument of its runtime.
        bytes: Size of weights and graph.
        runtime: Name of the runtime in worker.py.
        python: The interpreter of an environment that has the runtime.
        quality: dNLL, KL divergence and top-1 agreement.
        ttft_ms: Figures by prompt length, one per round.
        step_ms: Median steps by prompt length, one per round.
    """

    name: str
    model: Path
    bytes: int
    runtime: str = "genai"
    python: Path = Path(sys.executable)
    quality: tuple[float, float, float] | None = None
    peak_bytes: int = 0
    ttft_ms: dict[int, list[float]] = field(default_factory=dict)
    step_ms: dict[int, list[float]] = field(default_factory=dict)
    process: Any = field(default=None, repr=False)

    def start(self, threads: int) -> None:
        worker = Path(__file__).with_name("worker.py")
        command = [str(self.python), str(worker), self.runtime, str(self.model), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline().strip() != "ready":
            raise SystemExit(f"{self.name} cannot be served: {' '.join(command)}")

    def request(self, **facts: object) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(facts) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def ask(self, prompt: int, steps: int, batch: int, *, counted: bool) -> None:
        time.sleep(REST)
        answer = self.request(prompt=prompt, steps=steps, batch=batch)
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
    parser.add_argument("--peer", choices=PEERS, nargs="*", default=["genai-int4"])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--no-quality", action="store_true", help="skip fidelity")
    parser.add_argument("--cache", type=Path, default=Path("artifacts/benchmarks"))
    parser.add_argument("--path", type=Path, help="a folder with your own targets/")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.batch > 1 and any(not name.startswith("genai") for name in options.peer):
        parser.error("only peers of onnxruntime-genai support a batch")

    source = checkpoint(options.checkpoint, options.cache)
    targets = options.target or ["cpu-int4"]
    ours = [build_ours(source, name, options) for name in targets]
    built = {name: build_peer(name, source, options.cache) for name in options.peer}
    peers = [Runner(name, p.model, p.bytes, p.runtime, p.python) for name, p in built.items()]
    runners = [*ours, *peers]
    if not options.no_quality:
        measure(source, runners, options)
    take_turns(runners, options.prompts, options)
    report(ours, peers, options)


def take_turns(runners: list[Runner], prompts: list[int], options: argparse.Namespace) -> None:
    """Ask all runners in turn; the first round of each prompt is not counted."""
    for runner in runners:
        runner.start(options.threads)
    for prompt in prompts:
        for round_ in range(-1, options.rounds):
            for runner in runners if round_ % 2 else reversed(runners):
                runner.ask(prompt, options.steps, options.batch, counted=round_ >= 0)
            print(f"\rprompt {prompt}, round {round_ + 1} of {options.rounds} ", end="", file=sys.stderr)
    for runner in runners:
        runner.stop()
    print(file=sys.stderr)


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


def measure(source: Path, runners: list[Runner], options: argparse.Namespace) -> None:
    """Measure the fidelity of each runner, in a separate process each."""
    origin = open_checkpoint(str(source))
    windows = cut_windows(origin)
    original = reference(origin, windows, options.cache / f"{source.name}-logits.npy")
    with tempfile.TemporaryDirectory(dir=options.cache) as scratch:
        ids, logits = Path(scratch) / "ids.npy", Path(scratch) / "logits.npy"
        np.save(ids, windows)
        for runner in runners:
            runner.start(options.threads)
            runner.request(score=str(ids), prefix=PREFIX, into=str(logits))
            runner.stop()
            runner.quality = compare_logits(np.load(logits, mmap_mode="r"), windows, original)
            print(f"{runner.name}: {figures(runner)}", file=sys.stderr)


def figures(runner: Runner) -> list[str]:
    return ["-"] * 3 if runner.quality is None else [f"{value:.4f}" for value in runner.quality]


def report(ours: list[Runner], peers: list[Runner], options: argparse.Namespace) -> None:
    print(describe())
    print(
        f"{options.checkpoint}, {options.threads} threads, batch {options.batch}, "
        f"{options.rounds} rounds of {options.steps} steps"
        + ("" if options.no_quality else f"; fidelity on {WINDOWS} windows of {WINDOW} tokens")
    )
    header = ["", "MB", "dNLL", "KL", "top-1", "peak MB"]
    header += [f"TTFT {p}" for p in options.prompts] + [f"tok/s @{p}" for p in options.prompts]
    rows = [header]
    for runner in [*ours, *peers]:
        row = [runner.name, f"{runner.bytes / 1e6:.1f}", *figures(runner), f"{runner.peak_bytes / 1e6:.0f}"]
        row += [f"{np.median(runner.ttft_ms[p]):.0f} ms" for p in options.prompts]
        row += [f"{1e3 * options.batch / np.median(runner.step_ms[p]):.1f}" for p in options.prompts]
        rows.append(row)
    for runner in ours:
        for peer in peers:
            row = [f"{runner.name} / {peer.name}", f"{runner.bytes / peer.bytes:.3f}", "", "", ""]
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
        hidden = ("process", "model", "python")
        made = [{k: v for k, v in vars(r).items() if k not in hidden} for r in [*ours, *peers]]
        options.json.write_text(json.dumps({"machine": describe(), "runners": made}, indent=1))


def ratio(a: list[float], b: list[float]) -> str:
    rounds = [x / y for x, y in zip(a, b, strict=True)]
    return f"{np.median(a) / np.median(b):.2f} ({min(rounds):.2f}-{max(rounds):.2f})"


if __name__ == "__main__":
    main()
