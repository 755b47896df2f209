"""Compare how an artifact's tokenizers and the original's decode every token id, and how text streams.

Ids are decoded in runs, each behind the same ordinary token, since decoders treat the beginning of a text
differently. Runtimes render the bytes of broken characters, and a zero character, in different ways; the ids
of such tokens are compared only between readers that use the library `tokenizers`.
"""

from collections.abc import Iterator, Sequence

from llmc.validate.sides import Side

#: Number of ids that are decoded at a time.
RUN = 64
#: Maximum number of differences that are reported one by one.
_REPORTED = 2
_BROKEN = ("\ufffd", "\0")


def compare_ids(original: Side, sides: Sequence[Side], ids: Sequence[int]) -> list[str]:
    """Describe the first runs of ids of each side whose text differs from the original's, a sentence each.

    Args:
        ids: All token ids, ascending.

    Raises:
        ParityError: A side cannot decode an id.
    """
    anchor = original.encode_rendered("a")[:1]
    differences: list[str] = []
    for side in sides:
        runs = list(_differing_runs(original, side, anchor, ids))
        differences += runs[:_REPORTED]
        if len(runs) > _REPORTED:
            differences.append(f"{side.name} decodes {len(runs) - _REPORTED} more runs of ids differently")
    return differences


def compare_streams(sides: Sequence[Side], tokens: Sequence[Sequence[int]]) -> list[str]:
    """Describe the first text of each side that decodes differently token by token than at once.

    Leading spaces are ignored: a stream cannot know whether a word follows that needs one.

    Args:
        tokens: Ids of texts.
    """
    differences = []
    for side in sides:
        if side.stream is None:
            continue
        for ids in tokens:
            whole, pieces = side.decode(ids), side.stream(ids)
            if whole.lstrip(" ") != pieces.lstrip(" "):
                differences.append(f"{side.name} streams {quoted(pieces)} where the text is {quoted(whole)}")
                break
    return differences


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
    """Describe the first id of a run that differs by itself, otherwise the whole run."""
    for each in run:
        expected, actual = (_tail(s, anchor, [each]) for s in (original, side))
        if expected != actual:
            return f"{side.name} decodes id {each} as {quoted(actual)}, the original as {quoted(expected)}"
    return f"{side.name} decodes ids {run[0]} to {run[-1]} differently from the original"


def _tail(side: Side, anchor: Sequence[int], ids: Sequence[int]) -> str:
    return side.decode([*anchor, *ids]).removeprefix(side.decode(anchor))


def _is_whole(original: Side, anchor: Sequence[int], token: int) -> bool:
    """Return whether a token is text by itself: neither a special token nor a part of a character."""
    text = _tail(original, anchor, [token])
    return bool(text) and not any(mark in text for mark in _BROKEN)


def quoted(text: str) -> str:
    """Return a text in quotation marks, cut to its beginning if it is long."""
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
