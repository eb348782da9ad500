"""The site's policy: what it takes part in, whatever a server asks. Fail closed: what is not named is refused."""

from __future__ import annotations

import json
import tomllib
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints, ValidationError, field_validator, model_validator

from fedlearn.errors import PolicyRefusedError, StudyError
from fedlearn.nearest import nearest, nearest_choice
from fedlearn.privacy.budget import Budget, StopRule
from fedlearn.release.records import SitePolicy
from fedlearn.strict import STRICT
from fedlearn.study import Study, study_from_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fedlearn.learning.messages import Request
    from fedlearn.privacy.table import PrivacyTable

SEEDED = "/seeded"
"""What the accounts of rehearsals end with: their noise can be drawn again, so they say nothing of privacy."""
UNIT_NAMES = ("record", "group", "client")
DatasetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$", max_length=100)]


class BudgetTable(BaseModel):
    """[budgets.record], [budgets.group] or [budgets.client]: the most that studies may spend of this site's data, all of them together."""

    model_config = STRICT

    epsilon: Annotated[float, Field(gt=0)]
    """The most that all charges together may come to."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Of that epsilon; below 1 / the number of records, people or clients."""
    rule: StopRule = Field(StopRule.ADAPTIVE, strict=False)
    """How charges add up; an account keeps its rule and its order for life. See `fedlearn.privacy.budget`."""
    order: Annotated[float, Field(gt=1)] | None = None
    """Of the adaptive rule's divergences."""

    @model_validator(mode="after")
    def _has_room(self) -> BudgetTable:
        try:
            self.budget()
        except StudyError as error:
            raise ValueError(str(error).replace("\n", ";")) from None
        return self

    def budget(self) -> Budget:
        """As the ledger knows it."""
        return Budget(self.epsilon, self.delta, self.rule, self.order)


class GroupBudgetTable(BudgetTable):
    """[budgets.group]: also whose rows belong together. A study names a column too; were that enough, it could protect visits and call them groups."""

    column: Annotated[str, Field(min_length=1, max_length=200)]
    """The column, or array, that names each row's person or account. A study that protects another one's groups is refused."""


class BudgetTables(BaseModel):
    """[budgets]: one for each unit that studies may protect."""

    model_config = STRICT

    record: BudgetTable | None = None
    group: GroupBudgetTable | None = None
    client: BudgetTable | None = None

    def of(self, unit: str) -> BudgetTable | None:
        """The budget of a unit; None where the site has none."""
        found: BudgetTable | None = getattr(self, unit)
        return found

    @property
    def units(self) -> tuple[str, ...]:
        """Units that have a budget."""
        return tuple(unit for unit in UNIT_NAMES if self.of(unit) is not None)


