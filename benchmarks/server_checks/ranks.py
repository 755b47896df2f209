"""Compare the ranks of a split checkpoint with one rank: by llmc, by vLLM and by DeepSpeed.

    python benchmarks/server_checks/ranks.py FOLDER [--only llmc,vllm,vllm-split,deepspeed] [--dtype float32]

FOLDER is an artifact built with --shards N, for vLLM with --shards-for vllm. The environments of vLLM and
DeepSpeed are those of `llmc servers`. Each line has the largest difference of a logit (llmc, DeepSpeed) or of
a log-probability (vLLM) between N ranks and one (vllm-split: N ranks that split whole weights), the largest
ratio of a rank's weights to those of one rank, and that of the memory which loading and running them took,
where that is measured.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from llmc.artifact.ranks import RANKS, read_layout
from llmc.checkpoint import open_checkpoint
from llmc.children import run_apart
from llmc.errors import ConfigError, ResourceError
from llmc.evaluation import shipped_text
from llmc.pipeline.steps.ranks import compare_ranks
from llmc.servers.environment import clean_variables, find_server

_SECONDS = 1500
_LENGTH = 64
_LAUNCHER = Path(sys.modules[find_server.__module__].__file__ or "").with_name("deepspeed_launcher.py")

#: Largest difference, ratio of weights, and ratio of memory; None where it is not measured.
Row = tuple[float, float, float | None]


def by_llmc(folder: Path, ranks: int, dtype: str) -> Row:
    """Measure llmc's own ranks, always in float32."""
    found = compare_ranks(folder, ranks, draw(folder))
    return found.max_abs, found.weights, found.growth


def by_vllm(folder: Path, ranks: int, dtype: str) -> Row:
    """Measure vLLM with whole weights on one rank, and with sharded_state on all."""
    return vllm_between(folder, dtype, 1, ranks)


def by_vllm_split(folder: Path, ranks: int, dtype: str) -> Row:
    """Measure vLLM on all ranks, with whole weights that it splits itself, and with sharded_state."""
    return vllm_between(folder, dtype, ranks, ranks)


def vllm_between(folder: Path, dtype: str, whole_ranks: int, ranks: int) -> Row:
    """Measure vLLM with whole weights on some ranks, and with sharded_state on others."""
    python = find_server("vllm").command[0]
    program = Path(__file__).with_name("vllm_ranks.py")
    tokens = ",".join(str(each) for each in draw(folder)[0])
    answers: list[dict[str, Any]] = []
    with TemporaryDirectory() as scratch:
        output = Path(scratch) / "answer.json"
        for count, load_format in ((whole_ranks, "auto"), (ranks, "sharded_state")):
            place = folder if load_format == "auto" else folder / RANKS
            asked = (str(place), str(count), load_format, dtype, str(output), tokens)
            call([python, "-P", "-B", str(program), *asked], {"VLLM_NO_USAGE_STATS": "1"})
            answers.append(json.loads(output.read_bytes()))
    one, all_ = answers
    difference = np.max(np.abs(np.array(one["logprobs"]) - np.array(all_["logprobs"])))
    return float(difference), max(all_["weight_bytes"]) / one["weight_bytes"][0], None


def by_deepspeed(folder: Path, ranks: int, dtype: str) -> Row:
    """Measure DeepSpeed's AutoTP by the launcher that ships."""
    python = find_server("deepspeed").command[0]
    logits, weights, growth = [], [], []
    with TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.npy"
        np.save(tokens, draw(folder))
        for count in (1, ranks):
            output = Path(scratch) / str(count)
            output.mkdir()
            start = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
            asked = (str(folder), "--tokens", str(tokens), "--output", str(output), "--dtype", dtype)
            call(
                [python, "-P", *start, str(_LAUNCHER), *asked],
                {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"},
            )
            facts = [json.loads(file.read_bytes()) for file in output.glob("rank-*.json")]
            logits.append(np.load(output / "logits.npy"))
            weights.append(max(each["weight_bytes"] for each in facts))
            growth.append(max(each["growth_bytes"] for each in facts))
    difference = float(np.max(np.abs(logits[1] - logits[0])))
    return difference, weights[1] / weights[0], growth[1] / growth[0]


def draw(folder: Path) -> np.ndarray:
    """Return the tokens that are computed, the first of the text that ships, int64 (1, length)."""
    tokens = open_checkpoint(str(folder)).tokenizer()(shipped_text().text).input_ids
    return np.array([tokens[:_LENGTH]], np.int64)


def call(command: Sequence[str], variables: dict[str, str]) -> None:
    """Run a program of another environment.

    Raises:
        ResourceError: It failed.
    """
    environment = clean_variables({"HF_HUB_OFFLINE": "1", **variables})
    result = run_apart(command, Path.cwd(), _SECONDS, environment)
    if result.returncode != 0:
        raise ResourceError(f"{command[0]} ended with {result.returncode}: {result.stderr[-2000:]}")


MEASURES: dict[str, Callable[[Path, int, str], Row]] = {
    "llmc": by_llmc,
    "vllm": by_vllm,
    "vllm-split": by_vllm_split,
    "deepspeed": by_deepspeed,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compare ranks with one rank.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(MEASURES))
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    layout = read_layout(folder)
    if layout is None:
        raise ConfigError(f"{folder} is not split over ranks")
    print(f"{len(layout.ranks)} ranks, names of {layout.names}, {arguments.dtype}")
    print("| by | largest difference | weights of a rank | memory of a rank |\n|---|---|---|---|")
    for name in arguments.only.split(","):
        difference, weights, memory = MEASURES[name](folder, len(layout.ranks), arguments.dtype)
        shown = "not measured" if memory is None else f"{memory:.3f}"
        print(f"| {name} | {difference:.2g} | {weights:.3f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
