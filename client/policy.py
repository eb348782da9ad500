"""The site's policy: what it takes part in, whatever a server asks. Fail closed: what is not named is refused."""

from __future__ import annotations

import tomllib
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedlearn.errors import PolicyRefusedError, StudyError
from fedlearn.study import Study, study_from_json

if TYPE_CHECKING:
    from pathlib import Path

    from fedlearn.learning.messages import Request


class SiteRules(BaseModel):
    """A policy file: TOML with these keys and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

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
    seeded: bool = True
    """Whether runs whose randomness derives from the study's seed are admitted. They are reproducible, hence not private."""

    def with_defaults(self, task: str, app: str) -> SiteRules:
        """The rules with the command line's task and the installed app where the file names none."""
        return self.model_copy(update={"tasks": self.tasks or (task,), "apps": self.apps or (app,)})

    def admit(self, request: Request) -> Study:
        """The study of a request, if every rule admits it.

        Raises:
            PolicyRefusedError: names the rule, what was asked and what is admitted.
            StudyError: the manifest is no study.
        """
        study = _study(request.study)
        if not self.seeded:
            raise PolicyRefusedError("policy: seeded = false, and this version of fedlearn runs seeded studies only")
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
        return study


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
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise StudyError(
                f"policy {path}: unknown key {key!r}", hint=f"valid keys: {', '.join(SiteRules.model_fields)}"
            ) from None
        raise StudyError(f"policy {path}: {key}: {first['msg']}") from None
