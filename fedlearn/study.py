"""The study: one TOML file that runs as a simulation, over our link and on stock Flower, unchanged.

Strict: an unknown key or a value of the wrong kind is refused with its file, line and the nearest valid name. A
study is data: frozen, hashable by its canonical JSON, and complete, so that the JSON in a run folder or in a message
reproduces the run.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from fedlearn.environment import EnvironmentTable
from fedlearn.errors import StudyError
from fedlearn.nearest import nearest, nearest_choice
from fedlearn.privacy.table import PrivacyTable
from fedlearn.secure_aggregation import SecureAggregationTable
from fedlearn.strict import STRICT

Name = Annotated[str, Field(min_length=1, max_length=200)]


MAX_OPTION_DEPTH = 32
"""How deeply tables and lists may be nested in options."""


def _json_only(value: Any, depth: int = 0) -> Any:
    """Refuse what JSON cannot hold, and put tables in the order of their keys: a study must come back from its JSON as it was."""
    if depth > MAX_OPTION_DEPTH:
        raise ValueError(f"nested more than {MAX_OPTION_DEPTH} deep")
    if isinstance(value, dict):
        return {key: _json_only(item, depth + 1) for key, item in sorted(value.items(), key=lambda kv: str(kv[0]))}
    if isinstance(value, list):
        return [_json_only(item, depth + 1) for item in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"got {value!r}, expected text, a finite number, true, false, a list or a table")


Options = Annotated[dict[str, Any], AfterValidator(_json_only)]


class _Table(BaseModel):
    model_config = STRICT


class TaskTable(_Table):
    """[task]: which task, and the options of its constructor."""

    name: Name
    """A task of fedlearn's own (`fedlearn data list`), or module:attribute of yours."""
    options: Options = {}
    """The task's own; see `fedlearn data show TASK`."""


class DataTable(_Table):
    """[data]: how examples become clients, and which of a client's rows are its test set."""

    partition: Literal["natural", "iid", "dirichlet", "shards", "quantity", "feature_shift", "bootstrap"] = "natural"
    """How rows become clients; natural takes the clients that the data names."""
    clients: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """How many clients to make; not for the natural partition."""
    options: Options = {}
    """The partitioner's own: alpha, shards_per_client ..."""
    folds: Annotated[int, Field(ge=1, le=1000)] = 5
    """The test share of each client is 1 / folds; 1 keeps no test set."""
    fold: Annotated[int, Field(ge=0)] = 0
    """Which of the folds is the test set, from 0."""

    @model_validator(mode="after")
    def _consistent(self) -> DataTable:
        if self.fold >= self.folds:
            raise ValueError(f"fold: got {self.fold}, expected less than folds = {self.folds}")
        if self.partition != "natural" and self.clients is None:
            raise ValueError(f"clients: missing; the {self.partition} partition needs a number of clients")
        if self.partition == "natural" and self.clients is not None:
            raise ValueError("clients: the natural partition takes the clients that the data names; remove it")
        return self


class TrainTable(_Table):
    """[train]: local training at a client."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """The client's optimiser, made anew each round."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """Learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of sgd."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty; decoupled for adamw."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Examples a step; the last batch of an epoch may be smaller. Under [privacy] for records or groups its sampling_rate and steps decide instead."""
    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the client's training rows, each round."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many steps, if that is before the last epoch ends."""
    precision: Literal["float32", "float64", "bfloat16"] = "float32"
    """bfloat16: forward and backward under autocast; weights and updates stay float32."""


class StrategyTable(_Table):
    """[strategy]: which federated algorithm, and its hyper-parameters."""

    name: Name = "fedavg"
    """One of `fedlearn strategies`."""
    options: Options = {}
    """The strategy's own hyper-parameters."""


