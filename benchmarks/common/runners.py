"""Serve models in separate processes, and measure them in turn."""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.artifacts import build_apart
from common.peers import model_bytes

#: Seconds of rest before a runner's turn: the threads of the previous one spin for a while after work.
REST = 0.3


@dataclass
class Runner:
    """A model and its measurements.

    Args:
        model: The model argument of its runtime.
        bytes: Size of weights and graph.
        runtime: Name of the runtime in worker.py.
        python: The interpreter of an environment with that runtime.
        quality: dNLL, KL divergence and top-1 agreement.
        ttft_ms: Times to first token by prompt length, one figure per round.
        step_ms: Median step of each round by prompt length.
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


def take_turns(runners: list[Runner], prompts: list[int], options: argparse.Namespace) -> None:
    """Measure all runners in turn; the first round of each prompt is not counted."""
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
    """Build the artifact of a checkpoint, to be served by onnxruntime-genai."""
    output = build_apart(str(source), target, options.cache / f"{source.name}-{target}", options.path)
    return Runner(target, output, model_bytes(output))
