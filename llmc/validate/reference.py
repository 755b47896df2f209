"""Run the original PyTorch model as the reference: logits, greedy tokens, and timed steps."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from llmc.architecture import values_by_layer
from llmc.arrays import Array
from llmc.errors import ParityError, ResourceError, UnsupportedError
from llmc.graph.switches import crosses, rope_switches
from llmc.runtime.failures import MEMORY_HINT, is_out_of_memory
from llmc.validate.attention import attention_by_rows
from llmc.validate.questions import Question

#: Called with how much is done and the total, in a unit of the caller's choice.
Advance = Callable[[int, int], None]


def quietly(done: int, total: int) -> None:
    """Report progress to nobody."""


class Reference(Protocol):
    """The model that the artifact's numbers are compared with."""

    @property
    def window(self) -> int | None:
        """The config's sliding window in positions; None if it has none."""
        ...

    def logits(self, input_ids: Array, *, keep: int, pieces: Sequence[int] = ()) -> Array:
        """Return logits of the last `keep` positions of input_ids (sequence,): (keep, vocabulary) float32.

        Args:
            pieces: Tokens of the first steps over one KV cache, the rest being given one by one; empty for a
                single step. If the model has no switch within, the steps make no difference.
        """
        ...

    def logits_at(self, input_ids: Array, positions: Array, *, pieces: Sequence[int] = ()) -> Array:
        """Return logits after the tokens at `positions` (n,), ascending: (n, vocabulary) float32.

        Args:
            input_ids: (sequence,) or (rows, sequence) int64; rows give (rows, n, vocabulary).
            pieces: Tokens of each step over one KV cache; empty for a single step.
        """
        ...

    def ask(self, question: Question) -> bytes:
        """Return what `question` stores of the original's logits."""
        ...

    def prepare(self, questions: Sequence[Question], advance: Advance = quietly) -> None:
        """Compute the answers before they are requested.

        Args:
            advance: Called with the number of questions answered and their total.
        """
        ...

    def greedy(self, input_ids: Array, steps: int) -> Array:
        """Return the `steps` most likely next tokens after input_ids (sequence,), ignoring end tokens."""
        ...


def sliding_window(config: Any) -> int | None:
    """Return a config's sliding window in positions, the largest if layers differ; None if it has none."""
    windows = values_by_layer(config, "sliding_window")
    return max((w for w in windows if isinstance(w, int) and w > 0), default=None)


