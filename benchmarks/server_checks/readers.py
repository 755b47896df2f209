"""Build a tiny model in each format, and read its matrices back by libraries that are not llmc's.

    python benchmarks/server_checks/readers.py [--only gptq] [--auto-round PYTHON] [--modelopt PYTHON]
        [--edgellm PYTHON] [--json FILE]

Each PYTHON is the interpreter of an environment that has the package; readers without one are not run.
compressed-tensors is read by this interpreter. A matrix counts if all its values are, bit for bit, those that
llmc's own reader of quantized checkpoints gives, which is other code than the writer. The exporter of
Edge-LLM must load every tensor, too.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

_HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parents[1]))

from llmc.arrays import Array  # noqa: E402 - with the repository's tests, by the path above
from llmc.checkpoint import open_checkpoint  # noqa: E402
from llmc.pipeline import build  # noqa: E402
from llmc.plan import plan_build  # noqa: E402
from llmc.progress import SilentProgress  # noqa: E402
from llmc.servers.edgellm_graph import exported_matrices  # noqa: E402
from tests.models import EOS, save_tiny_model  # noqa: E402

_LOADED = re.compile(r"Loaded \d+ tensors, skipped (\d+)")
COMPRESSED, AUTO_ROUND, MODELOPT, EDGELLM = "compressed-tensors", "auto-round", "modelopt", "edgellm"

#: Target and readers of each form.
FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "compressed-tensors pack-quantized": ("vllm-w4a16", (COMPRESSED,)),
    "compressed-tensors int-quantized": ("vllm-w8a8", (COMPRESSED,)),
    "compressed-tensors float-quantized": ("vllm-fp8", (COMPRESSED,)),
    "compressed-tensors nvfp4-pack-quantized": ("vllm-nvfp4", (COMPRESSED,)),
    "gptq": ("gptq-int4", (AUTO_ROUND, EDGELLM)),
    "awq": ("awq-int4", (COMPRESSED, EDGELLM)),
    "modelopt FP8": ("modelopt-fp8", (MODELOPT, EDGELLM)),
    "modelopt NVFP4": ("modelopt-nvfp4", (MODELOPT, EDGELLM)),
}


@dataclass(frozen=True)
class Comparison:
    """What a reader made of a folder.

    Args:
        equal: Number of matrices whose values are equal, bit for bit.
        matrices: Number of matrices that llmc quantized.
        largest: Largest difference of a value, relative to the largest value of its matrix.
        skipped: Number of tensors that the reader skipped; None if it does not say.
        reason: Why it failed; empty if it did not.
    """

    form: str
    reader: str
    equal: int = 0
    matrices: int = 0
    largest: float = 0.0
    skipped: int | None = None
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether all matrices are equal, and no tensor was skipped."""
        return not self.reason and 0 < self.matrices == self.equal and not self.skipped


def make_source(folder: Path) -> Path:
    """Write a tiny llama whose sizes every format and every server takes."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    return save_tiny_model(
        "llama", folder, tokenizer=True, eos_token_id=EOS, num_hidden_layers=2, num_key_value_heads=2, **sizes
    )


def build_folder(source: Path, target: str, output: Path) -> Path:
    """Build a target without its gates."""
    plan = plan_build(str(source), target=target, profile="local", output=output, verify=False)
    return Path(build(plan, SilentProgress()).path)


def own_values(folder: Path) -> dict[str, Array]:
    """Return the quantized matrices as llmc's reader gives them, by module."""
    tensors = open_checkpoint(str(folder)).tensors
    quantized = [name for name, info in tensors.infos().items() if info.codes is not None]
    return {name.removesuffix(".weight"): tensors.read(name) for name in quantized}


