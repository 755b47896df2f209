"""The tokens of the evaluation text."""

from pathlib import Path

import pytest

from llmc.errors import ConfigError
from llmc.pipeline.steps.original import tokenize
from tests.models import save_tiny_tokenizer


def test_empty_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_tokenizer(tmp_path))
    with pytest.raises(ConfigError, match="the evaluation text is empty"):
        tokenize(tokenizer, "")
