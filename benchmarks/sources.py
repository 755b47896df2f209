"""The checkpoints of models.py, made on first use in a process of their own.

A process that holds a model would pass its own size on to those it starts, in the system's account of them.
"""

import subprocess
import sys
from pathlib import Path

NAMES = ("demo", "rescaled", "llama-1b", "gemma3-270m", "tiny")


def checkpoint(name: str, cache: Path) -> Path:
    """The folder of one of NAMES below `cache`, made if it is not there."""
    folder = cache / name
    if not (folder / "config.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).with_name("models.py")
        subprocess.run([sys.executable, str(script), name, str(folder)], check=True, stdout=sys.stderr)
    return folder
