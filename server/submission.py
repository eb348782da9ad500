"""What was submitted, read and checked before it becomes a run: a mistake is the submitter's error, not a failed run."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fedlearn.app import flat_config
from fedlearn.errors import StudyError
from fedlearn.study import parse_study

if TYPE_CHECKING:
    from fedlearn.app import App

NAME_LIMIT: Final = 200
Scalar = bool | int | float | str


@dataclass(frozen=True)
class Submission:
    """A run to be.

    Args:
        name: for lists.
        rounds: how many rounds it will have; 0 where only the app knows.
        run_config: what a foreign app's context holds; empty for a study.
    """

    name: str
    rounds: int
    run_config: Mapping[str, Scalar] = field(default_factory=dict)


def read_submission(app: App, text: str, overrides: Sequence[str]) -> Submission:
    """Check what was submitted.

    For fedlearn's own app the text is a study: its task, its strategy and their combination must exist. For a foreign Flower App
    it is a flat table that overrides `[tool.flwr.app.config]` of the app's pyproject.toml.

    Raises:
        StudyError: what is wrong, with the line where it can be told.
        UnsupportedError: the study combines what cannot be combined.
    """
    if not app.native:
        return Submission(app.root.name[:NAME_LIMIT], 0, _run_config(app, text, overrides))
    from fedlearn.learning.combine import check_combination
    from fedlearn.tasks import task_of

    study = parse_study(text, tuple(overrides))
    task_of(study)
    check_combination(study, app.strategy(study.strategy.name, study.strategy.options))
    return Submission(study.name, study.rounds)


def _run_config(app: App, text: str, overrides: Sequence[str]) -> dict[str, Scalar]:
    config = app.config
    given: dict[str, Scalar] = {}
    for origin, toml in (("run config", text), *((f"override {o!r}", _quoted(o)) for o in overrides)):
        try:
            given |= flat_config(tomllib.loads(toml), origin)
        except tomllib.TOMLDecodeError as error:
            raise StudyError(f"{origin}: not valid TOML: {error}") from None
    for key in given:
        if key not in config:
            known = ", ".join(sorted(config)) or "none"
            raise StudyError(f"run config: unknown key {key!r}", hint=f"the app {app.root.name} knows: {known}")
    return config | given


def _quoted(override: str) -> str:
    """`key=value` as TOML; a value that is none is text."""
    key, _, value = override.partition("=")
    try:
        tomllib.loads(f"{key} = {value}")
    except tomllib.TOMLDecodeError:
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'{key} = "{escaped}"'
    return f"{key} = {value}"
