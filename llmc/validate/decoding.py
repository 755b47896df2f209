"""Every token id back into text, by an artifact's tokenizers and the original's; and text as it streams.

Ids are decoded in runs, each behind the same ordinary token, since decoders treat the beginning of a text in
their own ways. What several tokens make of the bytes of broken characters, and of a zero character, runtimes
tell differently; the ids of such tokens are compared between readers of the library `tokenizers` alone.
"""

from collections.abc import Iterator, Sequence

from llmc.validate.sides import Side

#: Ids that are decoded at a time.
RUN = 64
#: Differences that are told.
_TOLD = 2
_BROKEN = ("\ufffd", "\0")


def compare_ids(original: Side, sides: Sequence[Side], ids: Sequence[int]) -> list[str]:
    """Runs of ids whose text differs from the original's, a sentence for each of the first of each side.

    Args:
        ids: All that there are, ascending.

    Raises:
        ParityError: A side cannot decode an id.
    """
    anchor = original.encode_rendered("a")[:1]
    found: list[str] = []
    for side in sides:
        told = list(_differing_runs(original, side, anchor, ids))
        found += told[:_TOLD]
        if len(told) > _TOLD:
            found.append(f"{side.name} decodes {len(told) - _TOLD} more runs of ids otherwise")
    return found


def compare_streams(sides: Sequence[Side], tokens: Sequence[Sequence[int]]) -> list[str]:
    """Texts that come out otherwise token by token than at once, a sentence for the first of each side.

    Spaces at the beginning do not count: a stream cannot know whether a word follows that wants one.

    Args:
        tokens: Ids of texts.
    """
    found = []
    for side in sides:
        if side.stream is None:
            continue
        for ids in tokens:
            whole, pieces = side.decode(ids), side.stream(ids)
            if whole.lstrip(" ") != pieces.lstrip(" "):
                found.append(f"{side.name} streams {quoted(pieces)} where the text is {quoted(whole)}")
                break
    return found


def _differing_runs(original: Side, side: Side, anchor: Sequence[int], ids: Sequence[int]) -> Iterator[str]:
    for start in range(0, len(ids), RUN):
        run = ids[start : start + RUN]
        if _tail(original, anchor, run) == _tail(side, anchor, run):
            continue
        if not side.same_library:
            run = [i for i in run if _is_whole(original, anchor, i)]
            if _tail(original, anchor, run) == _tail(side, anchor, run):
                continue
        yield _describe(original, side, anchor, run)


def _describe(original: Side, side: Side, anchor: Sequence[int], run: Sequence[int]) -> str:
    """The first id of a run that alone makes a difference, else the run."""
    for each in run:
        wanted, actual = (_tail(s, anchor, [each]) for s in (original, side))
        if wanted != actual:
            return f"{side.name} decodes id {each} as {quoted(actual)}, the original as {quoted(wanted)}"
    return f"{side.name} decodes ids {run[0]} to {run[-1]} otherwise than the original"


def _tail(side: Side, anchor: Sequence[int], ids: Sequence[int]) -> str:
    return side.decode([*anchor, *ids]).removeprefix(side.decode(anchor))


def _is_whole(original: Side, anchor: Sequence[int], token: int) -> bool:
    """Whether a token is text by itself: no special one, and no part of a character."""
    text = _tail(original, anchor, [token])
    return bool(text) and not any(mark in text for mark in _BROKEN)


def quoted(text: str) -> str:
    """A text in quotation marks, its beginning if it is long."""
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
