"""A server of the tests' own: it speaks the protocol of workers, and misbehaves as its first argument says.

Its logits are those of a small model that it knows: the i-th row prefers the token that follows by one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

VOCABULARY = 32


def logits(ids: list[int]) -> np.ndarray:
    rows = np.zeros((len(ids) - 1, VOCABULARY), np.float32)
    rows[np.arange(len(ids) - 1), (np.array(ids[:-1]) + 1) % VOCABULARY] = 4.0
    return rows


def load(folder: str) -> Any:
    """Return a model that computes what llmc's own reader of the folder says."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from llmc.checkpoint import open_checkpoint
    from llmc.validate.reference import TorchModel

    return TorchModel(open_checkpoint(folder).fill_reference())


def main(how: str) -> None:
    say = os.fdopen(os.dup(1), "w")

    def send(event: str, **values: object) -> None:
        say.write(json.dumps({"event": event, **values}) + "\n")
        say.flush()

    request = json.loads(sys.stdin.readline())
    if how == "silent":
        time.sleep(600)
    if how == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (Path(request["scratch"]) / "child").write_text(str(child.pid))
        time.sleep(600)
    if how == "endless":
        print("x" * 4096, end="", file=say, flush=True)
        time.sleep(600)
    if how == "broken":
        send("failure", phase="start", kind="ImportError", message="No module named 'vllm'")
        sys.exit(1)
    if how == "babble":
        print("Loading weights: 100%", flush=True)
    send("version", version="9.1", where=os.environ.get("PYTHONPATH", "CPU"))
    if how == "refuse":
        send("failure", phase="load", kind="ValueError", message="Unknown quantization method\nfoo")
        sys.exit(1)
    if how == "die":
        print("terminate called after throwing std::bad_alloc", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    skipped = ["model.layers.0.mlp.up_proj.weight"] if how == "skip" else []
    if how != "unloaded":
        send("loaded", taken=12, skipped=skipped, unfilled=[], dtype="bfloat16")
    if how == "die-late":
        sys.exit(3)
    if how == "fail-late":
        send("failure", phase="answer", kind="RuntimeError", message="no kernel")
        sys.exit(1)
    scratch = Path(request["scratch"])
    model = load(request["folder"]) if how.startswith("model") else None
    names, own = [], []
    for number, ids in enumerate(request["sequences"]):
        rows = logits(ids) if model is None else model.logits(np.array(ids[:-1]), keep=len(ids) - 1)
        if how == "model-wrong":
            rows = rows[:, ::-1].copy()
        if how == "nan":
            rows[0, 0] = np.nan
        if how == "short":
            rows = rows[:-1]
        if how == "double":
            rows = rows.astype(np.float64)
        shifted = (rows - np.log(np.exp(rows).sum(-1, keepdims=True))).astype(np.float32)
        np.save(scratch / f"l{number}.npy", rows)
        np.save(scratch / f"p{number}.npy", shifted[np.arange(len(rows)), ids[1 : len(rows) + 1]])
        names.append(f"l{number}.npy")
        own.append(f"p{number}.npy")
        send("progress", done=number + 1, total=len(request["sequences"]))
    if how == "outside":
        names[0] = "../outside.npy"
    token_ids = [[ord(letter) % VOCABULARY for letter in text] for text in request["prompts"]]
    if how == "tokens":
        token_ids = [[0, *ids] for ids in token_ids]
    greedy = [
        [(ids[-1] + 1 + i) % VOCABULARY for i in range(request["new_tokens"])] for ids in request["continue"]
    ]
    if model is not None:
        from llmc.checkpoint import open_checkpoint

        tokenizer, new = open_checkpoint(request["folder"]).tokenizer(), request["new_tokens"]
        token_ids = [tokenizer(text)["input_ids"] for text in request["prompts"]]
        greedy = [model.greedy(np.array(ids), new).tolist() for ids in request["continue"]]
    if how in ("long", "beyond"):
        greedy[0] = [*greedy[0], 9] if how == "long" else [VOCABULARY]
    if how == "rows":
        for name, rows in (("inputs.npy", 2), ("outputs.npy", 1)):
            np.save(scratch / name, np.ones((rows, 4), np.float32))
    products = [{"modules": ["q_proj"], "inputs": "inputs.npy", "outputs": "outputs.npy"}]
    send(
        "answer",
        token_ids=token_ids[:-1] if how == "prompts" else token_ids,
        logits=names,
        log_probabilities=own,
        greedy=greedy[:-1] if how == "fewer" else greedy,
        products=products if how == "rows" else None,
        graph=how.partition("=")[2] or None,
    )
    if how == "linger":
        time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1])
