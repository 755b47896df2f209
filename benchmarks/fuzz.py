"""Read mutated inputs in a long-lived child process, and report those that cause anything but a typed error.

    python benchmarks/fuzz.py {gguf,folders,artifacts} [--seed 0] [--count 5000] [--seconds 20] [--keep DIR]

Every input must be accepted or refused by an `LlmcError`. Three kinds of mistakes are counted, by the place
in llmc:

    untyped   another exception
    crash     the child ended
    hang      no answer within --seconds of CPU time

The same seed gives the same inputs; --keep writes those with mistakes.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.options import make_parser

Random = random.Random
TAKEN, REFUSED, UNTYPED, CRASH, HANG = "taken", "refused", "untyped", "crash", "hang"
MISTAKES = (UNTYPED, CRASH, HANG)
MEMORY = 24 << 30  # bytes of address space of the child
HEADER = 6000  # bytes at the beginning of a GGUF file, where most mutations are
ODD_INTEGERS = (0, 1, 2, 3, 7, 8, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**30),
    *("", "x", "0", "../x", "\x00", "a" * 5000, "</s>", "linear", [], {}, [[]], [None], [{}], {"": ""}),
)


# ---- mutations


def mutate_bytes(data: bytes, draw: Random, end: int | None = None) -> bytes:
    """Change, remove, repeat or insert bytes at a few places before `end`."""
    mutated = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        if not mutated:
            break
        limit = min(end or len(mutated), len(mutated))
        at = draw.randrange(limit)
        match draw.randrange(7):
            case 0:
                mutated[at] ^= 1 << draw.randrange(8)
            case 1:
                mutated[at] = draw.choice((0, 1, 8, 9, 127, 128, 255))
            case 2 | 3:
                width = draw.choice((1, 2, 4, 8))
                value = draw.choice(ODD_INTEGERS) % (1 << 8 * width)
                mutated[at : at + width] = value.to_bytes(width, "little")
            case 4:
                del mutated[at : at + draw.choice((1, 4, 8, 100))]
            case 5:
                mutated[at:at] = mutated[at : at + draw.choice((1, 8, 64))]
            case 6:
                del mutated[at:]
    return bytes(mutated)


def mutate_json(text: str, draw: Random) -> str:
    """Change a few values of a JSON document, or its text."""
    if draw.random() < 0.15:
        return mutate_bytes(text.encode(), draw).decode("utf-8", "replace")
    root = [json.loads(text)]
    for _ in range(draw.choice((1, 1, 2, 3))):
        parents = [node for node in _nodes(root) if node]
        parent = draw.choice(parents)
        key = draw.choice(list(parent)) if isinstance(parent, dict) else draw.randrange(len(parent))
        match draw.randrange(6):
            case 0 if parent is not root:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[str(draw.choice(("", "type", "0", key + "_")))] = parent.pop(key)
            case 2:
                other = draw.choice(parents)
                parent[key] = json.loads(json.dumps(other if other is not root else None))
            case 3 if isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
                parent[key] = draw.choice((-parent[key], 10 * parent[key], str(parent[key]), [parent[key]]))
            case 4:
                parent[key] = draw.choice(([parent[key]], {"a": parent[key]}, str(parent[key])))
            case _:
                parent[key] = draw.choice(ODD_VALUES)
    return json.dumps(root[0])


def _nodes(value: Any) -> Iterator[Any]:
    """Yield every object and list of a document; long ones by their first parts."""
    if isinstance(value, dict | list):
        yield value
        for part in list(value.values() if isinstance(value, dict) else value)[:60]:
            yield from _nodes(part)


def mutate_safetensors(data: bytes, draw: Random) -> bytes:
    """Change the header as JSON with its length, or bytes of it."""
    length = int.from_bytes(data[:8], "little")
    if draw.random() < 0.4:
        return mutate_bytes(data, draw, 8 + length)
    header = mutate_json(data[8 : 8 + length].decode(), draw).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


# ---- inputs


def write_ggufs(root: Path) -> list[Path]:
    """Write GGUF files of several architectures and types."""
    from common.tiny_checkpoints import GGUF_LINEAR, GGUF_YARN, gguf

    options: list[dict[str, Any]] = [
        {},
        {"type_": "Q4_K", "scale": 4},
        {"type_": "Q8_0", "facts": GGUF_YARN},
        {"type_": "Q4_0", "facts": GGUF_LINEAR},
        {"architecture": "gemma2"},
        {"architecture": "qwen3moe"},
        {"architecture": "gpt2"},
    ]
    return [gguf(_fresh(root / f"{number}"), **each).model for number, each in enumerate(options)]


def write_folders(root: Path) -> list[Path]:
    """Write folders: whole, sharded, quantized, with scaled rotary embeddings, an adapter beside its base."""
    from common.tiny_checkpoints import codes, model, rope
    from safetensors.torch import load_file, save_file

    from tests.checkpoint.quantized_folders import gptq_config, pack_gptq
    from tests.models import save_tiny_model

    whole = model(_fresh(root / "whole"), num_hidden_layers=1)
    save_tiny_model("qwen2", _fresh(root / "shards"), tokenizer=True, max_shard_size=150_000)
    codes(gptq_config(sym=False), pack_gptq(), _fresh(root / "gptq"))
    rope(_fresh(root / "yarn"), rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    save_file(load_file(whole / "model.safetensors"), whole / "model.safetensors", {"format": "pt"})
    return sorted(root.iterdir())


def write_artifacts(root: Path) -> list[Path]:
    """Write an artifact of a tiny model."""
    from common.tiny_checkpoints import model

    from llmc.pipeline import build
    from llmc.plan import plan_build
    from llmc.progress import SilentProgress

    source = model(_fresh(root.with_name("source")), num_hidden_layers=1)
    plan = plan_build(str(source), target="cpu-fp32", profile="local", output=root / "artifact")
    build(plan, SilentProgress())
    return [root / "artifact"]


def _fresh(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def mutate(kind: str, bases: list[Path], target: Path, draw: Random) -> Path:
    """Write a mutated copy of one of `bases` into `target`, and return the path to read."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    base = draw.choice(bases)
    if kind == "gguf":
        data, end = base.read_bytes(), HEADER if draw.random() < 0.9 else None
        (target / base.name).write_bytes(mutate_bytes(data, draw, end))
        return target / base.name
    shutil.copytree(base, target, dirs_exist_ok=True)
    files = [file for file in sorted(target.iterdir()) if file.is_file()]
    named = [file for file in files if file.name in ("config.json", "manifest.json", "genai_config.json")]
    file = draw.choice(named if draw.random() < 0.4 else files)
    if draw.random() < 0.02:
        file.unlink()
    elif file.suffix == ".json":
        file.write_text(mutate_json(file.read_text(), draw))
    elif file.suffix == ".safetensors":
        file.write_bytes(mutate_safetensors(file.read_bytes(), draw))
    else:
        file.write_bytes(mutate_bytes(file.read_bytes(), draw))
    return target


