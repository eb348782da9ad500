"""The run folder while its run goes on: how it was started, and the journal that it is resumed from.

    run.json   the study, where its data and app are, on what it runs, and the versions that made it
    journal/   committed rounds, and stateful strategies' client memories
    errors/    what clients raised

When the run ends, or is stopped, `fedlearn.report.folder.RunFolder` writes its results beside these.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import xxhash

from fedlearn.errors import StateError
from fedlearn.release.keys import record_key
from fedlearn.release.sqlite import SqliteJournal
from fedlearn.simulation.journal import GroupedJournal
from fedlearn.study import Study, study_from_json

if TYPE_CHECKING:
    from types import TracebackType

    from fedlearn.learning.population import Population

RUN, JOURNAL = "run.json", "journal"
MARKED_ROWS: Final = 256
_FORMAT: Final = 1


@dataclass(frozen=True)
class Setting:
    """What a run depends on beside its study.

    Args:
        data: the file with everybody's data, absolute; None for what ships with the task.
        app: the folder with the user's tasks, absolute; None for fedlearn's own.
        device: where it trains.
        backend: how.
    """

    data: str | None = None
    app: str | None = None
    device: str = "cpu"
    backend: str = "auto"


@dataclass(frozen=True)
class Recorded:
    """How a run folder's run was started.

    Args:
        folder: the run folder.
        study: what it runs.
        setting: where and on what.
        made_with: versions, threads and machine.
        data_mark: of the data that it was started on; see `mark_of`.
    """

    folder: Path
    study: Study
    setting: Setting
    made_with: dict[str, Any] = field(repr=False)
    data_mark: str

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a run folder's record.

        Raises:
            StateError: it has none, or a damaged one, or one of another version of fedlearn.
        """
        try:
            tree = json.loads((folder / RUN).read_bytes())
            if tree["format"] != _FORMAT:
                raise StateError(
                    f"run folder {folder}: its format is {tree['format']}, expected {_FORMAT}",
                    hint="another version of fedlearn made it; resume it with that one",
                )
            study = study_from_json(json.dumps(tree["study"]))
            return cls(folder, study, Setting(**tree["setting"]), tree["made_with"], tree["data_mark"])
        except FileNotFoundError:
            raise StateError(
                f"run folder {folder}: no {RUN}; expected a folder that `fedlearn simulate` has begun",
                hint="name the folder that the run printed, or one that --out named",
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(f"run folder {folder}: {RUN} cannot be read: {error}") from None

    def check_same(self, study: Study) -> None:
        """Refuse to go on with another study. More rounds are no other study.

        Raises:
            StateError: names what differs.
        """
        differing = differences(self.study, study, ignore=("rounds",))
        if differing:
            named = ", ".join(f"{key} is {was!r}, asked for {now!r}" for key, (was, now) in list(differing.items())[:5])
            raise StateError(
                f"run folder {self.folder} holds another study: {named}",
                hint="choose another folder, or leave the study out to go on with the folder's own",
            )

    def other_bytes(self, setting: Setting) -> list[str]:
        """What has changed since, so that equal bytes are no longer promised; in words."""
        now = made_with()
        changed = [
            f"{key} {self.made_with.get(key)}, now {now[key]}" for key in now if self.made_with.get(key) != now[key]
        ]
        for key in ("device", "backend"):
            was, is_now = getattr(self.setting, key), getattr(setting, key)
            if was != is_now:
                changed.append(f"{key} {was}, now {is_now}")
        return changed


class Workspace:
    """A run folder that this process holds: nobody else can write to it. A context manager.

    Args:
        folder: where; made when missing.
        study: what is run in it.
        setting: where and on what.
        data_mark: of the data; see `mark_of`.
        fresh: True refuses a folder with a run in it, False one without, or with one on other data.

    Raises:
        StateError: there is another run in it, another process works on it, or the disk refuses.
    """

    def __init__(self, folder: Path, study: Study, setting: Setting, data_mark: str, *, fresh: bool) -> None:
        self.folder = folder
        if fresh and (folder / RUN).exists():
            raise StateError(
                f"run folder {folder} holds a run already",
                hint=f"--resume {folder} goes on with it; for a new run choose another folder",
            )
        self._fresh, self._run = fresh, study.name
        self.journal = GroupedJournal(SqliteJournal(folder / JOURNAL))
        try:
            self._record(study, setting, data_mark)
        except BaseException:
            self.journal.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            begun = self.journal.get(record_key("checkpoint", self._run)) is not None
            self.journal.close()
        except StateError:
            if kind is None:  # an error that is on its way says it already
                raise
            return
        if kind is not None and self._fresh and not begun:  # no round was committed: there is nothing to resume
            (self.folder / RUN).unlink(missing_ok=True)
            shutil.rmtree(self.folder / JOURNAL, ignore_errors=True)

    def _record(self, study: Study, setting: Setting, data_mark: str) -> None:
        before = None if self._fresh else Recorded.read(self.folder)
        if before is not None and before.data_mark != data_mark:
            raise StateError(
                f"run folder {self.folder}: the data is not what the run was started on",
                hint="bring back the data as it was, or start a new run in another folder",
            )
        tree = {
            "format": _FORMAT,
            "study": json.loads(study.to_json()),
            "setting": asdict(setting),
            "made_with": made_with() if before is None else before.made_with,
            "data_mark": data_mark,
        }
        part = self.folder / f".{RUN}.part"
        try:
            with part.open("wb") as file:
                file.write(json.dumps(tree, indent=1).encode())
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.folder / RUN)
        except OSError as error:
            raise StateError(
                f"run folder {self.folder}: cannot be written: {error.strerror or error}",
                hint="choose another folder with --out, or free some space",
            ) from None


def mark_of(population: Population) -> str:
    """A checksum over the data's shape and `MARKED_ROWS` of its rows: tells another file, or an edited one in most cases, in no time."""
    examples = population.examples
    rows = np.unique(np.linspace(0, max(len(examples) - 1, 0), min(len(examples), MARKED_ROWS)).astype(np.int64))
    state = xxhash.xxh3_128(f"{len(population.rows)} clients".encode())
    for part in (examples.x, examples.y):
        some = np.ascontiguousarray(part[rows])
        state.update(f"{part.shape} {part.dtype}".encode())
        state.update(repr(some.tolist()).encode() if some.dtype.hasobject else some.tobytes())
    return state.hexdigest()


def made_with() -> dict[str, str]:
    """Versions and machine: what equal bytes depend on beside the study."""
    from fedlearn import __version__

    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    return {"fedlearn": __version__, "python": platform.python_version(), **versions, "machine": platform.machine()}


def differences(one: Study, other: Study, ignore: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Keys in which two studies differ, with both values."""
    left, right = (leaves(json.loads(study.to_json())) for study in (one, other))
    keys = [key for key in {**left, **right} if key not in ignore]
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of tables as whole keys and their values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