class CohortTable(_Table):
    """[cohort]: who takes part in a round."""

    size: Annotated[int, Field(ge=1)] | None = None
    """A fixed number, drawn without replacement; absent means everybody."""
    rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Every client by a coin of its own with this probability (Poisson sampling), under a client-level privacy plan. A cohort may be empty."""
    minimum: Annotated[int, Field(ge=1)] = 1
    """Fewer updates than this make the round void. Under a client-level [privacy] none does: who came is a secret."""
    wait_for: Annotated[int, Field(ge=1)] | None = None
    """Start when so many clients are connected; absent means `size`, or `minimum`."""

    @model_validator(mode="after")
    def _consistent(self) -> CohortTable:
        if self.size is not None and self.rate is not None:
            raise ValueError("size, rate: a cohort is of a fixed size or drawn by coins, not both")
        if self.size is not None and self.minimum > self.size:
            raise ValueError(f"minimum: got {self.minimum}, more than size = {self.size}")
        return self


class UpdateTable(_Table):
    """[update]: what is done to an update before it leaves. Not a privacy plan."""

    clip_l2: Annotated[float, Field(gt=0)] | None = None
    """Scale the whole update down to this L2 norm where it is longer."""


class EvaluateTable(_Table):
    """[evaluate]: when clients score the global model on their own test rows."""

    every: Annotated[int, Field(ge=0)] = 1
    """Every so many rounds, and after the last; 0 for never."""
    clients: Annotated[int, Field(ge=1)] | None = None
    """At most so many clients, drawn anew each time; absent means everybody, or 1000 of a larger population."""
    batch_size: Annotated[int, Field(ge=1)] = 1024
    """Examples at a time; changes speed and memory, not results."""


class RuntimeTable(_Table):
    """[runtime]: machines, not mathematics."""

    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """torch threads per client. Identical bytes are promised for equal thread counts only."""
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """How long a round waits for its clients."""
    wait_s: Annotated[float, Field(gt=0)] = 600.0
    """How long a run waits for its clients to connect."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """How often a void round is tried before the run fails. Where a site that is needed refuses the rest of the run, it fails at once."""


class Study(_Table):
    """A whole study. See the files in simulations/ for examples."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Letters, digits, dot, dash and underscore; names the run and its folder."""
    description: str = ""
    """One line for people."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Everything drawn in the seeded mode is derived from it."""
    rounds: Annotated[int, Field(ge=1, le=1_000_000)]
    """How many models are made."""
    task: TaskTable
    data: DataTable = DataTable()
    train: TrainTable = TrainTable()
    strategy: StrategyTable = StrategyTable()
    cohort: CohortTable = CohortTable()
    update: UpdateTable = UpdateTable()
    evaluate: EvaluateTable = EvaluateTable()
    runtime: RuntimeTable = RuntimeTable()
    environment: EnvironmentTable | None = None
    privacy: PrivacyTable | None = None
    secure_aggregation: SecureAggregationTable = SecureAggregationTable()

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        if self.environment is not None and self.environment.over_selection > 1 and self.cohort.size is None:
            raise ValueError("environment.over_selection: needs a cohort.size; everybody is asked without one")
        unit = None if self.privacy is None else self.privacy.unit
        if self.cohort.rate is not None and unit != "client":
            raise ValueError('cohort.rate: only with [privacy] unit = "client"; take cohort.size')
        if unit is not None and self.update.clip_l2 is not None:
            raise ValueError("update.clip_l2: [privacy] clips already, with its own clip_l2; remove it")
        distributed = self.privacy is not None and self.privacy.mechanism == "distributed"
        if distributed and not self.secure_aggregation.enabled:
            raise ValueError(
                "privacy.mechanism: distributed needs [secure_aggregation] enabled = true: one client's share of the noise hides nobody"
            )
        if distributed and self.cohort.rate is not None:
            raise ValueError(
                "cohort.rate: does not go with privacy.mechanism = 'distributed'; who takes part is public there"
            )
        if unit == "client" and not distributed and self.environment is not None:
            raise ValueError("environment: a client-level plan draws its own cohorts, out of everybody")
        return self

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, every default written out."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def with_overrides(self, overrides: Sequence[str]) -> Study:
        """The same study with `key=value` overrides applied; see `load_study`."""
        tree = self.model_dump(mode="json")
        _apply_overrides(tree, overrides)
        return _validate(tree, "", self.name, overrides)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, as hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


MAX_STUDY_BYTES = 1024 * 1024


