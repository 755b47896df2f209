"""What tests of refused checkpoints share."""

import json
from pathlib import Path

import pytest

from llmc.checkpoint import open_checkpoint
from llmc.errors import CheckpointError, ExitCode, LlmcError, UnsupportedError


def refused(ref: Path | str, message: str, kind: type[LlmcError] = CheckpointError) -> LlmcError:
    with pytest.raises(LlmcError, match=message) as caught:
        open_checkpoint(str(ref))
    assert type(caught.value) is kind
    expected = ExitCode.UNSUPPORTED if kind is UnsupportedError else ExitCode.USAGE
    assert caught.value.exit_code == expected
    return caught.value


def edit_config(folder: Path, **fields: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config.update(fields)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
