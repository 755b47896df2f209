"""Create the checkpoints of benchmarks/models.py on first use, in a separate process.

The operating system would count the size of a process with a model for the processes that it starts.
"""

import subprocess
import sys
from pathlib import Path

NAMES = ("demo", "rescaled", "llama-1b", "gemma3-270m", "tiny", "small")


def checkpoint(name: str, cache: Path) -> Path:
    """Return the folder of one of NAMES below `cache`; create it if it does not exist."""
    folder = cache / name
    if not (folder / "config.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).parents[1] / "models.py"
        subprocess.run([sys.executable, str(script), name, str(folder)], check=True, stdout=sys.stderr)
    return folder