class MaskRules(BaseModel):
    """[secure_aggregation]: what this site asks of studies that mask updates. `true` stands for the defaults, `false` for a site that asks nothing."""

    model_config = STRICT

    required: bool = True
    """Refuse studies that do not mask updates, so that no server gets this site's update by itself."""
    profile: Literal["semi-malicious", "malicious"] = "semi-malicious"
    """malicious: refuse studies in which survivors are not agreed upon."""
    adversarial: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Refuse studies that assume a smaller share of clients to work with the coordinator."""
    reopen: bool = False
    """Give an update for another attempt at a round of which this site has helped to open a sum; see docs/secure-aggregation.md."""

    def check(self, study: Study) -> None:
        """Refuse a study that protects this site's update less than it asks for.

        Raises:
            PolicyRefusedError: names the rule, what was asked and what is admitted.
        """
        table = study.secure_aggregation
        if self.required and not table.enabled:
            raise PolicyRefusedError(
                f"policy: secure_aggregation: this site's updates leave under masks only, and {study.name!r} asks for them as they are",
                hint="add [secure_aggregation] enabled = true to the study",
            )
        if not table.enabled:
            return
        if self.profile == "malicious" and table.profile != "malicious":
            raise PolicyRefusedError(
                f'policy: secure_aggregation.profile: the study has "{table.profile}", this site asks for "malicious"',
                hint='set secure_aggregation.profile = "malicious" in the study',
            )
        if table.adversarial < self.adversarial:
            raise PolicyRefusedError(
                f"policy: secure_aggregation.adversarial: the study assumes {table.adversarial:g}, this site at least {self.adversarial:g}",
                hint=f"set secure_aggregation.adversarial = {self.adversarial:g} in the study",
            )


class SiteRules(BaseModel):
    """A policy file: TOML with these keys and no others."""

    model_config = STRICT

    tasks: tuple[str, ...] = ()
    """Tasks that may be run, by name. Empty: the one that the client was started with."""
    strategies: tuple[str, ...] = ()
    """Strategies that may be run. Empty: every strategy of the installed app."""
    apps: tuple[str, ...] = ()
    """Digests of server apps that are admitted. Empty: the same app as is installed here."""
    max_rounds: Annotated[int, Field(ge=1)] = 100_000
    """Studies with more rounds are refused."""
    max_voids_per_run: Annotated[int, Field(ge=0)] = 3
    """Attempts that a server may give up after this site's update could have left; the next one is refused."""
    dataset: DatasetName | None = None
    """The name of this site's data in its ledger. Whatever runs on the same data must have the same name. None: the task's name."""
    budgets: BudgetTables = BudgetTables()
    """What studies may spend. With any, a study without a plan for this data is refused."""
    mixed_units: bool = False
    """Allow budgets of more than one unit. Their epsilons do not add up: a study that protects clients tells something of each record too, and
    the other way round, and neither account pays for it."""
    secure_aggregation: MaskRules = MaskRules(required=False)
    """What is asked of studies' masks; `true` for masks at all."""
    seeded: bool | None = None
    """Whether studies are admitted whose randomness all derives from a seed: those without [privacy], and rehearsals of private ones. They
    are reproducible, hence not private. None: only where there is no budget."""

    @field_validator("secure_aggregation", mode="before")
    @classmethod
    def _masks(cls, value: object) -> object:
        return MaskRules(required=value) if isinstance(value, bool) else value

    def gate(self) -> SitePolicy:
        """The limits that the gate keeps."""
        return SitePolicy(max_voids_per_run=self.max_voids_per_run, reopen=self.secure_aggregation.reopen)

    @model_validator(mode="after")
    def _one_unit(self) -> SiteRules:
        units = self.budgets.units
        if len(units) > 1 and not self.mixed_units:
            raise ValueError(
                f"budgets: got {' and '.join(units)}: what a study spends of one unit it does not pay of the other; keep one, or set "
                "mixed_units = true and read docs/privacy.md"
            )
        return self

    def with_defaults(self, task: str, app: str) -> SiteRules:
        """The rules with the command line's task and the installed app where the file names none."""
        tasks = self.tasks or (task,)
        named = self.dataset or tasks[0]
        return self.model_copy(update={"tasks": tasks, "apps": self.apps or (app,), "dataset": named})

    @property
    def admits_seeded(self) -> bool:
        """Whether runs that are not private are admitted."""
        return not self.budgets.units if self.seeded is None else self.seeded

    def account(self, table: PrivacyTable) -> str:
        """What a study's charges are charged to."""
        return f"{self.dataset}/{table.unit}" + (SEEDED if table.seeded else "")

    def accounts(self) -> Mapping[str, Budget]:
        """Every account's budget. Rehearsals have one of their own of the same size, so that they end where the real run would."""
        tables = {unit: table for unit in self.budgets.units if (table := self.budgets.of(unit)) is not None}
        return {
            f"{self.dataset}/{unit}{kind}": table.budget()
            for unit, table in tables.items()
            for kind in (("", SEEDED) if self.admits_seeded else ("",))
        }

    def admit(self, request: Request) -> Study:
        """The study of a request, if every rule admits it.

        Raises:
            PolicyRefusedError: names the rule, what was asked and what is admitted.
            StudyError: the manifest is no study.
        """
        study = _study(request.study)
        for rule, asked, admitted in (
            ("tasks", study.task.name, self.tasks),
            ("strategies", study.strategy.name, self.strategies),
            ("apps", request.app, self.apps),
        ):
            if admitted and asked not in admitted:
                raise PolicyRefusedError(
                    f"policy: {rule}: the server asks for {asked!r}, this site admits {', '.join(admitted)}",
                    hint="install the same release of fedlearn on both sides" if rule == "apps" else "",
                )
        if study.rounds > self.max_rounds:
            raise PolicyRefusedError(
                f"policy: max_rounds: the study has {study.rounds}, this site admits {self.max_rounds}"
            )
        self.secure_aggregation.check(study)
        if study.privacy is None:
            self._check_plain()
        else:
            self._check_private(study.privacy)
        return study

    def _check_plain(self) -> None:
        if self.budgets.units:
            raise PolicyRefusedError(
                f"policy: budgets: this site counts what is spent of {self.dataset!r}, and the study has no [privacy]: what it "
                "would learn has no bound",
                hint=f'add [privacy] with unit = "{self.budgets.units[0]}" to the study',
            )
        if not self.admits_seeded:
            raise PolicyRefusedError("policy: seeded = false, and the study has no [privacy]: nothing of it is private")

    def _check_private(self, table: PrivacyTable) -> None:
        column = (
            f"    column = {json.dumps(table.group)}  # what names a person here\n" if table.unit == "group" else ""
        )
        if self.budgets.of(table.unit) is None:
            raise PolicyRefusedError(
                f"policy: budgets: the study protects each {table.unit} of {self.dataset!r}, and this site has no budget for that",
                hint="whoever answers for the data may add to the site's policy file:\n"
                f"    [budgets.{table.unit}]\n    epsilon = {table.epsilon or 3.0:g}\n    delta = {table.delta:g}\n{column}"
                '    rule = "fixed"  # exact for studies of one kind; leave it out where several kinds share the data',
            )
        if self.budgets.group is not None and table.unit == "group" and table.group != self.budgets.group.column:
            raise PolicyRefusedError(
                f"policy: budgets.group.column: the study protects the groups of {table.group!r}, this site's budget is for those of "
                f"{self.budgets.group.column!r}",
                hint=f"set privacy.group = {json.dumps(self.budgets.group.column)} in the study",
            )
        if table.seeded and not self.admits_seeded:
            raise PolicyRefusedError(
                "policy: seeded: the study derives its noise from its seed, so it is not private; this site admits no rehearsals",
                hint="set privacy.seeded = false in the study, or seeded = true in the site's policy where the data may be shown",
            )


