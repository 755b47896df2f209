"""Build small checkpoints of every kind: each must equal transformers, or must be refused.

    python benchmarks/checkpoints.py [--only gguf,rope/yarn] [--folder DIR]

A build that succeeds must give the logits of transformers, and `llmc run` the greedy text of its `generate`
with the same tokenizer; for a target that quantizes, only the KL divergence of the logits is judged. A
refusal must name the cause and have a hint. Three kinds of mistakes are counted:

    wrong in silence         built, but with other logits or text, or although it must be refused
    right but refused        refused, or a gate missed, although the original is right
    refused without a cause  the message does not name the cause, has no hint, or is an internal error
"""

import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common.checkpoint_kinds import KINDS, Kind, Written
from common.machine import describe
from common.options import make_parser

from llmc.errors import LlmcError
from llmc.pipeline import build, run
from llmc.plan import plan_build
from llmc.progress import SilentProgress
from llmc.validate.distribution import log_softmax
from tests.notes import Notes

RIGHT, SILENT = "right", "wrong in silence"
REFUSED, CAUSELESS = "right but refused", "refused without a cause"
MISTAKES = (SILENT, REFUSED, CAUSELESS)
PROMPTS = ("Hello world", "the quick brown fox")
NEW_TOKENS = 12
RANDOM_PROMPTS, PROMPT_TOKENS = 4, 24
#: Maximum difference of a float32 logit, relative to the largest logit.
TOLERANCE = 1e-4
#: Maximum mean KL divergence of a target that quantizes, in nats: embedding and head are at 4 bits too.
DIVERGENCE = 0.15


@dataclass(frozen=True)
class Judgement:
    """The judgement of a checkpoint: outcome, verdict, and the figure or the words that decided it."""

    outcome: str
    verdict: str
    detail: str


def judge(kind: Kind, folder: Path) -> Judgement:
    """Write and build a checkpoint; compare the artifact with the original, or the refusal with the cause."""
    written = kind.write(folder)
    output = folder.with_name(f"{folder.name}.artifact")
    plan = plan_build(
        str(written.model), target=kind.target, profile="local", output=output, **written.options
    )
    progress = Notes()
    try:
        result = build(plan, progress)
    except LlmcError as error:
        return judge_refusal(kind, error)
    except Exception as error:  # noqa: BLE001 - an internal error is one of the verdicts
        return Judgement("internal error", CAUSELESS, f"{type(error).__name__}: {error}"[:120])
    failure = result.failure()
    if failure is not None:
        verdict = CAUSELESS if kind.refused else REFUSED
        return Judgement("gate missed", verdict, failure.fact.splitlines()[0])
    if kind.refused:
        return Judgement("built", SILENT, f"must be refused: {kind.refused}")
    if not any(re.search(kind.told, note) for note in ["", *progress.notes]):
        return Judgement("built", SILENT, f"no note says {kind.told}")
    return compare(written, output, rounded=kind.target != "cpu-fp32")


def judge_refusal(kind: Kind, error: LlmcError) -> Judgement:
    outcome, words = f"exit {int(error.exit_code)}", f"{error.fact}; {error.hint}".replace("\n", " ")
    if not kind.refused:
        return Judgement(outcome, REFUSED, words)
    named = error.hint is not None and re.search(kind.refused, words)
    return Judgement(outcome, RIGHT if named else CAUSELESS, words)


def compare(written: Written, artifact: Path, *, rounded: bool) -> Judgement:
    """Compare logits of onnxruntime-genai and text of `llmc run` with transformers.

    Args:
        rounded: Whether the target quantizes: then only the KL divergence of logits is judged.
    """
    import torch
    from transformers import AutoTokenizer

    source = written.tokenizer or written.model
    original, tokenizer = load(written), AutoTokenizer.from_pretrained(source)
    random = np.random.default_rng(0)
    differences, divergences = [], []
    for _ in range(RANDOM_PROMPTS):
        ids = random.integers(5, 200, (1, PROMPT_TOKENS))
        with torch.inference_mode():
            expected_logits = original(input_ids=torch.from_numpy(ids)).logits[0, -1].double().numpy()
        logits = serve(artifact, ids)
        differences.append(float(np.abs(logits - expected_logits).max() / np.abs(expected_logits).max()))
        p, q = log_softmax(expected_logits), log_softmax(logits)
        divergences.append(float((np.exp(p) * (p - q)).sum()))
    if rounded:
        detail, right = f"KL divergence {np.mean(divergences):.3f}", np.mean(divergences) <= DIVERGENCE
    else:
        detail, right = f"logits within {max(differences):.0e} of the largest", max(differences) <= TOLERANCE
    if not right:
        return Judgement("built", SILENT, detail)
    if rounded:
        return Judgement("built", RIGHT, detail)
    for prompt in PROMPTS:
        generated = run(artifact, prompt, NEW_TOKENS, lambda _: None, SilentProgress()).text
        expected = generate(original, tokenizer, prompt, written.template)
        if generated != expected:
            return Judgement("built", SILENT, f"{prompt!r}: text {generated!r} where {expected!r} is right")
    return Judgement("built", RIGHT, detail)


def load(written: Written) -> Any:
    """Load the original, float32, in eval mode."""
    import torch
    from transformers import AutoConfig

    from llmc.architecture import auto_class

    if written.original is not None:
        return written.original().eval()
    auto = auto_class(AutoConfig.from_pretrained(written.model))
    return auto.from_pretrained(written.model, dtype=torch.float32).eval()


def serve(artifact: Path, ids: np.ndarray) -> np.ndarray:
    """Return logits (vocabulary,) of the last token, by the runtime that serves the artifact."""
    import onnxruntime_genai as og

    model = og.Model(str(artifact))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=ids.shape[1] + 1)
    generator = og.Generator(model, parameters)
    generator.append_tokens(ids.astype(np.int32))
    return np.asarray(generator.get_output("logits"))[0, -1]


def generate(original: Any, tokenizer: Any, prompt: str, template: str | None) -> str:
    """Generate greedy text with transformers, through the chat template if there is one."""
    from transformers import GenerationConfig

    if template or tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            chat_template=template,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"]
    original.generation_config = GenerationConfig(
        eos_token_id=original.generation_config.eos_token_id, pad_token_id=0
    )
    generated = original.generate(
        ids, attention_mask=inputs["attention_mask"], max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return str(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", help="beginnings of names, separated by commas")
    parser.add_argument("--folder", type=Path, help="keep checkpoints and artifacts there")
    options = parser.parse_args()
    beginnings = tuple(options.only.split(",")) if options.only else ("",)
    counts: Counter[str] = Counter()
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.folder or Path(scratch)
        os.environ["LLMC_CACHE"] = str(root / "cache")
        for kind in (kind for kind in KINDS if kind.name.startswith(beginnings)):
            folder = root / re.sub(r"\W+", "-", kind.name)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            judgement = judge(kind, folder)
            counts[judgement.verdict] += 1
            print(
                f"{kind.name:31} {judgement.outcome:14} {judgement.verdict:23} {judgement.detail}", flush=True
            )
            if options.folder is None:
                shutil.rmtree(folder)
                shutil.rmtree(folder.with_name(f"{folder.name}.artifact"), ignore_errors=True)
    print(describe())
    print(f"{counts.total()} checkpoints in {time.process_time() - started:.0f} s of this process's CPU time")
    print(", ".join(f"{verdict}: {counts[verdict]}" for verdict in (RIGHT, *MISTAKES)))
    sys.exit(1 if any(counts[mistake] for mistake in MISTAKES) else 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
