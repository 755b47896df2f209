"""Check under an emulator that the kernels for Arm compute the same numbers as those for x86-64.

    python benchmarks/arm.py [--cpu neoverse-n1]

Requires `pip install 'llmc[compile]'` and QEMU's user emulation (qemu-aarch64). The kernels that the tests
run under sanitizers, products of 4 and 8 bits over few and many rows and attention, are compiled for both and
run on the same numbers. This does not measure speed.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import ROOT
from common.options import make_parser

from llmc.backends.compiled.isa import INSTRUCTION_SETS, InstructionSet


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--cpu", default="neoverse-n1", help="QEMU's name of the CPU that is emulated")
    options = parser.parse_args()
    sets = {isa.name: isa for isa in INSTRUCTION_SETS}
    emulator = ("qemu-aarch64", "-cpu", options.cpu)
    with tempfile.TemporaryDirectory() as folder:
        native = values(sets["AVX2"], "x86_64-linux-musl", (), Path(folder) / "x86")
        arm = values(sets["NEON dotprod"], "aarch64-linux-musl", emulator, Path(folder) / "arm")
    difference = np.abs(arm - native)
    print(
        f"{len(native)} values to {np.abs(native).max():.3g}; largest difference {difference.max():.2g}, "
        f"{np.count_nonzero(difference)} differ"
    )


def values(isa: InstructionSet, triple: str, emulator: tuple[str, ...], program: Path) -> np.ndarray:
    """Return what the kernels for `isa` compute."""
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", triple, "-static"]
    flags = ["-std=c++17", "-O2", "-w", "-pthread", *isa.flags]
    source = ROOT / "tests" / "backends" / "compiled" / "sanitized.cpp"
    kernels = f"-I{ROOT / 'llmc' / 'kernels'}"
    subprocess.run([*compiler, *flags, kernels, str(source), "-o", str(program)], check=True)
    result = program.with_suffix(".bin")
    answer = subprocess.run(
        [*emulator, str(program), str(result)], check=True, capture_output=True, text=True
    )
    if answer.stdout != "0\n":
        sys.exit(f"{isa.name}: {answer.stdout.strip()} values are not finite, or a check failed")
    return np.fromfile(result, np.float32)


if __name__ == "__main__":
    main()
