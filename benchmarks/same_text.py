"""Compare greedy text of compiled kernels with that of ONNX Runtime's operators with the same weights.

    python benchmarks/same_text.py [--checkpoint demo] [--tokens 64]

50 prompts go through the model's chat template. Where two texts diverge, the gap is printed: the smaller of
the margins by which either side preferred its own token, in logits. The weights are those of `cpu-int4`, and
products of both sides use activations in 8 bits.
"""

import numpy as np
from common.artifacts import build_target, open_model
from common.machine import describe
from common.options import add_checkpoint, make_parser
from common.sources import checkpoint

from llmc.checkpoint import open_checkpoint
from llmc.runtime.ort_model import OrtModel

TARGETS = ("cpu-int4-compiled", "cpu-int4")
TASKS = (
    "Explain {} to a child.",
    "Write two sentences about {}.",
    "What should one know about {}?",
    "List three facts about {}.",
    "Ask me a question about {}.",
)
SUBJECTS = (
    *("rain", "the moon", "bread", "bicycles", "the number seven"),
    *("honey bees", "compilers", "old maps", "rivers", "chess"),
)


def main() -> None:
    parser = make_parser(__doc__)
    add_checkpoint(parser)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    source = checkpoint(options.checkpoint, options.cache)
    ours, theirs = (open_model(build_target(source, name, options.cache).path) for name in TARGETS)
    tokenizer = open_checkpoint(str(source)).tokenizer()
    gaps = []
    for prompt in (task.format(subject) for subject in SUBJECTS for task in TASKS):
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])[None]
        gaps.append(first_difference(ours, theirs, ids, options.tokens))
    parted = [gap for gap in gaps if gap is not None]
    print(describe())
    print(
        f"{options.checkpoint}: {len(gaps) - len(parted)} of {len(gaps)} texts of {options.tokens} tokens "
        f"are equal; gaps where others diverge: {', '.join(f'{gap:.3f}' for gap in sorted(parted)) or 'none'}"
    )


def first_difference(ours: OrtModel, theirs: OrtModel, ids: np.ndarray, tokens: int) -> float | None:
    """Return the gap where greedy texts diverge; None if they do not."""
    logits = [model.prefill(ids, steps=tokens)[0, -1] for model in (ours, theirs)]
    for _ in range(tokens):
        first, second = (int(each.argmax()) for each in logits)
        if first != second:
            return float(min(logits[0][first] - logits[0][second], logits[1][second] - logits[1][first]))
        logits = [model.decode(np.array([[first]]))[0, -1] for model in (ours, theirs)]
    return None


if __name__ == "__main__":
    main()
