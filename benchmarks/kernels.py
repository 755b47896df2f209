"""Time kernels alone on one core: products by rows, quantizing a row, a tile of prefill's attention.

    python benchmarks/kernels.py [--isa "AVX-512 VNNI"]

The compiler that builds use compiles them. Each figure is the best of seven rounds. Products use one weight
after the other, more than the caches hold, where few rows read them.
"""

import subprocess
import tempfile
from pathlib import Path

from common import ROOT
from common.machine import describe
from common.options import make_parser

from llmc.backends.compiled.isa import INSTRUCTION_SETS, choose_isa
from llmc.backends.compiled.toolchain import find_compiler
from llmc.machine import detect_cpu


def main() -> None:
    parser = make_parser(__doc__)
    sets = {each.name: each for each in INSTRUCTION_SETS}
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
