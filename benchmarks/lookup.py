"""Compare prompt lookup with plain decoding: speed, tokens per step and equal text, by kind of prompt.

    python benchmarks/lookup.py [--artifact FOLDER …] [--draft 3 7 …] [--rounds 3]

Summaries and edits of code repeat their prompt, chat does not, so they are measured separately. Each prompt
is continued plainly and with drafts, in turn, in one process with onnxruntime-genai. A ratio is the plain
time per token over the time with drafts, above 1 where drafts are faster: the median over prompts and rounds,
with the range. Without --artifact the demo is built for cpu-int4-compiled.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime_genai as og
from common.artifacts import build_apart
from common.machine import describe
from common.options import add_cache, make_parser
from common.timing import spread

from llmc.artifact.manifest import MODEL
from llmc.backends.onnxruntime.lookup import piece_length, speculative_options, verifying_model

TARGET = "cpu-int4-compiled"
ARTICLE = """\
The town of Varnholt lies on a bend of the river Asel, where the old trade road crosses it. For most \
of its history the bridge was made of wood and had to be rebuilt after every flood. In 1764 the \
council decided to pay for a bridge of stone, and the work took eleven years. The new bridge had \
five arches and a toll house at its western end. The toll was one copper coin for a person on foot \
and four for a cart, and it paid for the hospital until 1871, when tolls were abolished. During the \
flood of 1893 the water rose above the arches for three days, but the bridge held. It was widened in \
1931 for motor cars, and the toll house became a museum of the river. Today about nine thousand cars \
cross the bridge every day, and the council is planning a second bridge two kilometres to the north, \
so that the old one can be given back to people on foot."""
MINUTES = """\
Minutes of the library committee, 3 March. Ms Okafor reported that the roof of the reading room \
leaks in two places and that the repair will cost about 14,000 euros. Mr Lindqvist proposed to pay \
for the repair from the reserve, which holds 31,000 euros. The committee agreed. Ms Duarte reported \
that visits on Saturdays have doubled since the opening hours were extended to six in the evening. \
She proposed to open on Sundays from ten to two for a trial of three months. Mr Hale was against it, \
since there are too few staff. The committee agreed to a trial of two months, if two volunteers can \
be found. Mr Hale will ask for volunteers and report in April."""
PRICES = """def sum_prices(items):
    total = 0
    for item in items:
        if item.price > 0:
            total = total + item.price * item.count
        else:
            raise ValueError("price must be positive")
    return total


def average_price(items):
    total = 0
    for item in items:
        total = total + item.price
    return total / len(items)
"""
QUEUE = """class Queue:
    def __init__(self, limit):
        self.limit = limit
        self.items = []

    def push(self, item):
        if len(self.items) >= self.limit:
            raise IndexError("the queue is full")
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("the queue is empty")
        return self.items.pop(0)
"""
PROMPTS = {
    "summary": (
        f"Summarise this text in three sentences.\n\n{ARTICLE}",
        f"Summarise these minutes: what was decided, and who does what?\n\n{MINUTES}",
    ),
    "code": (
        f"Rename the variable `total` to `amount` and print the whole code again.\n\n```python\n{PRICES}```",
        f"Add a docstring to every method of this class and print it all again.\n\n```python\n{QUEUE}```",
    ),
    "chat": (
        "Name three rivers of Europe and say a few words about each.",
        "Why is the sky blue? Explain it to a child.",
        "Write a short story about a lighthouse keeper who finds a letter.",
    ),
}


@dataclass
class Results:
    """The results of one kind of prompt with one length of drafts.

    Args:
        decode: Plain time over time with drafts, without the prompt's.
        whole: The same with the prompt's.
        tokens, steps, drafted, accepted: Counts of one round.
        same: Tokens before the first that differs, and total number of tokens, by prompt.
    """

    decode: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    same: list[tuple[int, int]] = field(default_factory=list)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--artifact", type=Path, action="append", help="may be given several times")
    parser.add_argument("--draft", type=int, nargs="+", default=[3, 7])
    parser.add_argument("--prompts", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--tokens", type=int, default=160, help="maximum number of new tokens")
    parser.add_argument("--rounds", type=int, default=3)
    add_cache(parser)
    options = parser.parse_args()
    print(describe())
    names = f"{'artifact':20} {'prompt':8} draft  {'decode':17} {'whole':17}"
    print(f"{names} tok/step accepted   same text")
    for folder in options.artifact or [build_apart("demo", TARGET, options.cache / f"demo-{TARGET}")]:
        measure(folder, options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    plain = og.Model(str(folder))
    graph = verifying_model(folder / MODEL)
    config = og.Config(str(folder))
    if graph is not None:
        config.add_model_data(MODEL, graph)
    verifying = og.Model(config)
    tokenizer = og.Tokenizer(plain)
    for kind in options.prompts:
        results = {draft: Results() for draft in options.draft}
        for prompt in PROMPTS[kind]:
            messages = json.dumps([{"role": "user", "content": prompt}])
            ids = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
            for round_ in range(-1, options.rounds):
                expected, *times, _ = generate(plain, ids, options.tokens, None)
                for draft, one in results.items():
                    drafted_text, *own, stats = generate(verifying, ids, options.tokens, draft)
                    if round_ < 0:  # warm-up, which also gives the counts, since they are always the same
                        count(one, expected, drafted_text, stats)
                        continue
                    # Texts that diverge have different lengths, so times are per token.
                    one.decode.append(times[1] / len(expected) / (own[1] / len(drafted_text)))
                    one.whole.append(sum(times) / len(expected) / (sum(own) / len(drafted_text)))
        for draft, one in results.items():
            report(folder, kind, draft, one)


def generate(model: Any, ids: Any, most: int, draft: int | None) -> tuple[list[int], float, float, Any]:
    """Return tokens, seconds of the prompt and of all tokens after it, and the runtime's counts."""
    params = og.GeneratorParams(model)
    params.set_search_options(batch_size=1, do_sample=False, max_length=len(ids) + most)
    if draft is not None:
        params.set_speculative_options(**speculative_options(draft))
        params.set_search_options(chunk_size=piece_length(len(ids)))
    generator = og.Generator(model, params)
    start = time.perf_counter()
    generator.append_tokens(ids)
    first = time.perf_counter()
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    end = time.perf_counter()
    return tokens, first - start, end - first, None if draft is None else generator.get_speculative_stats()


def count(one: Results, expected: list[int], tokens: list[int], stats: Any) -> None:
    pairs = zip(expected, tokens, strict=False)
    common = min(len(expected), len(tokens))
    one.same.append((next((i for i, (a, b) in enumerate(pairs) if a != b), common), len(expected)))
    one.tokens += len(tokens)
    one.steps += stats["target_forward_passes"] + stats["standard_fallback_steps"]
    one.drafted += stats["draft_tokens_proposed"]
    one.accepted += stats["draft_tokens_accepted"]


def report(folder: Path, kind: str, draft: int, one: Results) -> None:
    ratios = [spread(r).ljust(17) for r in (one.decode, one.whole)]
    same = ", ".join(f"{equal} of {total}" for equal, total in one.same)
    share = f"{one.accepted} of {one.drafted}"
    print(
        f"{folder.name:20} {kind:8} {draft:5}  {ratios[0]} {ratios[1]} {one.tokens / one.steps:8.2f} "
        f"{share:10} {same}",
        flush=True,
    )


if __name__ == "__main__":
    main()
