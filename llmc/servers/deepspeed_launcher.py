"""Serve a Hugging Face folder with DeepSpeed's AutoTP, each rank with its own slices only.

Start it with one process for each rank, on GPUs or on CPUs:

    deepspeed --num_gpus 2 deepspeed_launcher.py FOLDER --prompt "Name three rivers."
    DS_ACCELERATOR=cpu torchrun --nproc-per-node 3 deepspeed_launcher.py FOLDER --prompt "Name three rivers."

The model is built without weights. The output head and the embedding are cut by tokens, which AutoTP leaves
whole, `deepspeed.init_inference` cuts the layers, and each rank then reads the slices of its own parameters,
from the file of its rank where `layout.json` says that it has them, else from the files of other ranks or
from the whole weights. No process holds the whole model.

DeepSpeed has no kernels for the integers of these folders: weights of compressed-tensors (packed integers,
int8, fp8), gptq and awq are dequantized when they are read, into `--dtype`, and activations are not
quantized. Other formats are refused, and so are layers that AutoTP cuts in another way than into ranges of
rows or columns.

This program imports torch, transformers, safetensors and deepspeed, and nothing of llmc.
"""

import argparse
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch  # noqa: TID253 - this is a program, which nothing imports
from safetensors import safe_open

#: Layers of AutoTP whose weight is a range of rows or of columns, and what they leave whole.
_RANGES = {"Linear", "LinearLayer", "LinearAllreduce", "LmHeadLinearAllreduce"}
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


