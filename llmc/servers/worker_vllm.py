"""Answer a request by vLLM on the CPU; `worker.py` runs this in vLLM's environment.

Every tensor of the checkpoint is followed into the model: a loader of vLLM's own kind watches which parts of
which parameters are written while a tensor is loaded. That counts what vLLM reads without asking what it
reports, which for a quantized checkpoint is nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmc.servers.worker import Channel

#: One process, no telemetry, a small KV cache, and no binding of threads, which other load would share.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
_FORMAT = "llmc-counted"
#: Scales of the KV cache, which vLLM has for every layer if the folder states them for one.
_CACHE_SCALES = ("k_scale", "v_scale")


def main(request: dict[str, Any], channel: Channel) -> None:
    """Load the folder, count its tensors, and give logits, tokens and text."""
    os.environ.update(ENVIRONMENT)
    import vllm

    channel.version(vllm.__version__, "CPU")
    count = _counting_loader()
    longest = max([1, *map(len, request["sequences"])])
    longest = max([longest, *(len(ids) + request["new_tokens"] for ids in request["continue"])])
    try:
        model = vllm.LLM(
            request["folder"],
            dtype=request["dtype"],
            load_format=_FORMAT,
            max_model_len=longest + 1,
            max_num_batched_tokens=max(longest + 1, 64),
            max_num_seqs=1,
            enforce_eager=True,
            enable_prefix_caching=False,
            enable_chunked_prefill=False,
            disable_log_stats=True,
            seed=0,
        )
    except Exception:
        if not request["gpu_only"] or not count.finished:
            raise
        channel.loaded(count.taken, count.skipped, count.unfilled, "")
        nothing = dict.fromkeys(("token_ids", "logits", "log_probabilities", "greedy", "products", "graph"))
        channel.send("answer", **nothing)
        return
    dtype = str(model.llm_engine.model_config.dtype).removeprefix("torch.")
    channel.loaded(count.taken, count.skipped, count.unfilled, dtype)
    tokenizer = model.get_tokenizer()
    token_ids = [tokenizer.encode(text) for text in request["prompts"]]
    total = len(request["sequences"]) + len(request["continue"])
    logits, log_probabilities, greedy = [], [], []
    for number, ids in enumerate(request["sequences"]):
        rows, own = _score(model, ids)
        logits.append(channel.save(request["scratch"], f"logits-{number}.npy", rows))
        log_probabilities.append(channel.save(request["scratch"], f"log-probabilities-{number}.npy", own))
        channel.send("progress", done=number + 1, total=total)
    for number, ids in enumerate(request["continue"]):
        greedy.append(_continue(model, ids, request["new_tokens"]))
        channel.send("progress", done=len(logits) + number + 1, total=total)
    channel.send(
        "answer",
        token_ids=token_ids,
        logits=logits,
        log_probabilities=log_probabilities,
        greedy=greedy,
        products=_products(model, model.llm_engine.model_config.dtype, request["scratch"], channel),
        graph=None,
        cache_scales=model.apply_model(_cache_scales)[0],
    )


def _cache_scales(inner: Any) -> dict[str, tuple[float, float]]:
    """Return the scales of keys and values by module of attention; none of modules that cache in float."""
    return {
        name: (float(module._k_scale_float), float(module._v_scale_float))
        for name, module in inner.named_modules()
        if hasattr(module, "_k_scale_float") and str(module.kv_cache_dtype).startswith("fp8")
    }


def _score(model: Any, ids: list[int]) -> tuple[Any, Any]:
    """Return logits (tokens - 1, vocabulary) of a prompt, and its log-probabilities as vLLM gives them."""
    import numpy as np
    from vllm import SamplingParams

    seen: list[Any] = []

    def watch(inner: Any) -> None:
        plain = inner.compute_logits

        def watched(*arguments: Any, **named: Any) -> Any:
            rows = plain(*arguments, **named)
            seen.append(rows.detach().float().cpu().numpy())
            return rows

        inner.compute_logits = watched
        inner.llmc_plain = plain

    def unwatch(inner: Any) -> None:
        inner.compute_logits = inner.llmc_plain

    model.apply_model(watch)
    try:
        parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        (output,) = model.generate({"prompt_token_ids": ids}, parameters, use_tqdm=False)
    finally:
        model.apply_model(unwatch)
    own = [given[token].logprob for given, token in zip(output.prompt_logprobs, ids, strict=True) if given]
    rows = [each for each in seen if len(each) == len(ids) - 1][-1]
    return rows[:, : model.llm_engine.model_config.get_vocab_size()], np.array(own, np.float32)


def _continue(model: Any, ids: list[int], new_tokens: int) -> list[int]:
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=new_tokens, temperature=0, detokenize=False)
    (output,) = model.generate({"prompt_token_ids": ids}, parameters, use_tqdm=False)
    return [int(token) for token in output.outputs[0].token_ids]


def _products(model: Any, dtype: Any, scratch: str, channel: Channel) -> list[dict[str, Any]]:
    """Multiply inputs by every matrix of the model's linear layers, by the kernels that serve them."""
    import torch
    from vllm.model_executor.layers.linear import LinearBase

    def multiply(inner: Any) -> list[dict[str, Any]]:
        packed = getattr(inner, "packed_modules_mapping", {})
        found: list[dict[str, Any]] = []
        for name, layer in inner.named_modules():
            if not isinstance(layer, LinearBase):
                continue
            parent, _, last = name.rpartition(".")
            probe = channel.probe(layer.input_size)
            with torch.inference_mode():
                product = layer.quant_method.apply(layer, torch.from_numpy(probe).to(dtype), None)
            found.append(
                {
                    "modules": [f"{parent}.{part}" for part in packed.get(last, [last])],
                    "inputs": channel.save(scratch, f"inputs-{layer.input_size}.npy", probe),
                    "outputs": channel.save(scratch, f"product-{len(found)}.npy", product.float().numpy()),
                }
            )
        return found

    products: list[dict[str, Any]] = model.apply_model(multiply)[0]
    return products


