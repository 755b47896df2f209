"""Kernels alone on one core: products by rows, a row quantized, a tile of prefill's attention.

    python benchmarks/kernels.py [--isa "AVX-512 VNNI"]

Compiled by the compiler that builds use. Best of seven rounds; weights of one product after the other are
more than the caches hold where few rows read them.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from machine import describe

from llmc.backends.compiled.isa import INSTRUCTION_SETS, choose_isa
from llmc.backends.compiled.toolchain import find_compiler
from llmc.machine import detect_cpu

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sets = {known.name: known for known in INSTRUCTION_SETS}
    parser.add_argument("--isa", choices=sets, help="default: the fastest that this CPU has")
    options = parser.parse_args()
    isa = sets[options.isa] if options.isa else choose_isa(detect_cpu().isa, "local")
    compiler = find_compiler(isa.machine)
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-w", f"-I{ROOT / 'llmc' / 'kernels'}", *isa.flags]
    print(f"{describe()}; {isa.name}, {compiler.version}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "kernels"
        source = Path(__file__).with_suffix(".cpp")
        subprocess.run([*compiler.command, *flags, str(source), "-o", str(program)], check=True)
        subprocess.run([str(program)], check=True)


if __name__ == "__main__":
    main()
