"""Decode with prompt lookup (Saxena 2023): tokens are drafted from the text so far, and verified together.

onnxruntime-genai drafts and verifies (its n-gram decoding, since 0.18). It needs logits for every token of a
step, but artifacts compute only those of the last token. One value of the graph selects that token: here it
becomes the last few tokens of the step, in memory, with the same weights. A drafted token is accepted if it
is the most likely one, so the text is the same as without drafts, as far as the logits of a step do not
depend on its length.
"""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from llmc.artifact.manifest import Manifest
from llmc.backends.base import SameText
from llmc.backends.compiled.program import SAME_TOKENS
from llmc.config import Dtype
from llmc.errors import ConfigError, UnsupportedError
from llmc.graph.edit import Site, name_constant, set_value
from llmc.graph.interface import CHOSEN_TOKENS, Interface

#: Tokens that must repeat before the next ones are drafted, plus one: ngram_size of the runtime.
NGRAM_SIZE = 4
#: Drafted tokens of a step: onnxruntime-genai's limit of max_draft_tokens.
MOST_DRAFTED = 16
#: Rows of logits: more than the widest verified step, the drafted tokens and the one before them.
_ROWS = 32
#: Length of pieces of longer prompts, since the runtime allocates logits for all their tokens.
_PIECE = 256
#: Prefix of the names of added nodes, and the dimension of tokens that have logits.
_PREFIX = "lookup"
_DIMENSION = "chosen"
#: Operators whose sums depend on the number of tokens.
_PRODUCTS = {
    "Attention",
    "FusedMatMul",
    "Gemm",
    "GroupQueryAttention",
    "MatMul",
    "MatMulNBits",
    "MoE",
    "QMoE",
}
#: accuracy_level of MatMulNBits for activations rounded to 8 bits.
_INT8 = 4


def same_text(manifest: Manifest) -> SameText:
    """Return why the text with drafts equals the text without them, for an artifact of ONNX Runtime."""
    kernels, quantize = manifest.kernels, manifest.target.quantize
    if kernels is not None and not any(left.operator in _PRODUCTS for left in kernels.outside):
        return SameText.EXACT
    rounded = quantize is not None and quantize.accuracy_level == _INT8
    return SameText.ROUNDED if rounded or manifest.target.dtype is not Dtype.FLOAT32 else SameText.TIES


def require_draft(draft: int, *, compiled: bool) -> None:
    """Require a number of drafted tokens that a step can verify.

    Args:
        compiled: Whether the artifact has compiled kernels, whose results are equal to the last bit.

    Raises:
        ConfigError: The number is less than one, or too large.
    """
    most = SAME_TOKENS - 1 if compiled else MOST_DRAFTED
    if draft < 1:
        raise ConfigError(f"{draft} tokens are to be drafted in a step", hint="request 1 or more")
    if draft > most:
        why = (
            f"compiled kernels give a token the same results as alone only beside at most {most} others"
            if compiled
            else f"onnxruntime-genai verifies at most {most}"
        )
        raise ConfigError(f"{draft} tokens are to be drafted in a step; {why}", hint=f"request 1 to {most}")


def require_rewinding(interface: Interface) -> None:
    """Require a cache from which the tokens of a rejected draft can be removed.

    Raises:
        UnsupportedError: The graph keeps states of fixed size.
    """
    if interface.states:
        layers = ", ".join(str(n) for n in sorted({state.layer for state in interface.states}))
        raise UnsupportedError(
            f"tokens cannot be drafted: layers {layers} keep states of fixed size, which cannot go "
            "back to before a rejected token",
            hint="build and run without lookup",
        )


def speculative_options(draft: int) -> dict[str, int | bool]:
    """Return options of onnxruntime-genai, by its names: those of genai_config.json and of a generator.

    A chained lookup continues past the end of the text, so that short repetitions are drafted in full.
    """
    return {"ngram_size": NGRAM_SIZE, "max_draft_tokens": draft, "ngram_chained_lookup": True}


