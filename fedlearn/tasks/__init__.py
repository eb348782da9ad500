"""The tasks that come with fedlearn, by name, and how a user's own task is found.

Naming a task does not import torch: a task imports it when its model or its loss is used.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from fedlearn.errors import StudyError
from fedlearn.learning.task import Task

if TYPE_CHECKING:
    from fedlearn.study import Study

__all__ = ["load_task", "task_class", "task_names", "task_of"]

_TASKS: Final[Mapping[str, str]] = {
    "bank/fraud": "fedlearn.tasks.fraud:FraudTask",
    "device/keyboard": "fedlearn.tasks.keyboard:KeyboardTask",
    "hospital/blood-smear": "fedlearn.tasks.blood_smear:BloodSmearTask",
    "hospital/heart": "fedlearn.tasks.heart:HeartTask",
    "image/folder": "fedlearn.tasks.generic:ImageFolderTask",
    "image/npz": "fedlearn.tasks.generic:ImageNpzTask",
    "tabular/csv": "fedlearn.tasks.generic:TabularTask",
    "vision/digits": "fedlearn.tasks.digits:DigitsTask",
}


def task_names() -> tuple[str, ...]:
    """Names of the tasks that come with fedlearn, sorted."""
    return tuple(sorted(_TASKS))


def task_class(name: str) -> type[Task]:
    """The class behind a name.

    Args:
        name: one of `task_names()`; or `module:attribute`, a user's own task, imported from `sys.path` (the app's folder
            stands first on it).

    Raises:
        StudyError: no such task; the hint names the nearest one.
    """
    where = _TASKS.get(name, name)
    module_name, colon, attribute = where.partition(":")
    if not colon or not module_name or not attribute:
        near = difflib.get_close_matches(name, task_names(), n=1, cutoff=0.5)
        raise StudyError(
            f"unknown task {name!r}",
            hint=f"did you mean {near[0]!r}?"
            if near
            else f"tasks: {', '.join(task_names())}; or module:attribute for a task of your own",
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise StudyError(
            f"task {name!r}: module {module_name!r} cannot be imported: {error}",
            hint="put the file into the app's folder and name that folder with --app",
        ) from error
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        got = "nothing of that name" if found is None else f"{type(found).__name__} {attribute}"
        own = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, Task) and v is not Task]
        raise StudyError(
            f"task {name!r}: got {got} in {module_name}, expected a subclass of fedlearn.learning.task.Task",
            hint=f"tasks in that module: {', '.join(own) or 'none'}",
        )
    return found


def load_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """A task by its name and options (`[task]` in a study).

    Args:
        name: see `task_class`.
        options: keyword arguments of the task's constructor; a list stands for a tuple, because TOML and JSON have no tuples.

    Raises:
        StudyError: unknown task, unknown option (the hint names the nearest one), or a value of the wrong kind.
    """
    cls = task_class(name)
    given = {key: _frozen(value) for key, value in (options or {}).items()}
    _check_options(name, cls, given)
    return cls(**given)


def task_of(study: Study) -> Task:
    """A study's task, as the study's privacy plan needs it; see `Task.for_units`.

    Raises:
        StudyError: as `load_task`.
        UnsupportedError: the task cannot protect what the plan protects.
    """
    from fedlearn.privacy.study import task_for

    return task_for(study, load_task(study.task.name, study.task.options))


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _check_options(name: str, cls: type[Task], given: Mapping[str, Any]) -> None:
    parameters = {
        key: parameter
        for key, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
    }
    for key in given:
        if key not in parameters:
            near = difflib.get_close_matches(key, parameters, n=1, cutoff=0.5)
            valid = f"valid options: {', '.join(parameters) or 'none'}"
            raise StudyError(
                f"task {name!r}: unknown option {key!r}", hint=f"did you mean {near[0]!r}?" if near else valid
            )
    hints = get_type_hints(cls.__init__, include_extras=True)
    fields: dict[str, Any] = {
        key: (hints.get(key, Any), ... if parameter.default is parameter.empty else parameter.default)
        for key, parameter in parameters.items()
    }
    model = create_model("Options", __config__=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False), **fields)
    try:
        model.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise StudyError(f"task {name!r}: missing option {key!r}", hint=f"add {key} to [task.options]") from None
        message = f"task {name!r}: option {key!r}: {first['msg']} (got {first['input']!r})"
        raise StudyError(message, hint=_nearest_literal(first)) from None


def _nearest_literal(error: Any) -> str:
    if error["type"] != "literal_error" or not isinstance(error["input"], str):
        return ""
    expected = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
    near = difflib.get_close_matches(error["input"], expected, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else ""
