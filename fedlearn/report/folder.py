"""The run folder: everything that a run made, and what made it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlearn import arrays as named
from fedlearn.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedlearn.arrays import Array, Arrays
    from fedlearn.report.history import History
    from fedlearn.study import Study

MODEL, STUDY, HISTORY_JSON, HISTORY_CSV, MANIFEST, CURVE, PROFILE = (
    "model.safetensors",
    "study.json",
    "history.json",
    "history.csv",
    "manifest.json",
    "curve.png",
    "profile.json",
)


@dataclass(frozen=True)
class RunFolder:
    """A folder with `model.safetensors`, `study.json`, `history.json`, `history.csv`, `curve.png` and `manifest.json`.

    Each file is written beside its place and renamed, so a reader never sees half of one.
    """

    path: Path

    def save(self, study: Study, weights: Arrays, history: History, manifest: Mapping[str, Any]) -> Path:
        """Write everything; makes the folder.

        Raises:
            StateError: the folder cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write(MODEL, named.to_bytes(weights))
            self._write(STUDY, json.dumps(json.loads(study.to_json()), indent=1).encode())
            self._write(HISTORY_JSON, history.to_json().encode())
            self._write(HISTORY_CSV, history.to_csv().encode())
            facts = {"metric": history.metric, "rounds": len(history), **manifest}
            self._write(MANIFEST, json.dumps(facts, indent=1).encode())
            if len(history):
                history.plot(self.path / CURVE, title=study.name)
        except OSError as error:
            raise self._refused(error) from None
        return self.path

    def add(self, name: str, facts: Mapping[str, Any]) -> None:
        """Write one more JSON file.

        Raises:
            StateError: it cannot be written.
        """
        try:
            self._write(name, json.dumps(facts, indent=1).encode())
        except OSError as error:
            raise self._refused(error) from None

    def study(self) -> Study:
        """The study that made this run."""
        from fedlearn.study import study_from_json

        return study_from_json(self._read(STUDY).decode())

    def weights(self) -> dict[str, Array]:
        """The final model's weights."""
        return named.from_bytes(self._read(MODEL))

    def _refused(self, error: OSError) -> StateError:
        return StateError(
            f"run folder {self.path}: cannot be written: {error.strerror or error}",
            hint="choose another folder with --out, or free some space",
        )

    def _read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise StateError(
                f"run folder {self.path}: {name} cannot be read: {error.strerror or error}",
                hint="expected a folder that `fedlearn simulate --out` or `fedlearn model get` wrote",
            ) from None

    def _write(self, name: str, data: bytes) -> None:
        beside = self.path / f".{name}.part"
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path / name)
