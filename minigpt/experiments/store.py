"""The results of runs on the disk: one JSON file each, with its settings, whole or not there at all.

Results that runs of the same settings gave before are found again, whichever experiment asks.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .. import storage
from ..errors import Damaged, writing
from .runs import Result, Run


class Store:
    """A folder with results. `announce` gets a line about each that is damaged."""

    def __init__(self, folder: Path, announce):
        self._folder, self._announce = folder, announce
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, run: Run, settings: dict[str, Any]) -> Path:
        """The file of a run: what a person wants to know of it, and the digest of all its settings."""
        name = f"{run.kind}-{run.n_layer}x{run.n_embd}-seed{run.seed}-{_digest(settings)[:16]}.json"
        return self._folder / name

    def load(self, run: Run, settings: dict[str, Any]) -> Result | None:
        """The stored result of a run with exactly these settings, None where there is none that is whole."""
        path = self.path(run, settings)
        if not path.exists():
            return None
        try:
            stored = storage.read_json(path)
            checksum = stored.pop("checksum", None)
            if checksum != _digest(stored) or stored.get("settings") != settings:
                raise Damaged(f"{path} is damaged")
            return stored["result"]
        except Damaged as error:
            self._announce(f"WARNING: {error.problem}: that run is made again")
            return None

    def save(self, run: Run, settings: dict[str, Any], result: Result) -> None:
        """Store a result, on the disk when this returns. Raises UserError where it cannot be written."""
        path = self.path(run, settings)
        draft = path.with_name(path.name + ".writing")
        value = {"settings": settings, "result": result}
        with writing(path):
            try:
                storage.write_json(draft, value | {"checksum": _digest(value)})
                os.replace(draft, path)
                storage.sync(self._folder)
            finally:
                draft.unlink(missing_ok=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