def _in_order(groups: Any) -> bool:
    """Return whether the groups of inputs (inputs,) ascend from 0, all of one size."""
    import torch

    size = int((groups == 0).sum())
    return size > 0 and torch.equal(groups.cpu(), torch.arange(len(groups), dtype=groups.dtype) // size)


def _unfilled(entries: list[list[Any]], defaults: set[str]) -> list[str]:
    """Return the parameters that were not filled; scales of the KV cache only if the folder states some.

    Args:
        entries: Name, number of elements, and number of elements that were written, of each parameter.
        defaults: Names of those for which vLLM has values of its own.
    """
    kinds = {name: name.rpartition(".")[2] for name, _, _ in entries}
    stated = {kinds[name] for name, _, filled in entries if filled} & {*_CACHE_SCALES}
    missing = [name for name, size, filled in entries if filled < size]
    return [name for name in missing if name not in defaults or kinds[name] in stated]


def _counting_loader() -> Any:
    """Register a loader that watches what is written into parameters, and return what it counts."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """The tensors that were written into a parameter, and how much of each parameter was filled."""

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.skipped: list[str] = []
            self.unfilled: list[str] = []
            self.taken = 0
            self.finished = False
            self._current: str | None = None
            self._took = False
            self._parameters: dict[int, list[Any]] = {}
            self._defaults: set[str] = set()

        def follow(self, model: Any) -> None:
            for name, parameter in model.named_parameters():
                module = model.get_submodule(name.rpartition(".")[0])
                if isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod):
                    self._defaults.add(name)  # a checkpoint states them for a quantized cache only
                self._parameters[parameter.untyped_storage().data_ptr()] = [name, parameter.numel(), 0]

        def tensors(self, given: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
            for name, tensor in given:
                # vLLM drops the order of inputs, which says nothing where they are in their own order.
                self._current, self._took = name, name.endswith(".g_idx") and _in_order(tensor)
                yield name, tensor
                self._close()

        def _close(self) -> None:
            if self._current is not None:
                self.taken += self._took
                self.skipped += [] if self._took else [self._current]
            self._current = None

        def finish(self) -> None:
            self._close()
            self.finished = True
            self.unfilled = _unfilled([*self._parameters.values()], self._defaults)
            self._parameters.clear()

        def __torch_dispatch__(self, call: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            result = call(*arguments, **(named or {}))
            if call._schema.name.endswith("_") and arguments and hasattr(arguments[0], "untyped_storage"):
                target = arguments[0]
                entry = self._parameters.get(target.untyped_storage().data_ptr())
                if entry is not None:
                    entry[2] += target.numel()
                    self._took = True
            return result

    count = Count()

    @register_model_loader(_FORMAT)
    class Counted(DefaultModelLoader):  # type: ignore[misc]
        """vLLM's own loader, watched."""

        def __init__(self, load_config: Any) -> None:
            load_config.load_format = "auto"
            super().__init__(load_config)

        def get_all_weights(self, model_config: Any, model: Any) -> Any:
            return count.tensors(super().get_all_weights(model_config, model))

        def load_weights(self, model: Any, model_config: Any) -> None:
            count.follow(model)
            with count:
                super().load_weights(model, model_config)
            count.finish()

    return count