def piece_length(tokens: int) -> int:
    """Return the number of tokens of a prompt to run at once.

    No piece is so short that kernels treat it as a decode step, which sums in another order: the results for
    the prompt would differ from those in one piece.
    """
    if tokens <= SAME_TOKENS:
        return _PIECE
    return next(n for n in range(_PIECE, 2 * _PIECE) if not 0 < tokens % n <= SAME_TOKENS)


def verifying_model(path: Path) -> bytes | None:
    """Return an artifact's graph with logits for the last tokens of a step, and zeros for those before them.

    Args:
        path: model.onnx; the weights stay in the file beside it.

    Returns:
        The graph, serialized; None if it already has logits for every token.

    Raises:
        UnsupportedError: It has logits for the last token, but not by the pass last-token-logits.
    """
    model = ir.load(path)
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    if logits.shape is None or logits.shape[1] != 1:
        return None
    chosen = next((v for node in graph for v in node.outputs if v.name == CHOSEN_TOKENS), None)
    if chosen is None:
        raise UnsupportedError(
            f"{path} computes only the logits of the last token, which cannot verify a draft",
            hint="run it without lookup, or build it with this version of llmc",
        )
    first = next(iter(chosen.uses())).node
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    start, tokens = _last_tokens(graph, first, ids)
    chosen.replace_all_uses_with(tokens)
    _widen(first)
    _pad_logits(graph, logits, start)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def _last_tokens(graph: ir.Graph, before: ir.Node, ids: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Emit the first token of the step that has logits, (1,), and all that have, (1, tokens, 1)."""

    def emit(op: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
        emitted = Site(graph, before).emit(op, inputs, f"{_PREFIX}/{name}", attributes=attributes)
        return emitted.outputs[0]

    none = _constant(graph, "none", [0])
    length = emit("Shape", [ids], "length", start=1, end=2)
    start = emit("Max", [emit("Sub", [length, _constant(graph, "rows", [_ROWS])], "beyond"), none], "start")
    bounds = [emit("Squeeze", [start], "from"), emit("Squeeze", [length], "to")]
    numbers = emit("Range", [*bounds, _constant(graph, "step", 1)], "numbers")
    return start, emit("Unsqueeze", [numbers, _constant(graph, "axes", [0, 2])], "tokens")


def _widen(first: ir.Node) -> None:
    """State that every value computed from the chosen tokens has a row for each of them."""
    waiting, seen = [first], {first}
    while waiting:
        for value in waiting.pop().outputs:
            if value.shape is not None and len(value.shape) == 3 and value.shape[1] == 1:
                value.shape = ir.Shape([value.shape[0], _DIMENSION, value.shape[2]])
            users = set(value.consumers()) - seen
            seen |= users
            waiting += users


def _pad_logits(graph: ir.Graph, logits: ir.Value, start: ir.Value) -> None:
    """Pad logits to every token, as the runtime expects: zeros before those that are computed."""
    some = logits.producer()
    if some is None or logits.shape is None:
        raise UnsupportedError("the logits are not computed by an operator")
    zeros = [_constant(graph, f"none_{place}", [0] * count) for place, count in (("before", 1), ("after", 4))]
    last = list(graph)[-1]
    joined = ir.node("Concat", [zeros[0], start, zeros[1]], {"axis": 0}, name=f"{_PREFIX}/pads")
    joined.outputs[0].name = f"{_PREFIX}/pads"
    padded = ir.node("Pad", [logits, joined.outputs[0]], name=f"{_PREFIX}/logits")
    graph.insert_after(last, [joined, padded])
    logits.name = f"{_PREFIX}/logits"
    shape = [logits.shape[0], "sequence", logits.shape[2]]
    whole = set_value(padded.outputs[0], "logits", shape, logits.dtype)
    graph.outputs[list(graph.outputs).index(logits)] = whole


def _constant(graph: ir.Graph, name: str, numbers: int | list[int]) -> ir.Value:
    return name_constant(graph, f"{_PREFIX}/{name}", np.array(numbers, np.int64))
