"""Kill, interrupt or starve builds at random moments, and check that nothing finished is lost.

    python benchmarks/interruptions.py [--tries 100] [--seed 0] [--targets cpu-int4 cpu-mixed …]

The builds are those of a random llama of three layers. Each try starts `llmc build`, in half of the tries
over a verified artifact, and ends it after a random time by SIGKILL, SIGTERM or SIGINT, or limits the size of
its files, which the kernel refuses as on a full disk. It then checks the output, checks it again after
`llmc targets`, and builds again:

- an artifact that was there before is unchanged, or is replaced by a verified one;
- if the gate had begun, what was built is there: verified, or marked as not verified;
- after the next command nothing else is beside the output or among the temporary files;
- the second build gives the same files.

The exit code is 1 if any of that does not hold.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.machine import describe
from common.options import make_parser

TARGETS = {
    "cpu-int4": "local",
    "cpu-mixed": "local",
    "cpu-int4-compiled": "local",
    "tensorrt-fp16": "rtx-5090",
}
SIGNALS = {"SIGKILL": (-9, 137), "SIGTERM": (143,), "SIGINT": (130,)}
FULL = "full"
#: Positions of the model; the KV cache of engines has as many.
POSITIONS, ENGINE_POSITIONS = 256, 2048
#: Stages of a build before its gate.
BEFORE_THE_GATE = {
    *("checkpoint", "tokenizer files", "trace", "passes", "calibrate", "allocate", "quantize", "overflow"),
    *("kernels", "write", "engine", "prune"),
}
#: Files that libraries keep among temporary files under a fixed name.
OF_LIBRARIES = {".ses", "torchinductor_root"}


@dataclass
class Outcome:
    """The result of an interrupted build.

    Args:
        kind: How it was interrupted.
        code: Its exit code.
        said: Its messages.
        finished: Whether it was over before it was interrupted.
    """

    kind: str
    code: int
    said: str
    finished: bool

    @property
    def in_the_gate(self) -> bool:
        """Whether a stage of the gate was finished or interrupted."""
        lines = [line.split("  ")[0] for line in self.said.splitlines() if "  " in line and " s" in line]
        return any(line.split(" SM")[0] not in BEFORE_THE_GATE for line in lines)


class Trial:
    """The builds of one target.

    Args:
        folder: Scratch folder.
        model: The checkpoint.
    """

    def __init__(self, folder: Path, model: Path, target: str) -> None:
        self.folder, self.model, self.target = folder, model, target
        self.output = folder / target / "out"
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        start = time.monotonic()
        _, said = self._start(self.folder / target / "whole").communicate()
        self.seconds = time.monotonic() - start
        if not manifest(self.folder / target / "whole"):
            sys.exit(f"{target} cannot be built: {said[-1000:]}")
        self.files = manifest(self.folder / target / "whole")["files"]
        self.largest = max(file["bytes"] for file in self.files.values())

    def _start(
        self, output: Path, *options: str, most: int = resource.RLIM_INFINITY
    ) -> "subprocess.Popen[str]":
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(
                    number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                )

        profile = TARGETS[self.target]
        command = ["build", str(self.model), "--target", self.target, "--profile", profile, "-o", str(output)]
        return subprocess.Popen(
            [sys.executable, "-m", "llmc", *command, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(self.temporary), "LLMC_CACHE": str(self.folder / "cache")},
            preexec_fn=limit,
        )

    def end(self, kind: str, draw: random.Random) -> Outcome:
        """Start a build, and interrupt it."""
        if kind == FULL:
            process = self._start(self.output, most=int(draw.uniform(0, 1.1 * self.largest)))
            _, said = process.communicate()
            return Outcome(kind, process.returncode, said, process.returncode == 0)
        process = self._start(self.output)
        try:
            _, said = process.communicate(timeout=draw.uniform(0, self.seconds))
            return Outcome(kind, process.returncode, said, True)
        except subprocess.TimeoutExpired:
            process.send_signal(getattr(signal, kind))
            _, said = process.communicate()
            return Outcome(kind, process.returncode, said, process.returncode == 0)

    def attempt(self, kind: str, draw: random.Random) -> list[str]:
        """Run one try.

        Returns:
            The properties that did not hold.
        """
        shutil.rmtree(self.output.parent / "out", ignore_errors=True)
        shutil.rmtree(self.output.parent / "out.unverified", ignore_errors=True)
        stands = draw.random() < 0.5
        if stands:
            shutil.copytree(self.folder / self.target / "whole", self.output)
            stated = manifest(self.output) | {"llmc_version": "0.0.earlier"}
            (self.output / "manifest.json").write_text(json.dumps(stated))
        outcome = self.end(kind, draw)
        wrong = list(self._look(outcome, stands))
        environment = {**os.environ, "TMPDIR": str(self.temporary)}
        subprocess.run([sys.executable, "-m", "llmc", "targets"], stdout=subprocess.DEVNULL, env=environment)
        left = {p.name for p in self.output.parent.iterdir()} - {"out", "out.unverified", "whole"}
        left |= {p.name for p in self.temporary.iterdir()} - OF_LIBRARIES
        wrong += [f"left behind: {name}" for name in left]
        again = self._start(self.output.with_name("again"), "--no-verify")
        _, said = again.communicate()
        if again.returncode or manifest(self.output.with_name("again"))["files"] != self.files:
            wrong.append(f"the next build differs: {said[-300:]}")
        shutil.rmtree(self.output.with_name("again"), ignore_errors=True)
        return wrong

    def _look(self, outcome: Outcome, stands: bool) -> list[str]:
        wrong = []
        if outcome.kind == FULL:
            codes: tuple[int, ...] = (0, 4)
        else:
            codes = (0,) if outcome.finished else SIGNALS[outcome.kind]
        early = not outcome.said and outcome.code in (-15, -2, 1)  # before llmc was imported
        if outcome.code not in codes and not early:
            wrong.append(f"exit code {outcome.code}: {outcome.said[-300:]}")
        standing = manifest(self.output)
        if stands and not standing:
            wrong.append("the artifact that was there before is gone")
        beside = manifest(self.output.with_name("out.unverified"))
        replaced = bool(standing) and standing["llmc_version"] != "0.0.earlier"
        if stands and replaced and standing["unfinished"] is not None:
            wrong.append("a verified artifact was replaced by one that is not")
        built = [each for each in (standing if replaced else None, beside) if each]
        if outcome.in_the_gate and not built:
            wrong.append("what was built is lost")
        wrong += ["what was kept differs" for each in built if each["files"] != self.files]
        return wrong


def manifest(folder: Path) -> dict:
    """Read the manifest in a folder; empty if there is none."""
    path = folder / "manifest.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    options = parser.parse_args()
    from tests.models import EOS, save_tiny_model

    print(describe())
    draw, failures, counts = random.Random(options.seed), 0, Counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = {}
        for positions in (POSITIONS, ENGINE_POSITIONS):
            settings = {"eos_token_id": EOS, "max_position_embeddings": positions}
            models[positions] = save_tiny_model("llama", folder / f"{positions}", tokenizer=True, **settings)
        trials = {}
        for number in range(options.tries):
            target = options.targets[number % len(options.targets)]
            if target not in trials:
                positions = ENGINE_POSITIONS if target.startswith("tensorrt") else POSITIONS
                trials[target] = Trial(folder, models[positions], target)
                print(f"{target}: {trials[target].seconds:.1f} s", flush=True)
            kind = draw.choice([*SIGNALS, FULL])
            wrong = trials[target].attempt(kind, draw)
            counts[target, kind] += 1
            failures += bool(wrong)
            print(f"{number + 1} {target} {kind}: {'; '.join(wrong) or 'holds'}", flush=True)
    for (target, kind), count in sorted(counts.items()):
        print(f"{target:20} {kind:8} {count}")
    print(f"{options.tries - failures} of {options.tries} hold")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
