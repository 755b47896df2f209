"""Determine the versions of the tools, and of the code, with which a build ran."""

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

#: Distributions that shape the bytes of an artifact or run it. Alternatives that exclude each
#: other, such as onnxruntime and onnxruntime-gpu, are all listed: the installed ones are recorded.
_DISTRIBUTIONS = (
    "gguf",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-genai",
    "onnxruntime-genai-cuda",
    "onnxruntime-gpu",
    "onnxscript",
    "safetensors",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch",
    "transformers",
)

#: Endings of files that are source.
_SOURCES = (".py", ".h", ".cpp")


def tool_versions() -> dict[str, str]:
    """Return the version of Python and of every installed distribution that matters, by name; import none.

    The machine's architecture is included as `machine`, since the last digits of sums depend on it.
    """
    versions = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


@cache
def code_digest(*packages: str) -> str:
    """Return the SHA-256 digest of the source of these packages and modules, in hexadecimal.

    The source includes packages within a package, and C++.
    """
    digest = hashlib.sha256()
    for package in packages:
        spec = find_spec(package)
        for folder in map(Path, (spec.submodule_search_locations or ()) if spec else ()):
            for file in sorted(file for ending in _SOURCES for file in folder.rglob(f"*{ending}")):
                digest.update(file.relative_to(folder).as_posix().encode())
                digest.update(file.read_bytes())
        if spec and spec.origin and not spec.submodule_search_locations:
            digest.update(Path(spec.origin).name.encode())
            digest.update(Path(spec.origin).read_bytes())
    return digest.hexdigest()