@lru_cache(maxsize=16)
def _study(text: str) -> Study:
    return study_from_json(text)


def load_rules(path: Path | None) -> SiteRules:
    """Read a policy file; the defaults without one.

    Raises:
        StudyError: the file cannot be read, or has an unknown key or a value of another kind.
    """
    if path is None:
        return SiteRules()
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        # TOML has arrays, the rules are immutable.
        return SiteRules.model_validate({k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StudyError(f"policy {path}: cannot be read: {error}") from None
    except ValidationError as error:
        first = min(
            error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden"
        )  # perhaps the one that is missing
        where = [str(part) for part in first["loc"]]
        key = ".".join(where)
        if first["type"] == "extra_forbidden":
            known = _keys_beside(where)
            hint = nearest(where[-1], known, f"valid keys: {', '.join(known)}")
            raise StudyError(f"policy {path}: unknown key {key!r}", hint=hint) from None
        if first["type"] == "missing":
            raise StudyError(f"policy {path}: missing key {key!r}", hint=f"add {key} to the policy") from None
        message = first["msg"].removeprefix("Value error, ")
        raise StudyError(f"policy {path}: {key}: {message}", hint=nearest_choice(first)) from None


def _keys_beside(where: list[str]) -> list[str]:
    """The keys that are valid where an unknown one stands."""
    parent = tuple(where[:-1])
    known: dict[tuple[str, ...], type[BaseModel]] = {
        (): SiteRules,
        ("secure_aggregation",): MaskRules,
        ("budgets",): BudgetTables,
        ("budgets", "group"): GroupBudgetTable,
    }
    found: dict[str, Any] = known.get(parent, BudgetTable).model_fields
    return list(found)
