"""What `llmc build --resume` says before it builds anything."""

from io import StringIO
from pathlib import Path

import pytest

from llmc.errors import ConfigError
from llmc.pipeline import resume
from llmc.progress import PlainProgress


def test_reading_the_artifact_is_a_stage(tmp_path: Path) -> None:
    told = StringIO()
    with pytest.raises(ConfigError):
        resume(tmp_path / "absent", PlainProgress(told))
    assert told.getvalue().startswith("artifact  stopped after ")
