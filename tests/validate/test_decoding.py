"""Every id is decoded, streams are held to whole texts, and templates are tried with tools."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmc.validate.decoding import compare_ids, compare_streams
from llmc.validate.sides import Side, original_side
from llmc.validate.tokens import compare_tools
from tests.models import save_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def _ids(tokenizer: Any) -> list[int]:
    return sorted(tokenizer.get_vocab().values())


def _with_decoder(tokenizer: Any, old: str, new: str, **changes: Any) -> Side:
    """A side that writes `new` for `old`."""
    side = original_side(tokenizer, "another")

    def decode(ids: Sequence[int]) -> str:
        return side.decode(ids).replace(old, new)

    return replace(side, decode=decode, **changes)


def test_equal_decoders_agree_on_every_id(tokenizer: Any) -> None:
    original = original_side(tokenizer)
    assert compare_ids(original, [original, _with_decoder(tokenizer, "x", "x")], _ids(tokenizer)) == []


def test_one_rare_character_is_seen(tokenizer: Any) -> None:
    original, ids = original_side(tokenizer), _ids(tokenizer)
    number = tokenizer.convert_tokens_to_ids("~")
    for same_library in (True, False):
        side = _with_decoder(tokenizer, "~", "^", same_library=same_library)
        assert compare_ids(original, [side], ids) == [
            f"another decodes id {number} as '^', the original as '~'"
        ]


def test_many_differing_runs_are_counted(tokenizer: Any) -> None:
    original, ids = original_side(tokenizer), _ids(tokenizer) * 4
    found = compare_ids(original, [_with_decoder(tokenizer, "e", "")], ids)
    assert "more runs of ids differently" in found[-1]


def test_runtimes_tell_broken_characters_in_their_own_ways(tokenizer: Any) -> None:
    ids = _ids(tokenizer)
    broken = replace(original_side(tokenizer), decode=lambda ids: "a" + "\ufffd" * (len(ids) - 1))
    other = replace(broken, decode=lambda ids: "a" + "\ufffd" * (len(ids) > 1), same_library=False)
    assert compare_ids(broken, [other], ids) == []
    assert compare_ids(broken, [replace(other, same_library=True)], ids)


def test_a_stream_gives_the_whole_text(tokenizer: Any) -> None:
    ids = tokenizer("a model and writes")["input_ids"]
    side = original_side(tokenizer, "x")
    good = replace(side, stream=lambda ids: f" {side.decode(ids)}")
    lossy = replace(side, stream=lambda ids: side.decode(ids[:-1]))
    assert compare_streams([side, good], [ids]) == []
    (told,) = compare_streams([lossy], [ids])
    assert told.startswith("x streams ")


def test_a_template_that_drops_tool_messages_is_seen(tokenizer: Any, tmp_path: Path) -> None:
    count, different = compare_tools(tokenizer, tokenizer)
    assert count > 0
    assert different == []
    own = AutoTokenizer.from_pretrained(save_tiny_tokenizer(tmp_path))
    keep = "{% set messages = messages | rejectattr('role', 'equalto', 'tool') | list %}"
    own.chat_template = keep + own.chat_template
    assert compare_tools(tokenizer, own)[1]
