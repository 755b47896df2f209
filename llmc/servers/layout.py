"""Lay out the tensors of a folder over ranks as a server's own code loads them."""

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from llmc.artifact.ranks import RankLayout
from llmc.children import run_apart
from llmc.errors import ResourceError, UnsupportedError
from llmc.servers.environment import clean_variables, find_server
from llmc.strict_json import parse_json

_SECONDS = 1200
#: The exit code with which the program says that the server computes a weight when it loads it.
_NOT_COPIED = 3


def ask_vllm(
    folder: Path, ranks: int, environment: Path | None = None, seconds: float = _SECONDS
) -> RankLayout:
    """Ask an installed vLLM which box of which tensor each rank of tensor parallelism loads.

    Nothing but headers and small tensors of the folder is read. The layout belongs to this version of vLLM.

    Args:
        folder: A Hugging Face folder that vLLM serves.
        environment: Folder of vLLM's environment; None for the one that `llmc.servers.environment` finds.

    Raises:
        ResourceError: vLLM is not installed, fails, or takes longer than `seconds`.
        UnsupportedError: vLLM computes a parameter of this model instead of copying it.
    """
    python = find_server("vllm", environment).command[0]
    program = Path(__file__).with_name("vllm_layout.py")
    with TemporaryDirectory(prefix="llmc-layout-") as scratch:
        output = Path(scratch) / "layout.json"
        command = [python, "-P", "-B", str(program), str(folder.absolute()), str(ranks), str(output)]
        variables = clean_variables({"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"})
        try:
            result = run_apart(command, Path(scratch), seconds, variables)
        except subprocess.TimeoutExpired as error:
            raise ResourceError(f"vLLM did not lay out {folder} within {seconds:.0f} s") from error
        last = (result.stderr.strip().splitlines() or ["without a message"])[-1].strip()
        if result.returncode == _NOT_COPIED:
            raise UnsupportedError(
                f"vLLM cannot load {folder} from the files of ranks: {last}",
                hint="build it without --shards; vLLM then splits it when it loads it",
            )
        if result.returncode != 0:
            raise ResourceError(f"vLLM cannot lay out {folder} over {ranks} ranks: {last}")
        try:
            return RankLayout.model_validate(parse_json(output.read_bytes()))
        except (OSError, ValueError, ValidationError) as error:
            raise ResourceError(f"vLLM's layout of {folder} cannot be read: {error}") from error
