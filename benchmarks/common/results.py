"""Results files that are written while a benchmark runs, and gone on with by the same command."""

import json
import os
from pathlib import Path
from typing import Any


class ResultsFile:
    """A JSON file of what it belongs to, and of results.

    Args:
        path: of the file.
        header: machine, versions and settings that all results in it must share.
        empty: the fields of a file without results.
        go_on: read the file if it exists; else it is written anew.

    Raises:
        ValueError: the file's results have another header.
    """

    def __init__(
        self, path: Path, header: dict[str, Any], empty: dict[str, Any], go_on: bool = True
    ) -> None:
        self.path = path
        self.content: dict[str, Any] = {**header, **empty}
        if not go_on or not path.exists():
            return
        earlier = json.loads(path.read_text())
        # What JSON makes of the header, tuples and integer keys, is what the file has.
        for key, value in json.loads(json.dumps(header)).items():
            if earlier.get(key) != value:
                raise ValueError(
                    f"{path} holds runs with {key} = {earlier.get(key)}, not {value}: "
                    "choose another --output"
                )
        self.content |= earlier

    def write(self) -> None:
        """Write the file as a whole, so that a call that is stopped leaves no half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, separators=(",", ":")) + "\n")
        os.replace(part, self.path)


class Rows(ResultsFile):
    """A file of rows, each of which has a key of its own: a few fields that name it."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        super().__init__(path, header, {"rows": []})

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row with these fields, or None."""
        return next((row for row in self.content["rows"] if key.items() <= row.items()), None)

    def put(self, key: dict[str, Any], row: dict[str, Any]) -> None:
        """Write a row, in the place of the one that has its key."""
        rows = [other for other in self.content["rows"] if not key.items() <= other.items()]
        self.content["rows"] = [*rows, key | row]
        self.write()
