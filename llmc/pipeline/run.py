"""Implement `llmc run`: generate text with an artifact."""

from collections.abc import Callable
from pathlib import Path

from llmc.artifact.store.folder import open_artifact
from llmc.artifact.store.integrity import require_intact
from llmc.backends import backend_of
from llmc.backends.base import SameText
from llmc.errors import LlmcError
from llmc.progress import Progress
from llmc.records import Record


class LookupFigures(Record):
    """The outcome of prompt lookup.

    Args:
        draft: Largest number of tokens drafted in a step.
        drafted: Number of drafted tokens in total.
        accepted: Number of drafted tokens that the model chose too.
        same_text: Why the text is the same as without lookup.
    """

    draft: int
    drafted: int
    accepted: int
    same_text: SameText


class RunResult(Record):
    """A generated text.

    Args:
        tokens: Number of new tokens, without the one that ends the text.
        steps: Number of model runs that chose them.
        tokens_per_step: Tokens divided by steps; 0 if the text is empty.
        lookup: Outcome of prompt lookup; None without it.
    """

    text: str
    tokens: int
    steps: int
    tokens_per_step: float
    lookup: LookupFigures | None = None

    def render(self) -> str:
        """Return the text."""
        return self.text

    def failure(self) -> LlmcError | None:
        """Return None: generating a text is not a failure."""
        return None


def run(
    path: Path,
    prompt: str,
    max_tokens: int,
    emit: Callable[[str], None],
    progress: Progress,
    lookup: int | None = None,
) -> RunResult:
    """Generate text greedily and emit it piece by piece, with onnxruntime-genai or the artifact's engine.

    Args:
        path: An artifact.
        prompt: The user's message; put into the chat template if the artifact has one.
        max_tokens: Largest number of new tokens.
        emit: Receives each piece of text.
        lookup: Number of tokens to draft in a step by prompt lookup; None for no lookup.

    Raises:
        ConfigError: There is no artifact, it is damaged, or so many tokens cannot be drafted.
        UnsupportedError: The artifact cannot verify drafts.
        ResourceError: The runtime, the GPU or the CPU that it needs is missing.
        ParityError: The engine fails, or differs from the manifest.
    """
    artifact = open_artifact(path)
    require_intact(artifact)
    backend = backend_of(artifact.manifest.target)
    backend.require_host(artifact)
    pieces: list[str] = []

    def take(piece: str) -> None:
        pieces.append(piece)
        emit(piece)

    generated = backend.generate(artifact, prompt, max_tokens, take, lookup, progress)
    if lookup is None or generated.same_text is None:
        return _result(pieces, generated.tokens, generated.steps, None)
    figures = LookupFigures(
        draft=lookup, drafted=generated.drafted, accepted=generated.accepted, same_text=generated.same_text
    )
    result = _result(pieces, generated.tokens, generated.steps, figures)
    progress.note(
        f"{generated.tokens} tokens in {generated.steps} steps, {result.tokens_per_step:.2f} per step; "
        f"{generated.accepted} of {generated.drafted} drafted tokens accepted"
    )
    if figures.same_text is SameText.ROUNDED:
        progress.note(
            "a step of several tokens rounds differently from a step of one here: the text may diverge from "
            "the text without --lookup where two tokens are almost equally likely"
        )
    return result


def _result(pieces: list[str], tokens: int, steps: int, lookup: LookupFigures | None) -> RunResult:
    ratio = round(tokens / steps, 3) if steps else 0.0
    return RunResult(text="".join(pieces), tokens=tokens, steps=steps, tokens_per_step=ratio, lookup=lookup)
