"""`llmc run`: text out of an artifact."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from llmc.artifact.integrity import require_intact
from llmc.artifact.manifest import Manifest
from llmc.artifact.store import open_artifact
from llmc.artifact.text import TextCodec
from llmc.backends.special_tokens import read_stop_tokens
from llmc.config import Dtype
from llmc.errors import LlmcError, UnsupportedError
from llmc.pipeline.steps.engines import require_engine
from llmc.pipeline.steps.kernels import require_kernels
from llmc.progress import Progress
from llmc.records import Record
from llmc.runtime.greedy import stream_text

#: Operators whose sums depend on how many tokens they are given.
_PRODUCTS = {"Attention", "Gemm", "GroupQueryAttention", "MatMul", "MatMulNBits", "MoE", "QMoE"}
#: accuracy_level of MatMulNBits for activations rounded to 8 bits.
_INT8 = 4


class SameText(StrEnum):
    """What the text with drafts being that without them rests on.

    EXACT: a token's numbers are the same bits in a step of several tokens.
    TIES: they differ by the order of summation in float32; two tokens so near to each other are a tie.
    ROUNDED: they differ by the rounding of activations or floats to few bits, which turns near ties.
    """

    EXACT = "exact"
    TIES = "up to ties"
    ROUNDED = "up to rounding"


class LookupFigures(Record):
    """How prompt lookup went.

    Args:
        draft: Tokens drafted in a step at most.
        drafted: Tokens drafted in all.
        accepted: Those that the model chose too.
        same_text: What the text being that without lookup rests on.
    """

    draft: int
    drafted: int
    accepted: int
    same_text: SameText


class RunResult(Record):
    """A generated text.

    Args:
        tokens: New tokens, without the one that ends the text.
        steps: Runs of the model that chose them.
        tokens_per_step: Their ratio; 0 where the text is empty.
        lookup: None without prompt lookup.
    """

    text: str
    tokens: int
    steps: int
    tokens_per_step: float
    lookup: LookupFigures | None = None

    def render(self) -> str:
        """The text."""
        return self.text

    def failure(self) -> LlmcError | None:
        """A text is no failure."""
        return None


def run(
    path: Path,
    prompt: str,
    max_tokens: int,
    emit: Callable[[str], None],
    progress: Progress,
    lookup: int | None = None,
) -> RunResult:
    """Generate text greedily, as it comes: through onnxruntime-genai, or by the artifact's engine.

    Args:
        path: An artifact.
        prompt: The user's message; put into the chat template where the artifact has one.
        max_tokens: New tokens at most.
        emit: Takes each piece of text.
        lookup: Tokens to draft in a step by prompt lookup; None for none.

    Raises:
        ConfigError: No artifact there, or a damaged one; or so many tokens cannot be drafted.
        UnsupportedError: The artifact cannot verify drafts.
        ResourceError: The runtime, the GPU or the CPU that it needs is missing.
        ParityError: The engine fails, or is not what the manifest says.
    """
    artifact = open_artifact(path)
    manifest = artifact.manifest
    require_intact(artifact)
    require_kernels(artifact)
    pieces: list[str] = []

    def take(piece: str) -> None:
        pieces.append(piece)
        emit(piece)

    if manifest.engines:
        if lookup is not None:
            raise UnsupportedError(
                f"{path} is a TensorRT engine: its logits of the last token alone verify no draft",
                hint="run it without --lookup",
            )
        tokens = _run_engine(path, manifest, prompt, max_tokens, take, progress)
        return _result(pieces, tokens, tokens, None)

    from llmc.backends.onnxruntime.generate import generate_text
    from llmc.backends.onnxruntime.lookup import require_draft

    if lookup is not None:
        require_draft(lookup, compiled=manifest.kernels is not None)
    made = generate_text(path, prompt, max_tokens, take, manifest.text, lookup)
    if lookup is None:
        return _result(pieces, made.tokens, made.steps, None)
    figures = LookupFigures(
        draft=lookup, drafted=made.drafted, accepted=made.accepted, same_text=same_text(manifest)
    )
    result = _result(pieces, made.tokens, made.steps, figures)
    progress.note(
        f"{made.tokens} tokens in {made.steps} steps, {result.tokens_per_step:.2f} a step; "
        f"{made.accepted} of {made.drafted} drafted tokens accepted"
    )
    if figures.same_text is SameText.ROUNDED:
        progress.note(
            "a step of several tokens rounds otherwise than a step of one here: the text may turn from that "
            "without --lookup where two tokens are nearly as likely"
        )
    return result


def same_text(manifest: Manifest) -> SameText:
    """What the text with drafts being that without them rests on, for an artifact of ONNX Runtime."""
    kernels, quantize = manifest.kernels, manifest.target.quantize
    if kernels is not None and not any(left.operator in _PRODUCTS for left in kernels.outside):
        return SameText.EXACT
    rounded = quantize is not None and quantize.accuracy_level == _INT8
    return SameText.ROUNDED if rounded or manifest.target.dtype is not Dtype.FLOAT32 else SameText.TIES


def _run_engine(
    path: Path,
    manifest: Manifest,
    prompt: str,
    max_tokens: int,
    emit: Callable[[str], None],
    progress: Progress,
) -> int:
    """New tokens that the artifact's engine made."""
    from llmc.backends.tensorrt.session import EngineSession

    session = EngineSession(path, require_engine(manifest), manifest.interface)
    stop = read_stop_tokens(path)
    tokens = stream_text(session, TextCodec(path, manifest.text), prompt, max_tokens, stop, emit)
    for note in session.notes:
        progress.note(note)
    return tokens


def _result(pieces: list[str], tokens: int, steps: int, lookup: LookupFigures | None) -> RunResult:
    ratio = round(tokens / steps, 3) if steps else 0.0
    return RunResult(text="".join(pieces), tokens=tokens, steps=steps, tokens_per_step=ratio, lookup=lookup)
