"""Run one rank of a split checkpoint in a process of its own, which `llmc.pipeline.steps.ranks` starts."""

import json
import os
import resource
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np

from llmc.checkpoint import open_checkpoint
from llmc.checkpoint.rank_model import fill_rank
from llmc.children import die_with_parent


def main() -> None:
    """Compute logits of tokens together with the other ranks.

    Arguments: the folder, the rank, the number of ranks, a folder that the ranks share, and seconds. One rank
    alone computes with the whole weights. The shared folder has tokens.npy, (batch, length); rank 0 writes
    logits.npy, float32 (batch, length, vocabulary), and every rank writes rank-R.json.
    """
    die_with_parent()
    folder, scratch = Path(sys.argv[1]), Path(sys.argv[4])
    rank, ranks, seconds = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[5])
    import torch
    import torch.distributed as dist
    import transformers.distributed.tensor_parallel  # noqa: F401 - memory of imports is not that of weights

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    tokens = torch.from_numpy(np.load(scratch / "tokens.npy"))
    checkpoint = open_checkpoint(str(folder), rank=rank if ranks > 1 else None)
    if ranks > 1:
        dist.init_process_group(
            "gloo",
            init_method=(scratch / "rendezvous").as_uri(),
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=seconds),
        )
    before = _peak()
    model = (
        fill_rank(checkpoint.config, checkpoint.tensors, checkpoint.tied, ranks)
        if ranks > 1
        else checkpoint.fill_reference()
    )
    held = {id(each): getattr(each, "_local_tensor", each).nbytes for each in model.parameters()}
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    if rank == 0:
        np.save(scratch / "logits.npy", logits.float().numpy())
    facts = {"weight_bytes": sum(held.values()), "growth_bytes": _peak() - before}
    (scratch / f"rank-{rank}.json").write_text(json.dumps(facts), encoding="utf-8")
    if ranks > 1:
        dist.destroy_process_group()


def _peak() -> int:
    """Return the most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
