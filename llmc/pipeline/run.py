"""`llmc run`: text out of an artifact."""

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
    require_intact(artifact)
    backend = backend_of(artifact.manifest.target)
    backend.require_host(artifact)
    pieces: list[str] = []

    def take(piece: str) -> None:
        pieces.append(piece)
        emit(piece)

    made = backend.generate(artifact, prompt, max_tokens, take, lookup, progress)
    if lookup is None or made.same_text is None:
        return _result(pieces, made.tokens, made.steps, None)
    figures = LookupFigures(
        draft=lookup, drafted=made.drafted, accepted=made.accepted, same_text=made.same_text
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


def _result(pieces: list[str], tokens: int, steps: int, lookup: LookupFigures | None) -> RunResult:
    ratio = round(tokens / steps, 3) if steps else 0.0
    return RunResult(text="".join(pieces), tokens=tokens, steps=steps, tokens_per_step=ratio, lookup=lookup)