class TorchModel:
    """The transformers causal LM in evaluation mode, on the CPU, or on the GPU to be timed there.

    Args:
        model: A model of `transformers.AutoModelForCausalLM`, float32 unless it is on a GPU.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._cache: Any = None
        self._fills_cache = False
        self._switches = rope_switches(model.config)
        self._keeps_last = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def window(self) -> int | None:
        """The config's sliding window in positions; None if it has none."""
        return sliding_window(self.model.config)

    @property
    def on_gpu(self) -> bool:
        """Return whether the model is on a GPU."""
        return bool(next(self.model.parameters()).is_cuda)

    @property
    def description(self) -> str:
        """The torch version, element type, attention implementation, and the GPU's name if it runs on one."""
        import torch

        parameter = next(self.model.parameters())
        dtype = str(parameter.dtype).removeprefix("torch.")
        attention = self.model.config._attn_implementation
        runtime = f"torch {torch.__version__} {dtype} {attention}, dynamic cache"
        if self.on_gpu:
            return f"{runtime}, {torch.cuda.get_device_name(parameter.device)}"
        return runtime

    def logits(self, input_ids: Array, *, keep: int, pieces: Sequence[int] = ()) -> Array:
        """Return logits of a whole sequence, in one forward pass without a cache or in steps over a switch.

        Args:
            input_ids: (sequence,) int64.
            keep: Number of last positions to return.
            pieces: The steps over one KV cache, as for `Reference.logits`.

        Returns:
            (keep, vocabulary) float32.

        Raises:
            ParityError: The original itself returns NaN or infinity, so nothing can be compared with it.
        """
        total = len(input_ids)
        if crosses(pieces, total, self._switches):
            steps = (*pieces, *[1] * (total - sum(pieces)))
        else:
            steps = (total,)
        values = self._logits(input_ids, steps, keep)
        if not np.isfinite(values).all():
            raise ParityError(f"the original's own logits are not finite for {len(input_ids)} tokens")
        return values

    def logits_at(self, input_ids: Array, positions: Array, *, pieces: Sequence[int] = ()) -> Array:
        """Return logits after the tokens at `positions`, in one pass or in one step for each of `pieces`.

        Raises:
            ParityError: The original itself returns NaN or infinity, so nothing can be compared with it.
        """
        import torch

        rows = np.atleast_2d(input_ids)
        ends = np.cumsum(pieces or (rows.shape[1],)).tolist()
        start, cache, parts = 0, None, []
        for end in ends:
            ids = torch.from_numpy(rows[:, start:end].copy())
            at = torch.from_numpy(positions[(positions >= start) & (positions < end)] - start)
            selection = {"logits_to_keep": at if len(at) else 1} if self._keeps_last else {}
            with (
                torch.inference_mode(),
                reporting_failures(end),
                attention_by_rows(self.model, end - start, end),
            ):
                out, cache = self.run(ids, cache, use_cache=len(ends) > 1, **selection)
                start = end
            if len(at):
                logits = out.logits if self._keeps_last else out.logits[:, at]
                parts.append(logits.float().numpy())
        values = np.concatenate(parts, axis=1)
        if not np.isfinite(values).all():
            raise ParityError(f"the original's own logits are not finite for {rows.shape[1]} tokens")
        return values if input_ids.ndim > 1 else values[0]

    def _logits(self, input_ids: Array, steps: Sequence[int], keep: int) -> Array:
        import torch

        first, start, cache = len(input_ids) - keep, 0, None
        parts: list[Array] = []
        for step in steps:
            ids, end = torch.from_numpy(input_ids[None, start : start + step].copy()), start + step
            requested = end - max(start, first)
            with torch.inference_mode(), reporting_failures(end), attention_by_rows(self.model, step, end):
                out, cache = self.run(ids, cache, use_cache=len(steps) > 1, **self._keep(max(1, requested)))
                start = end
            if requested > 0:
                parts.append(out.logits[0, -requested:].float().numpy())
        return np.concatenate(parts)

    def ask(self, question: Question) -> bytes:
        """Return what `question` stores of the logits, from steps as for `logits`."""
        return question.reduce(self.logits(question.input_ids, keep=question.keep, pieces=question.pieces))

    def prepare(self, questions: Sequence[Question], advance: Advance = quietly) -> None:
        """Do nothing: answers are computed when they are requested."""

    def greedy(self, input_ids: Array, steps: int) -> Array:
        """Return the `steps` most likely next tokens after input_ids (sequence,), ignoring end tokens."""
        tokens = [self.prefill(input_ids)]
        while len(tokens) < steps:
            tokens.append(self.decode(tokens[-1]))
        return np.array(tokens, np.int64)

    def generate(self, input_ids: Array, new_tokens: int, stop: Sequence[int]) -> Array:
        """Return greedy text of PyTorch's own `generate` up to an end token, which is left out.

        Penalties and sampling of the generation config are off.
        """
        import torch
        from transformers import GenerationConfig

        config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            min_length=0,
            max_new_tokens=new_tokens,
            eos_token_id=list(stop) or None,
            pad_token_id=stop[0] if stop else 0,
        )
        prompt = torch.from_numpy(input_ids[None].copy())
        with torch.inference_mode():
            out = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=config
            )
        new: Array = out[0, len(input_ids) :].numpy()
        return new[:-1] if len(new) and new[-1] in stop else new

    def set_parameters(self, values: Mapping[str, Array]) -> None:
        """Replace parameters in place by name; a tied parameter changes wherever it is used.

        Raises:
            ParityError: The model has no such parameter.
        """
        import torch

        parameters = self.model.state_dict()
        with torch.no_grad():
            for name, value in values.items():
                if name not in parameters:
                    raise ParityError(f"the original has no parameter {name}")
                parameters[name].copy_(torch.from_numpy(value))

    def prefill(self, input_ids: Array) -> int:
        """Run a prompt (sequence,) from an empty cache, as `generate` does; return the best next token."""
        return int(self.prefill_rows(input_ids[None])[0])

    def decode(self, token: int) -> int:
        """Run one more token over the cache; return the most likely next token."""
        return int(self.decode_rows(np.array([token], np.int64))[0])

    def prefill_rows(self, input_ids: Array) -> Array:
        """Run prompts (batch, sequence) of equal length from an empty cache; return next tokens (batch,)."""
        self._cache = None
        return self._step(input_ids)

    def decode_rows(self, tokens: Array) -> Array:
        """Run one more token of every row, (batch,), over the cache; return next tokens (batch,)."""
        return self._step(tokens[:, None])

    def state(self) -> Any:
        """Return a copy of the cache, to `restore` later."""
        return copy.deepcopy(self._cache)

    def restore(self, state: Any) -> None:
        """Continue from a copy of `state`."""
        self._cache = copy.deepcopy(state)

    def _step(self, input_ids: Array) -> Array:
        import torch

        ids = torch.from_numpy(input_ids.copy())
        with torch.inference_mode(), reporting_failures(input_ids.shape[1]):
            ids = ids.cuda() if self.on_gpu else ids
            out, self._cache = self.run(ids, self._cache, use_cache=True, **self._keep(1))
            tokens: Array = out.logits[:, -1].argmax(dim=-1).cpu().numpy()  # also waits for the GPU
        return tokens

    def run(self, ids: Any, cache: Any, *, use_cache: bool, **given: Any) -> tuple[Any, Any]:
        """Run a step from a cache, None for an empty one; return its output, and the cache after it.

        A model that does not return its cache gets one to fill, as `generate` gives it.
        """
        from transformers import DynamicCache

        if use_cache and cache is None and self._fills_cache:
            cache = DynamicCache(config=self.model.config)
        over = {} if cache is None else {"cache": cache}
        out = self.model(input_ids=ids, use_cache=use_cache, **over, **given)
        if not use_cache:
            return out, None
        returned = getattr(out, "cache", None)
        if returned is None and cache is None:
            self._fills_cache = True
            return self.run(ids, None, use_cache=True, **given)
        return out, cache if returned is None else returned

    def _keep(self, positions: int) -> dict[str, int]:
        return {"logits_to_keep": positions} if self._keeps_last else {}


@contextmanager
def reporting_failures(tokens: int) -> Iterator[None]:
    """Convert errors of the original to an UnsupportedError, or to a ResourceError where memory ran out."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        if is_out_of_memory(error):
            raise ResourceError(
                f"PyTorch ran out of memory at a step of {tokens} tokens of the original: {reason}",
                hint=MEMORY_HINT,
            ) from error
        raise UnsupportedError(
            f"the original fails in PyTorch at a step of {tokens} tokens: {type(error).__name__}: {reason}",
            hint="nothing can be compared with it; --no-verify builds without the comparison",
        ) from error
