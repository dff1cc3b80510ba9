"""Reading sysfs, live or recorded, and recording what was read."""

import os
from pathlib import Path


class Sysfs:
    """Reads below one root. What is absent or unreadable is empty: devices may vanish at any time."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))

    def text(self, path: Path) -> str:
        """A file's content without the newline at its end; empty if there is none."""
        return self.peek(path)

    def peek(self, path: Path) -> str:
        """As `text`, for what a recording can do without."""
        try:
            with path.open("rb", buffering=0) as file:
                return file.read(4096).decode(errors="replace").strip()
        except OSError:
            return ""

    def children(self, path: Path) -> list[Path]:
        """What a directory holds, by name."""
        try:
            return sorted(path.iterdir())
        except OSError:
            return []

    def real(self, link: Path) -> Path | None:
        """Where a link leads; None if that is nowhere, or outside the root."""
        try:
            target = Path(os.path.realpath(link))
            return target if target.is_relative_to(self.root) and target.exists() else None
        except (OSError, ValueError):
            # A recorded name may be no name at all.
            return None


class Recorder(Sysfs):
    """Copies all that is read, links as links, so that the copy reads like the original."""

    def __init__(self, root: Path, copy: Path) -> None:
        super().__init__(root)
        self.copy = copy
        self.files = 0

    def text(self, path: Path) -> str:
        if found := self.peek(path):
            target = self._place(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(found + "\n")
            self.files += 1
        return found

    def real(self, link: Path) -> Path | None:
        target = super().real(link)
        if target is not None:
            self._place(target).mkdir(parents=True, exist_ok=True)
            if link.is_symlink() and not (copied := self._place(link)).is_symlink():
                copied.parent.mkdir(parents=True, exist_ok=True)
                copied.symlink_to(link.readlink())
        return target

    def _place(self, path: Path) -> Path:
        return self.copy / path.relative_to(self.root)