class Folder:
    """The tensors of a folder, read by boxes.

    Args:
        path: The folder.
        rank: This process's rank, whose file is read first.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._path = path
        self._open: dict[str, Any] = {}
        self._pieces: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._values: dict[str, torch.Tensor] = {}
        for folder in (path, path / "ranks"):
            if (folder / "layout.json").is_file():
                self._read_layout(folder, rank)
                break
        for file in sorted(path.glob("*.safetensors")):
            if not file.name.startswith("model-rank-"):
                for name in self._file(file.name).keys():  # noqa: SIM118 - not a mapping
                    shape = tuple(self._file(file.name).get_slice(name).get_shape())
                    self.shapes[name] = shape
                    zeros = [0] * len(shape)
                    piece = {"start": zeros, "size": shape, "at": zeros, "extent": shape}
                    self._pieces.setdefault(name, []).append((file.name, name, piece))
        if not self.shapes:
            raise SystemExit(f"{path} has no weights in safetensors")

    def _read_layout(self, folder: Path, rank: int) -> None:
        layout = json.loads((folder / "layout.json").read_text())
        for name, tensor in layout["tensors"].items():
            self.shapes[name] = tuple(tensor["shape"])
            if tensor.get("values") is not None:
                values = torch.tensor(tensor["values"], dtype=getattr(torch, tensor["dtype"]))
                self._values[name] = values.reshape(tensor["shape"])
        ranks = layout["ranks"]
        for other in sorted(range(len(ranks)), key=lambda each: each != rank):
            file = str(folder / f"model-rank-{other}-part-0.safetensors")
            if not Path(file).is_file():
                continue
            for own, tensor in ranks[other].items():
                for piece in tensor["pieces"]:
                    if len(piece["size"]) == len(piece["extent"]):
                        self._pieces.setdefault(piece["source"], []).append((file, own, piece))

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self._path / name, framework="pt")
        return self._open[name]

    def read(self, name: str, start: list[int], size: list[int]) -> torch.Tensor:
        """Read a box of a tensor; the files are asked in order until all of it is found."""
        if name in self._values:
            return self._values[name][_index(start, size)]
        found: Any = None
        missing = torch.ones(size, dtype=torch.bool)
        for file, own, piece in self._pieces.get(name, ()):
            low = [max(a, b) for a, b in zip(start, piece["start"], strict=True)]
            ends = zip(start, size, piece["start"], piece["size"], strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            extent = [b - a for a, b in zip(low, high, strict=True)]
            here = _index([a - b for a, b in zip(low, start, strict=True)], extent)
            if any(each <= 0 for each in extent) or not missing[here].any():
                continue
            there = [c + a - b for c, a, b in zip(piece["at"], low, piece["start"], strict=True)]
            part = self._file(file).get_slice(own)
            values: torch.Tensor = part[_index(there, extent)] if there else self._file(file).get_tensor(own)
            if extent == list(size):
                return values
            found = values.new_zeros(size) if found is None else found
            found[here] = values
            missing[here] = False
            if not missing.any():
                tensor: torch.Tensor = found
                return tensor
        raise SystemExit(f"{self._path} lacks a part of {name}")

    def whole(self, name: str) -> torch.Tensor:
        """Read a whole tensor."""
        return self.read(name, [0] * len(self.shapes[name]), list(self.shapes[name]))


class Weights:
    """Reads boxes of parameters as floats, by the format that the folder's config declares."""

    def __init__(self, folder: Folder, quantization: dict[str, Any] | None) -> None:
        self._folder, self._config = folder, quantization or {}

    def read(self, name: str, start: list[int], size: list[int]) -> torch.Tensor:
        """Read a box of a parameter: its values, dequantized if the folder stores codes."""
        shapes, module = self._folder.shapes, name.rpartition(".")[0]
        if f"{module}.weight_packed" in shapes and name.endswith(".weight"):
            return self._packed(module, start, size)
        if f"{module}.qweight" in shapes and name.endswith(".weight"):
            read = self._gptq if f"{module}.g_idx" in shapes else self._awq
            return read(module, start, size)
        values = self._folder.read(name, start, size)
        if not values.is_floating_point() and values.dtype != torch.int8:
            raise SystemExit(f"{name} is stored as {values.dtype}, which this program cannot dequantize")
        if name.endswith(".weight") and f"{module}.weight_scale" in shapes:
            return self._scaled(values.float(), module, start, size)
        return values

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        shapes, module = self._folder.shapes, name.rpartition(".")[0]
        if f"{module}.weight_packed" in shapes and name.endswith(".weight"):
            return tuple(self._folder.whole(f"{module}.weight_shape").tolist())
        if f"{module}.qweight" in shapes and name.endswith(".weight"):
            words, scales = shapes[f"{module}.qweight"], shapes[f"{module}.scales"]
            inputs = words[0] if words[1] != scales[1] else words[0] * 32 // int(self._config["bits"])
            return scales[1], inputs
        if name not in shapes:
            raise SystemExit(f"the folder lacks {name}")
        return shapes[name]

    def _packed(self, module: str, start: list[int], size: list[int]) -> torch.Tensor:
        """Packed integers of compressed-tensors: low bits first along the inputs, code + 2 ** (bits - 1)."""
        inputs = self.shape(f"{module}.weight")[1]
        words = self._folder.shapes[f"{module}.weight_packed"][1]
        per = math.ceil(inputs / words)
        bits = 32 // per
        first, last = start[1] // per, -(-(start[1] + size[1]) // per)
        stored = self._folder.read(f"{module}.weight_packed", [start[0], first], [size[0], last - first])
        if stored.dtype != torch.int32:
            raise SystemExit(f"{module} is packed as {stored.dtype}, which this program cannot dequantize")
        codes = _codes(stored, bits)[:, start[1] - first * per :][:, : size[1]].float()
        if f"{module}.weight_zero_point" in self._folder.shapes:
            groups = self._folder.shapes[f"{module}.weight_scale"][1]
            low, count = start[0] // per, -(-(start[0] + size[0]) // per) - start[0] // per
            packed = self._folder.read(f"{module}.weight_zero_point", [low, 0], [count, groups])
            zeros = _codes(packed.T.contiguous(), bits).T[start[0] - low * per :][: size[0]].float()
            codes -= _repeat(zeros, inputs, start[1], size[1])
        else:
            codes -= 2 ** (bits - 1)
        return self._scaled(codes, module, start, size)

    def _scaled(self, codes: torch.Tensor, module: str, start: list[int], size: list[int]) -> torch.Tensor:
        name = f"{module}.weight_scale"
        shape = self._folder.shapes[name]
        if len(shape) < 2 or shape[0] == 1:
            return codes * self._folder.whole(name).float().reshape(1, -1)[:, :1]
        scales = self._folder.read(name, [start[0], 0], [size[0], shape[1]]).float()
        inputs = self.shape(f"{module}.weight")[1]
        return codes * _repeat(scales, inputs, start[1], size[1])

    def _gptq(self, module: str, start: list[int], size: list[int]) -> torch.Tensor:
        """Codes and zero points of gptq: (inputs, outputs), low bits first; zeros are stored less one."""
        bits, per = int(self._config["bits"]), 32 // int(self._config["bits"])
        first, last = start[1] // per, -(-(start[1] + size[1]) // per)
        stored = self._folder.read(f"{module}.qweight", [first, start[0]], [last - first, size[0]])
        codes = _codes(stored.T.contiguous(), bits)[:, start[1] - first * per :][:, : size[1]].float()
        groups = self._folder.whole(f"{module}.g_idx")[start[1] : start[1] + size[1]].long()
        zeros = _codes(self._folder.whole(f"{module}.qzeros"), bits)[:, start[0] : start[0] + size[0]].float()
        zeros += self._config.get("checkpoint_format") != "gptq_v2"
        scales = self._folder.whole(f"{module}.scales")[:, start[0] : start[0] + size[0]].float()
        return (codes - zeros.T[:, groups]) * scales.T[:, groups]

    def _awq(self, module: str, start: list[int], size: list[int]) -> torch.Tensor:
        """Codes and zero points of awq: (inputs, outputs), eight outputs in a word, in an order."""
        inputs = self._folder.shapes[f"{module}.qweight"][0]
        first, last = start[0] // 8, -(-(start[0] + size[0]) // 8)

        def outputs(part: str, low: int, count: int) -> torch.Tensor:
            stored = self._folder.read(f"{module}.{part}", [low, first], [count, last - first])
            codes = _codes(stored, 4).reshape(count, -1, 8)[:, :, _AWQ_ORDER].reshape(count, -1)
            return codes[:, start[0] - first * 8 :][:, : size[0]].T.float()

        groups = self._folder.shapes[f"{module}.scales"][0]
        scales = self._folder.read(f"{module}.scales", [0, start[0]], [groups, size[0]]).T.float()
        zeros = _repeat(outputs("qzeros", 0, groups), inputs, start[1], size[1])
        codes = outputs("qweight", start[1], size[1])
        return (codes - zeros) * _repeat(scales, inputs, start[1], size[1])


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes of int32 words (rows, words), low bits first: (rows, words * 32 / bits)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes: torch.Tensor = (words[:, :, None] >> shifts) & (2**bits - 1)
    return codes.reshape(words.shape[0], -1)