# ---- reading


def read_checkpoint(path: Path) -> None:
    """Open a checkpoint, its first rows and its tokenizer."""
    from llmc.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(path))
    for name in checkpoint.tensors.infos():
        checkpoint.tensors.read(name, 0, 1)
    checkpoint.generation_config()
    checkpoint.digest()
    checkpoint.require_tokenizer()
    checkpoint.tokenizer()


def read_artifact(path: Path) -> None:
    """Inspect an artifact, check its files, and run it for one token."""
    from llmc.artifact.store.folder import open_artifact
    from llmc.artifact.store.integrity import require_intact
    from llmc.errors import LlmcError
    from llmc.pipeline import inspect, run
    from llmc.progress import SilentProgress

    refusals = []
    for step in (
        lambda: inspect(str(path)).render(),
        lambda: require_intact(open_artifact(path)),
        lambda: run(path, "a b", 1, lambda _: None, SilentProgress()),
    ):
        try:
            step()
        except LlmcError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


READERS: dict[str, Callable[[Path], None]] = {
    "gguf": read_checkpoint,
    "folders": read_checkpoint,
    "artifacts": read_artifact,
}
WRITERS: dict[str, Callable[[Path], list[Path]]] = {
    "gguf": write_ggufs,
    "folders": write_folders,
    "artifacts": write_artifacts,
}


def judge(kind: str, path: Path) -> tuple[str, str]:
    """Read an input in this process, and return the outcome and where another exception came from."""
    from llmc.errors import LlmcError

    try:
        READERS[kind](path)
    except LlmcError as error:
        return REFUSED, type(error).__name__
    except Exception as error:  # noqa: BLE001 - the fuzzer looks for any other exception
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/llmc/" in frame.filename]
        last = own[-1] if own else frames[-1]
        return UNTYPED, f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {error}"[:160]
    return TAKEN, ""


def serve(kind: str) -> None:
    """Run as the child: read one path per line, write one answer per line."""
    import warnings

    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        print(json.dumps(judge(kind, Path(line.strip()))), file=out, flush=True)


@dataclass
class Child:
    """The child that reads inputs; a new one is started when one ends."""

    kind: str
    seconds: float
    process: subprocess.Popen[str] | None = None

    def judge(self, path: Path) -> tuple[str, str]:
        if self.process is None:
            command = [sys.executable, __file__, self.kind, "--child"]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
            )
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        started = _cpu_seconds(process.pid)
        os.set_blocking(process.stdout.fileno(), False)
        while not (line := process.stdout.readline()):
            if process.poll() is not None:
                self.process = None
                return CRASH, f"exit code {process.returncode}"
            if _cpu_seconds(process.pid) - started > self.seconds + 10:  # the child imports llmc first
                self.close()
                return HANG, ""
            time.sleep(0.002)
        outcome, detail = json.loads(line)
        return outcome, detail

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("kind", choices=WRITERS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU time per input")
    parser.add_argument("--keep", type=Path, help="folder for inputs with mistakes")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve(options.kind)
        return
    counts: Counter[str] = Counter()
    places: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LLMC_CACHE"] = str(Path(scratch) / "cache")
        bases = WRITERS[options.kind](Path(scratch) / "bases")
        child = Child(options.kind, options.seconds)
        for number in range(options.count):
            path = mutate(options.kind, bases, Path(scratch) / "input", Random(f"{options.seed} {number}"))
            outcome, detail = child.judge(path)
            counts[outcome] += 1
            if outcome in MISTAKES:
                places[f"{outcome}: {detail}"] += 1
                print(f"{number}: {outcome}: {detail}", flush=True)
                if options.keep is not None:
                    shutil.copytree(Path(scratch) / "input", options.keep / f"{options.kind}-{number}")
        child.close()
    print(f"{options.count} {options.kind}, seed {options.seed}: {dict(counts)}")
    for place, count in places.most_common():
        print(f"{count:5} {place}")
    sys.exit(1 if places else 0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
