"""A progress that keeps what it is told."""

from llmc.progress import SilentProgress


class Notes(SilentProgress):
    """Keeps notes in order."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)