def load_study(path: Path | str, overrides: tuple[str, ...] = ()) -> Study:
    """Read a study file and apply `key.path=value` overrides.

    Args:
        path: a TOML file.
        overrides: such as "strategy.name=fedprox" or "rounds=20"; values are TOML, or plain strings.

    Raises:
        StudyError: what is wrong, with file and line, and the nearest valid name.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_STUDY_BYTES:
            raise StudyError(f"{path}: larger than {MAX_STUDY_BYTES} bytes; expected a study in TOML")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = nearest(
            str(path), [str(p) for p in path.parent.glob("*.toml")], "a study is a TOML file: docs/study.md"
        )
        raise StudyError(f"{path}: no such study file", hint=beside) from None
    except (OSError, ValueError) as error:  # not UTF-8, or no valid path
        raise StudyError(f"{path}: cannot be read as a study: {error}") from None
    return parse_study(text, overrides, origin=str(path))


def parse_study(text: str, overrides: tuple[str, ...] = (), *, origin: str = "study") -> Study:
    """A study from TOML text; see `load_study`."""
    try:
        tree = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise StudyError(f"{origin}: not valid TOML: {error}") from None
    _apply_overrides(tree, overrides)
    return _validate(tree, text, origin, overrides)


def study_from_json(text: str) -> Study:
    """A study back from `Study.to_json`."""
    try:
        tree = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise StudyError(f"study: not valid JSON: {error}") from None
    return _validate(tree, "", "study")


def _validate(tree: Any, text: str, origin: str, overrides: Sequence[str] = ()) -> Study:
    try:
        return Study.model_validate(tree)
    except RecursionError:
        raise StudyError(f"{origin}: nested too deeply to be a study") from None
    except ValidationError as error:
        # A key that is missing is often there under a misspelt name: that is said first.
        first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        where = tuple(str(part) for part in first["loc"])
        line = _line_of(text, where)
        place = _override_of(overrides, where) or (f"{origin}:{line}" if line else origin)
        key = ".".join(where)
        if first["type"] == "extra_forbidden":
            known = _known_keys(where[:-1])
            hint = nearest(where[-1], known, f"valid keys here: {', '.join(known)}")
            raise StudyError(f"{place}: unknown key {key!r}", hint=hint) from None
        if first["type"] == "missing":
            raise StudyError(f"{place}: missing key {key!r}", hint=f"add {key} to the study") from None
        got = first.get("input")
        shown = "" if isinstance(got, dict) else f" (got {reprlib.repr(got)})"
        message = first["msg"].removeprefix("Value error, ")
        raise StudyError(f"{place}: {key or 'study'}: {message}{shown}", hint=nearest_choice(first)) from None


def _override_of(overrides: Sequence[str], where: tuple[str, ...]) -> str:
    """The last override that set a key or the table that it is in, else the only one in that table, as a place to point at.

    Empty where several set parts of what is wrong as a whole: none of them is to blame by itself.
    """
    paths = [(_override_path(override), override) for override in reversed(overrides)]
    for path, override in paths:
        if where[: len(path)] == path:
            return f"override {override!r}"
    inside = {path: override for path, override in paths if where and path[: len(where)] == where}
    return f"override {next(iter(inside.values()))!r}" if len(inside) == 1 else ""


def _known_keys(path: tuple[str, ...]) -> list[str]:
    model: type[BaseModel] | None = Study
    parts = iter(path)
    for part in parts:
        if model is None or part not in model.model_fields:
            return []
        model, named = table_of(model.model_fields[part].annotation)
        if named:
            next(parts, None)
    return [] if model is None else list(model.model_fields)


def table_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The table that a key holds, if it holds one, and whether it holds one under each name of the user's choice."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part, get_origin(annotation) is dict
    return None, False


def _line_of(text: str, path: tuple[str, ...]) -> int | None:
    """The line, from 1, on which a key or its table stands; None when it stands nowhere (a default or an override)."""
    table: tuple[str, ...] = ()
    best: tuple[int, int] | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
            table = tuple(part.strip().strip("\"'") for part in header[1].split("."))
            found = table
        elif key := re.match(r"\s*([A-Za-z0-9_.\"'-]+)\s*=", line):
            found = (*table, *(part.strip().strip("\"'") for part in key[1].split(".")))
        else:
            continue
        shared = min(len(found), len(path))
        if path[:shared] == found[:shared] and (best is None or shared > best[0]):
            best = (shared, number)
    return best[1] if best else None


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    for override in overrides:
        _apply_override(tree, override)
    table = tree.get("privacy")
    unset = isinstance(table, dict) and all(table.get(key) is None for key in ("epsilon", "noise_multiplier"))
    # Asked in so many words: without a budget there is no plan, and the whole table goes.
    if unset and any(_override_path(o) == ("privacy", "epsilon") and _is_none(o) for o in overrides):
        tree["privacy"] = None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    parts = _override_path(override)
    _, equals, raw = override.partition("=")
    if not equals or not all(parts):
        raise StudyError(
            f"override {override!r}: expected key=value",
            hint="for example --set strategy.name=fedprox or --set train.lr=0.05",
        )
    try:
        parsed = tomllib.loads(f"value = {raw}")
        value = parsed["value"] if len(parsed) == 1 else raw.strip()
    except (tomllib.TOMLDecodeError, RecursionError):
        value = raw.strip()
    node = tree
    for part in parts[:-1]:
        child = node.get(part)
        if child is None:  # not there, or there as nothing
            child = node[part] = {}
        if not isinstance(child, dict):
            raise StudyError(f"override {override!r}: {part!r} is a value, not a table")
        node = child
    node[parts[-1]] = None if _is_none(override) and _may_be_absent(parts) else value


def _is_none(override: str) -> bool:
    return override.partition("=")[2].strip() == "none"


def _may_be_absent(path: tuple[str, ...]) -> bool:
    """Whether a key has no value, or a table is not there, by default; TOML has no word for that, overrides have `none`."""
    model: type[BaseModel] | None = Study
    for part in path[:-1]:
        if model is None or part not in model.model_fields:
            return False
        model, _ = table_of(model.model_fields[part].annotation)
    field = None if model is None else model.model_fields.get(path[-1])
    return field is not None and not field.is_required() and field.default is None


def _override_path(override: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in override.partition("=")[0].split("."))