def export(python: Path, folder: Path, output: Path) -> int:
    """Export a folder by Edge-LLM; return the number of tensors that it skipped.

    Raises:
        SystemExit: It failed, or does not say the number.
    """
    command = [str(python), "-P", "-m", "tensorrt_edgellm.scripts.export", str(folder), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    said = _LOADED.search(done.stdout + done.stderr)
    if done.returncode or said is None:
        raise SystemExit(f"the exporter ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
    return int(said[1])


def read_by(reader: str, python: Path, folder: Path, scratch: Path) -> tuple[dict[str, Array], int | None]:
    """Return the matrices as another reader gives them, and the tensors that it skipped.

    Raises:
        SystemExit: It failed.
    """
    if reader == EDGELLM:
        skipped = export(python, folder, scratch)
        found = exported_matrices(scratch / "llm" / "model.onnx")
        return {module: read() for module, read in found.items()}, skipped
    output = scratch.with_suffix(".npz")
    command = [str(python), "-P", str(_HERE / "read_folder.py"), reader, str(folder), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    with np.load(output) as arrays:
        return {name: arrays[name] for name in arrays.files if name != "__version__"}, None


def unfuse(found: dict[str, Array], expected: dict[str, Array]) -> dict[str, Array]:
    """Return matrices with those split that Edge-LLM joins where they share their scales: q, k and v."""
    split: dict[str, Array] = {}
    for name, values in found.items():
        parent, _, last = name.rpartition(".")
        parts = [f"{parent}.{each}_proj" for each in "qkv"]
        if last == "qkv_proj_fused" and all(part in expected for part in parts):
            ends = np.cumsum([len(expected[part]) for part in parts])[:-1]
            split |= dict(zip(parts, np.split(values, ends), strict=True))
        else:
            split[name] = values
    return split


def compare(form: str, reader: str, python: Path, folder: Path, scratch: Path) -> Comparison:
    """Read a folder by another reader, and compare it with llmc's."""
    expected = own_values(folder)
    try:
        found, skipped = read_by(reader, python, folder, scratch)
    except SystemExit as error:
        return Comparison(form, reader, matrices=len(expected), reason=str(error))
    found = unfuse(found, expected)
    missing = sorted(set(expected) ^ set(found))
    if missing:
        return Comparison(
            form, reader, matrices=len(expected), reason=f"{len(missing)} that only one has: {missing[0]}"
        )
    equal, largest = 0, 0.0
    for name, values in expected.items():
        equal += int(np.array_equal(values, found[name]))
        difference = (
            float(np.abs(values - found[name]).max()) if values.shape == found[name].shape else np.inf
        )
        largest = max(largest, difference / float(np.abs(values).max()))
    return Comparison(form, reader, equal, len(expected), largest, skipped)


def compare_all(pythons: dict[str, Path], only: str, folder: Path) -> Iterable[Comparison]:
    """Build each form and read it by every reader that there is an interpreter for."""
    source = make_source(folder / "source")
    for form, (target, readers) in FORMS.items():
        if only not in form or not set(readers) & set(pythons):
            continue
        output = build_folder(source, target, folder / target)
        for reader in readers:
            if reader in pythons:
                yield compare(form, reader, pythons[reader], output, folder / f"{target}-{reader}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a part of the names of the forms to read")
    for reader in (AUTO_ROUND, MODELOPT, EDGELLM):
        parser.add_argument(f"--{reader}", type=Path, help=f"an interpreter that has {reader}")
    parser.add_argument("--json", type=Path, help="file for the comparisons")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    named = {reader: getattr(options, reader.replace("-", "_")) for reader in (AUTO_ROUND, MODELOPT, EDGELLM)}
    pythons = {
        COMPRESSED: Path(sys.executable),
        **{k: v.absolute() for k, v in named.items() if v is not None},
    }
    comparisons = []
    with tempfile.TemporaryDirectory() as folder:
        for each in compare_all(pythons, options.only, Path(folder)):
            comparisons.append(each)
            skipped = "" if each.skipped is None else f", {each.skipped} tensors skipped"
            said = each.reason or f"{each.equal} of {each.matrices} equal, off by {each.largest:.1e}{skipped}"
            print(f"{each.form} by {each.reader}: {said}", flush=True)
    held = {each.form for each in comparisons if each.holds} - {c.form for c in comparisons if not c.holds}
    print(f"{len(held)} of {len(FORMS)} forms are equal in every reader that was run")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(each) for each in comparisons], indent=1) + "\n")


if __name__ == "__main__":
    main()
