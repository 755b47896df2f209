"""Ask vLLM which slice of which tensor each rank loads; a program that vLLM's own environment runs.

`python -P vllm_layout.py FOLDER RANKS OUTPUT` builds vLLM's model of a Hugging Face folder once for every
rank of tensor parallelism, without weights (on torch's device `meta`), and has the model's own `load_weights`
read tensors without data. Every copy that it makes is recorded: from which box of which tensor of the folder,
to which box of which parameter. So names, fused matrices, repeated heads and padding are those of vLLM's own
code, and no architecture is listed here.

OUTPUT is JSON, a `RankLayout` of llmc/artifact/ranks.py: the tensors that vLLM's loader of `sharded_state`
wants (vllm/model_executor/model_loader/sharded_state_loader.py: the state dict before weights are processed
for a device), and the boxes that they are made of. Tensors that no file of the folder has, such as scales of
the KV cache that are 1, have their values.

This program imports nothing of llmc. It exits with 3 and one line on standard error if vLLM computes a
parameter from a tensor instead of copying it.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch  # noqa: TID253 - this is a program, which nothing imports
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: TID253

Box = tuple[tuple[int, ...], tuple[int, ...]]

#: Tensors up to this number of elements are read: loaders may look at the value of a scalar.
_SMALL = 16


class NotCopiedError(Exception):
    """Raised if a parameter is not made of boxes of tensors of the folder."""


class Rank:
    """A group of tensor parallelism as seen by one of its ranks; it can communicate with no other rank."""

    def __init__(self, rank: int, size: int) -> None:
        self.world_size, self.rank_in_group, self.rank, self.local_rank = size, rank, rank, 0
        self.is_first_rank, self.is_last_rank = rank == 0, rank == size - 1


def box_of(view: torch.Tensor, shape: tuple[int, ...]) -> Box:
    """Return start and size of a view in the contiguous tensor of `shape` that it was taken from.

    Raises:
        NotCopiedError: The view is transposed, or has steps.
    """
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    rest, start = view.storage_offset(), []
    for stride in strides:
        start.append(rest // stride)
        rest %= stride
    size = [1] * len(shape)
    axis = 0
    for length, step in zip(view.shape, view.stride(), strict=True):
        if length == 1:
            continue
        while axis < len(shape) and strides[axis] != step:
            axis += 1
        if axis == len(shape):
            raise NotCopiedError("is read in another order than it is stored in")
        size[axis] = length
        axis += 1
    if any(first + length > whole for first, length, whole in zip(start, size, shape, strict=True)):
        raise NotCopiedError("is read across its rows")
    return tuple(start), tuple(size)


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what is copied from tensors of the folder into parameters."""

    def __init__(self, sources: dict[int, tuple[str, tuple[int, ...]]], parameters: dict[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sources = sources
        self._targets = {storage(each): (name, tuple(each.shape)) for name, each in parameters.items()}
        self.pieces: dict[str, dict[Box, dict[str, Any]]] = {}
        self.values: dict[str, list[float]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name.endswith("_") and args and isinstance(args[0], torch.Tensor):
            target = self._targets.get(storage(args[0]))
            if target is not None:
                self._record(*target, name, args)
        return result

    def _record(self, name: str, shape: tuple[int, ...], operator: str, args: Any) -> None:
        box = box_of(args[0], shape)
        if operator == "zero_" or (operator == "fill_" and not args[1]):
            return
        if operator == "fill_" and math.prod(box[1]) == math.prod(shape) <= _SMALL:  # a scalar that was read
            self.values[name] = [float(args[1])] * math.prod(shape)
            return
        source = self._sources.get(storage(args[1])) if operator == "copy_" else None
        if source is None:
            raise NotCopiedError(f"{name} is computed by {operator}")
        try:
            start, size = box_of(args[1], source[1])
        except NotCopiedError as error:
            raise NotCopiedError(f"{source[0]} {error}") from error
        if math.prod(size) != math.prod(box[1]):
            raise NotCopiedError(f"{name} repeats {source[0]}")
        piece = {"source": source[0], "start": start, "size": size, "at": box[0], "extent": box[1]}
        self.pieces.setdefault(name, {})[box] = piece


def storage(tensor: torch.Tensor) -> int:
    """Return what tells the memory of a tensor from that of another, also without data."""
    return int(tensor.untyped_storage()._cdata)


def main() -> None:
    """Write the layout."""
    folder, ranks, output = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    import vllm
    import vllm.distributed.parallel_state as state
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = EngineArgs(model=str(folder), enforce_eager=True, skip_tokenizer_init=True)
    config = arguments.create_engine_config()
    config.parallel_config.tensor_parallel_size = ranks
    alone = Rank(0, 1)
    for group in ("_PP", "_DP", "_EP", "_WORLD", "_PCP", "_DCP"):
        setattr(state, group, alone)
    tensors = list(read(folder))
    every = []
    for rank in range(ranks):
        state._TP = state._ETP = Rank(rank, ranks)
        with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
            every.append(layout(config, tensors))
    whole = {name: described(tensor) for name, tensor in tensors}
    output.write_text(json.dumps({"names": f"vllm {vllm.__version__}", "tensors": whole, "ranks": every}))


def layout(config: Any, tensors: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """Return the tensors of the rank that vLLM's groups name."""
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
    from vllm.model_executor.model_loader.utils import initialize_model

    def build(device: str) -> Any:
        config.compilation_config.static_forward_context.clear()
        with torch.device(device):
            return initialize_model(vllm_config=config, model_config=config.model_config)

    wanted = ShardedStateLoader._filter_subtensors(build("cpu").state_dict())
    model = build("meta")
    parameters = model.state_dict(keep_vars=True)
    sources = {storage(tensor): (name, tuple(tensor.shape)) for name, tensor in tensors}
    types = {name: tensor.dtype for name, tensor in tensors}
    with Copies(sources, parameters) as copies:
        model.load_weights(iter(tensors))
    found = {}
    for name, tensor in wanted.items():
        pieces = copies.pieces.get(name)
        if pieces is not None:
            stored = {types[piece["source"]] for piece in pieces.values()}
            if len(stored) > 1:
                raise NotCopiedError(f"{name} joins tensors of several types")
            found[name] = {"dtype": str(stored.pop())[6:], "shape": list(tensor.shape)}
            found[name]["pieces"] = list(pieces.values())
        elif tensor.numel() <= _SMALL:
            found[name] = described(tensor)
            found[name]["values"] = copies.values.get(name, found[name]["values"])
        else:
            raise NotCopiedError(f"{name} is in no file")
    return found


def described(tensor: torch.Tensor) -> dict[str, Any]:
    """Return the type and shape of a tensor, and its values if it is small."""
    entry: dict[str, Any] = {"dtype": str(tensor.dtype)[6:], "shape": list(tensor.shape)}
    if tensor.numel() <= _SMALL:
        entry["values"] = tensor.reshape(-1).tolist()
    return entry


def read(folder: Path) -> Any:
    """Yield names and tensors without data of a folder; small ones have their data."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                part = opened.get_slice(name)
                shape = part.get_shape()
                if math.prod(shape) <= _SMALL:
                    yield name, opened.get_tensor(name)
                else:
                    yield name, torch.empty(shape, dtype=opened.get_tensor(name).dtype, device="meta")


if __name__ == "__main__":
    try:
        main()
    except NotCopiedError as error:
        print(error, file=sys.stderr)
        sys.exit(3)