def _repeat(groups: torch.Tensor, inputs: int, start: int, count: int) -> torch.Tensor:
    """Repeat (rows, groups) for the inputs from `start`: (rows, count)."""
    width = -(-inputs // groups.shape[1])
    return groups[:, torch.arange(start, start + count) // width]


def _index(start: list[int], size: list[int]) -> tuple[slice, ...]:
    """Return the index of a box."""
    stop = [first + length for first, length in zip(start, size, strict=True)]
    return tuple(map(slice, start, stop))


@contextmanager
def hollow() -> Iterator[None]:
    """Put parameters that are created onto the device `meta`; buffers keep their values."""
    register = torch.nn.Module.register_parameter

    def on_meta(module: Any, name: str, value: Any) -> None:
        register(module, name, None if value is None else torch.nn.Parameter(value.to("meta"), False))

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def put_nothing(model: Any) -> None:
    """Give every parameter its shape on one element of memory: AutoTP cannot cut tensors of `meta`."""
    kept: dict[int, Any] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None and id(value) not in kept:
                nothing = torch.zeros((), dtype=value.dtype).expand(value.shape)
                kept[id(value)] = torch.nn.Parameter(nothing, requires_grad=False)
            if value is not None:
                module._parameters[name] = kept[id(value)]


def put_memory(model: Any) -> None:
    """Give parameters that AutoTP left whole memory of their own."""
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)


def cut_vocabulary(model: Any) -> None:
    """Cut a linear head and an embedding by tokens, tied or not, where each rank has at least one token.

    The head becomes DeepSpeed's layer whose ranks gather their outputs.
    """
    import deepspeed.comm as dist
    from deepspeed.module_inject.layers import LinearLayer

    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    group, rank, ranks = dist.get_world_group(), dist.get_rank(), dist.get_world_size()
    if ranks == 1 or type(head) is not torch.nn.Linear or not isinstance(table, torch.nn.Embedding):
        return
    if min(head.out_features, table.num_embeddings) < ranks:
        return
    tokens = table.num_embeddings
    counts = [tokens // ranks + (each < tokens % ranks) for each in range(ranks)]
    model.set_output_embeddings(LinearLayer(head, group, gather_output=True, name="lm_head"))
    cut_table(
        table, sum(counts[:rank]), counts[rank], lambda rows: dist.inference_all_reduce(rows, group=group)
    )


def cut_table(table: torch.nn.Embedding, start: int, count: int, add_up: Callable[[Any], Any]) -> None:
    """Leave an embedding a range of its tokens; it keeps its own code, such as a scale of its rows.

    The rows of other tokens are zero, and `add_up` puts the sum over all ranks into a tensor.
    """
    if table.weight.shape[0] != count:  # a tied head has not cut it
        table.weight.data = table.weight.data[start : start + count]
    table.num_embeddings, table.padding_idx = count, None
    foreign: list[torch.Tensor] = []

    def look_up(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        own = inputs[0] - start
        foreign.append((own < 0) | (own >= count))
        return own.masked_fill(foreign[-1], 0), *inputs[1:]

    def complete(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        rows = output.masked_fill(foreign.pop()[..., None], 0)
        add_up(rows)
        return rows

    table.register_forward_pre_hook(look_up)
    table.register_forward_hook(complete)


def build_empty(path: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any] | None]:
    """Build the model of a folder with parameters that take no memory; return it and how codes are stored."""
    from transformers import AutoConfig, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    config = AutoConfig.from_pretrained(path)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        del config.quantization_config
    with hollow():
        model = auto.from_config(config, dtype=dtype)
    model.eval()
    put_nothing(model)
    return model, quantization


def load(path: Path, model: Any, quantization: dict[str, Any] | None) -> Any:
    """Cut a model by AutoTP, and fill it with this rank's weights."""
    import deepspeed
    import deepspeed.comm as dist

    rank, ranks, dtype, config = dist.get_rank(), dist.get_world_size(), model.dtype, model.config
    weights = Weights(Folder(path, rank), quantization)
    tied = dict(model._tied_weights_keys or {}) if config.get_text_config().tie_word_embeddings else {}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cut_vocabulary(model)
    engine = deepspeed.init_inference(
        model, tensor_parallel={"tp_size": ranks}, dtype=dtype, replace_with_kernel_inject=False
    )
    for name, buffer in engine.module.named_buffers():
        buffer.copy_(buffers[name])
    put_memory(engine.module)
    shapes: list[Any] = [None] * ranks
    mine = {n: tuple(p.shape) for n, p in engine.module.named_parameters(remove_duplicate=False)}
    torch.distributed.all_gather_object(shapes, mine)
    kept: dict[tuple[Any, ...], torch.Tensor] = {}
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            stored = tied.get(name, name)
            whole = weights.shape(stored)
            start = place(engine.module, name, whole, [every[name] for every in shapes], rank)
            box = (stored, *start, *parameter.shape)
            if box in kept:  # a tied head has the embedding's box
                parameter.data = kept[box]
                continue
            parameter.copy_(weights.read(stored, start, list(parameter.shape)))
            kept[box] = parameter.data
    return engine.module


def place(
    model: Any, name: str, whole: tuple[int, ...], every: list[tuple[int, ...]], rank: int
) -> list[int]:
    """Return where the box of a rank begins in a parameter, from the shapes that all ranks have of it."""
    layer = model.get_submodule(name.rpartition(".")[0])
    if every[rank] == tuple(whole):
        return [0] * len(whole)
    if type(layer).__name__ not in _RANGES and not isinstance(layer, torch.nn.Embedding):
        raise SystemExit(
            f"AutoTP cuts {name} as {type(layer).__name__}, which is not a range of rows or columns"
        )
    start = []
    for axis, size in enumerate(whole):
        if every[rank][axis] == size:
            start.append(0)
            continue
        if sum(each[axis] for each in every) != size:
            raise SystemExit(f"AutoTP cuts {name} {tuple(whole)} into {every}")
        start.append(sum(each[axis] for each in every[:rank]))
    return start


def main() -> None:
    """Load the folder, then continue a prompt or write logits of tokens."""
    parser = argparse.ArgumentParser(description="Serve a folder with DeepSpeed's AutoTP.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", help="Text to continue greedily.")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=Path, help="A .npy file with token ids, (batch, length).")
    parser.add_argument("--output", type=Path, help="Folder for logits.npy, and the memory of each rank.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--local_rank", type=int, default=0, help="Given by the launcher of DeepSpeed.")
    arguments = parser.parse_args()
    import deepspeed
    import deepspeed.comm as dist
    from deepspeed.accelerator import get_accelerator
    from transformers import AutoTokenizer

    on_cpu = get_accelerator().device_name() == "cpu"
    deepspeed.init_distributed("gloo" if on_cpu else get_accelerator().communication_backend_name())
    folder, rank = arguments.folder.absolute(), dist.get_rank()
    empty, quantization = build_empty(folder, getattr(torch, arguments.dtype))
    before = peak()  # with all code of the model, and nothing of its weights
    model = load(folder, empty, quantization)
    device = get_accelerator().current_device_name()
    held = {each.data_ptr(): each.nbytes for each in model.parameters()}
    with torch.no_grad():
        if arguments.tokens is not None:
            import numpy as np

            tokens = torch.from_numpy(np.load(arguments.tokens)).to(device)
            logits = model(input_ids=tokens, use_cache=False).logits.float().cpu()
            if rank == 0:
                np.save(arguments.output / "logits.npy", logits.numpy())
            facts = {"weight_bytes": sum(held.values()), "growth_bytes": peak() - before}
            (arguments.output / f"rank-{rank}.json").write_text(json.dumps(facts))
        if arguments.prompt is not None:
            tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
            tokens = tokenizer(arguments.prompt, return_tensors="pt").to(device)
            made = model.generate(**tokens, max_new_tokens=arguments.max_new_tokens, do_sample=False)
            if rank == 0:
                print(tokenizer.decode(made[0], skip_special_tokens=True), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def peak() -> int:
    """Return the most memory that this process has held, in bytes."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "LOCAL_WORLD_SIZE" in os.environ:  # DeepSpeed's sums in shared memory crash without it under torchrun
        os.environ.setdefault("LOCAL_SIZE", os.environ["LOCAL_WORLD_SIZE"])
    main()
