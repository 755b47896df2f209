"""Refuse files that only stand for other files: Git LFS pointers, and dangling links."""

from pathlib import Path

from llmc.errors import CheckpointError

#: First words of a pointer (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md).
_POINTER = b"version https://git-lfs"


def refuse_pointer(file: Path) -> None:
    """Check that a file is not the pointer that Git leaves if LFS did not download the file.

    Raises:
        CheckpointError: The file is a pointer.
    """
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{file} is a Git LFS pointer; the file itself was not downloaded",
                hint="run `git lfs pull` in its folder, or `hf download` the repository",
            )


def refuse_dangling(folder: Path) -> None:
    """Check that no weights of a folder are dangling links, as in a cache whose blobs were removed.

    Raises:
        CheckpointError: A file is a dangling link.
    """
    for file in sorted(folder.glob("*.safetensors*")):
        if file.is_symlink() and not file.exists():
            raise CheckpointError(
                f"{file} is a link to {file.readlink()}, which does not exist",
                hint="finish the download, or copy the files themselves",
            )
