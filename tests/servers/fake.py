"""An environment whose Python is a script that starts the tests' own server."""

import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("stand_in.py")


def make_environment(folder: Path, how: str, version: str = "9.1") -> Path:
    """Make an environment that states a version, and whose server behaves as `how` says."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/sh\n"
        f'case "$2" in -c) echo "{version}"; exit 0;; esac\n'
        f'exec "{sys.executable}" -P "{PROGRAM}" {how}\n'
    )
    python.chmod(0o755)
    return folder
