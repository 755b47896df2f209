"""Print vLLM's log-probabilities of tokens, and its bytes of weights; a program of its environment.

`python -P vllm_ranks.py FOLDER RANKS FORMAT DTYPE OUTPUT TOKENS`: with RANKS of tensor parallelism, the
loader FORMAT (`auto` for whole weights, `sharded_state` for files of ranks), and TOKENS as numbers with
commas.
"""

import json
import os
import sys
from pathlib import Path


def count_bytes(worker):  # type: ignore[no-untyped-def]
    """Return the bytes of the parameters of a worker's model."""
    return sum(each.nbytes for each in worker.model_runner.model.parameters())


def main() -> None:
    """Run it."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    from vllm import LLM, SamplingParams

    folder, ranks, load_format, dtype, output, listed = sys.argv[1:]
    tokens = [int(each) for each in listed.split(",")]
    model = LLM(
        model=folder,
        skip_tokenizer_init=True,
        tensor_parallel_size=int(ranks),
        distributed_executor_backend="mp",
        load_format=load_format,
        max_model_len=len(tokens) + 8,
        enforce_eager=True,
        dtype=dtype,
    )
    weights = model.collective_rpc(count_bytes)
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    [answer] = model.generate([{"prompt_token_ids": tokens}], settings)
    known = answer.prompt_logprobs[1:]
    logprobs = [each[token].logprob for each, token in zip(known, tokens[1:], strict=True)]
    Path(output).write_text(json.dumps({"logprobs": logprobs, "weight_bytes": weights}))


if __name__ == "__main__":
    main()
