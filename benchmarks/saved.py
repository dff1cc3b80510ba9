"""Rows that are saved as they come, so that what was measured outlives a crash or a time limit."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from benchmarks.report import Row, table, write


class Saved:
    """The rows of one run, and their file.

    Args:
        file: None saves nothing.
        packages, others: as for `report.publish`.
        facts: what there is to know of the machine and the run, beside what `report` finds out.
    """

    def __init__(
        self,
        file: Path | None,
        packages: Iterable[str] = (),
        others: Mapping[str, str] | None = None,
        facts: Mapping[str, object] | None = None,
    ) -> None:
        self.rows: list[Row] = []
        self._file = file
        self._packages = tuple(packages)
        self._others = others
        self._facts = dict(facts or {})
        self._single: dict[str, object] = {}

    def add(self, rows: Iterable[Row]) -> None:
        """More rows."""
        self.rows += rows
        if self._file is not None:
            write(self.rows, self._file, self._packages, self._others, facts=self._facts)

    def fact(self, name: str, value: object) -> None:
        """One more fact; saved with the next rows."""
        self._facts[name] = value

    def single(self, name: str, value: object) -> None:
        """Single measurements behind some rows: they go to NAME.requests.json beside NAME.json."""
        self._single[name] = value
        if self._file is not None:
            self._file.with_suffix(".requests.json").write_text(json.dumps(self._single) + "\n")

    def publish(self, hidden: Collection[str] = ()) -> None:
        """Print the table of all rows but those of `hidden` metrics."""
        print(table([row for row in self.rows if row["metric"] not in hidden]))
        if self._file is not None:
            print(f"written: {self._file}")
