"""What a privacy plan holds a site's agent to, whatever the server asks and whatever its own worker answers.

The agent enforces by force what shows in the bytes: nothing leaves beside the arrays that the study's strategy declares, every one of the model's shapes and
finite, with no count and no fact; under a client-level plan their joint norm is within the clip. The answer that leaves is written anew
from the checked arrays, so nothing can travel in its margins. That a record-level update carries its noise cannot be seen in it: there the
installed app is trusted.

Nothing that is said about a failure tells of the data: what went wrong inside the worker stays in the site's log.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from fedlearn.app import app_of
from fedlearn.arrays import check_same, specs_of
from fedlearn.errors import FedlearnError, PolicyRefusedError, UpdateError, WorkerCrashedError
from fedlearn.learning import messages
from fedlearn.learning.collect import release_specs
from fedlearn.learning.combine import check_combination
from fedlearn.learning.postprocess import joint_l2_norm
from fedlearn.learning.update import UNCLIPPED, Update
from fedlearn.privacy.clipping import COUNT
from fedlearn.privacy.evaluation import check_may_score, evaluation_cost
from fedlearn.privacy.plan import AdaptiveClip, PrivacyPlan, Spaced, Unit
from fedlearn.privacy.study import clip_in, plan_of
from fedlearn.release.charge import Charge
from fedlearn.study import Study, study_from_json

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from flwr.app import RecordDict

    from fedlearn.learning.messages import Request
    from fedlearn.learning.strategy import Strategy

log = logging.getLogger("fedlearn.client")
T = TypeVar("T")

FACTS: Final = "facts"
"""The record of an update that is empty under a plan."""


@dataclass(frozen=True)
class Guard:
    """One study's plan at this site.

    Args:
        study: has a plan.
        plan: that plan.
        strategy: says what an update holds.
        account: what is charged.
    """

    study: Study
    plan: PrivacyPlan
    strategy: Strategy
    account: str

    @property
    def admission(self) -> Charge | None:
        """What is charged when this site says that it takes part: all of it where the server draws and adds noise; see `PrivacyPlan.central`."""
        return Charge(self.account, self.plan.cost().to_text()) if self.plan.central else None

    def charge(self, request: Request) -> Charge | None:
        """What one update costs. Admission has paid for one attempt at each round where there is one, and for no other.

        Raises:
            PolicyRefusedError: the plan has no such round.
        """
        self._check_round(request)
        if self.plan.central and request.attempt == 1:
            return None
        return Charge(self.account, self.plan.cost(1).to_text())

    def check_turn(self, request: Request, released: Collection[int]) -> None:
        """Correlated noise promises something only where nobody takes part more often than its plan says.

        Args:
            request: for an update.
            released: rounds of this run in which an update left this site.

        Raises:
            PolicyRefusedError: it is too early, or once too often.
        """
        turns = self.plan.sampling
        if not isinstance(turns, Spaced):
            return
        others = set(released) - {request.round}
        near = sorted(number for number in others if abs(number - request.round) < turns.separation)
        if near or len(others) >= (turns.most or self.plan.rounds):
            raise PolicyRefusedError(
                f"plan: the server asks for round {request.round}, and this site took part in {len(others)} others"
                + (f", round {near[-1]} among them" if near else ""),
                hint=f"the plan lets a client come back after {turns.separation} rounds, {turns.most or 'any number of'} times at the most",
            )

    def evaluation(self, request: Request) -> Charge:
        """What one answer to an evaluation costs.

        Raises:
            PolicyRefusedError: the plan covers none, or has no such round.
        """
        check_may_score(self.study)
        self._check_round(request)
        return Charge(self.account, evaluation_cost(self.study).to_text())

    def first(self) -> Charge:
        """The least that taking part costs."""
        return self.admission or Charge(self.account, self.plan.cost(1).to_text())

    def update(self, reply: RecordDict, asked: Request) -> RecordDict:
        """The update that may leave, written anew from the worker's.

        Args:
            reply: the worker's.
            asked: with the broadcast's arrays.

        Raises:
            PolicyRefusedError: it is not what the plan allows; the message names the rule and nothing of the data.
        """
        counted = isinstance(self.plan.clipping, AdaptiveClip) and self.plan.unit is Unit.CLIENT
        held = {r.name: s for r, s in release_specs(self.strategy, specs_of(asked.model), counted=counted).items()}
        if set(reply) != {messages.RECORD, FACTS, *(messages.PRIVATE + name for name in held)}:
            raise _broken("it holds other records than the strategy's releases")
        update = _read(messages.decode_update, reply)
        if set(reply.config_records[messages.RECORD]) != {"format", "examples"} or update.examples != 1:
            raise _broken("it says how many examples are behind it")
        if update.facts:
            raise _broken("it holds facts beside the releases")
        for name, specs in held.items():
            try:
                check_same(update.private[name], specs)
            except UpdateError:
                raise _broken(f"release {name!r} is not shaped like the model") from None
            if not all(np.isfinite(array).all() for array in update.private[name].values()):
                raise _broken(f"release {name!r} is not finite")
        if self.plan.unit is Unit.CLIENT:
            self._check_clip(update, asked)
        private = {name: {key: update.private[name][key] for key in specs} for name, specs in held.items()}
        return messages.encode_update(Update(private, examples=1))

    def scores(self, reply: RecordDict) -> RecordDict:
        """The noisy sums that may leave, written anew. How many they are is the task's, which is the worker's business.

        Raises:
            PolicyRefusedError: there is something beside them, or they are not finite.
        """
        if set(reply) != {messages.RECORD, "metrics", "cells"}:
            raise _broken("it holds other records than noisy sums")
        scored = _read(partial(messages.decode_scores, ""), reply)
        if set(reply.config_records[messages.RECORD]) != {"format", "examples"} or scored.examples or scored.metrics:
            raise _broken("it says more than noisy sums")
        if not np.isfinite(scored.cells).all():
            raise _broken("its sums are not finite")
        return messages.encode_scores({}, 0, scored.cells)

    def _check_round(self, request: Request) -> None:
        if not 1 <= request.round <= self.plan.rounds:
            raise PolicyRefusedError(
                f"plan: the server asks for round {request.round}, the plan of {self.study.name!r} has {self.plan.rounds}"
            )

    def _check_clip(self, update: Update, asked: Request) -> None:
        assert self.study.privacy is not None
        clipped = Update({name: arrays for name, arrays in update.private.items() if name != UNCLIPPED}, examples=1)
        if not joint_l2_norm(clipped) <= clip_in(self.study.privacy, asked.shared):
            raise _broken("its norm is above the plan's clip")
        if UNCLIPPED in update.private and float(update.private[UNCLIPPED][COUNT][0]) not in {0.0, 1.0}:
            raise _broken(f"{UNCLIPPED!r} is neither 0 nor 1")

    def description(self, reply: RecordDict, client: str) -> RecordDict:
        """The answer that says who this site is, and no more.

        Raises:
            PolicyRefusedError: the worker names somebody else.
        """
        if _read(messages.decode_description, reply) != client:
            raise _broken("its description names another client")
        return messages.encode_description(client, {})


def withheld(run: str, error: Exception) -> WorkerCrashedError:
    """What a server is told in place of an error whose text could tell of the data; the site's log has the error."""
    log.error("run %s: %s: %s", run, type(error).__name__, error)
    kind = error.kind if isinstance(error, FedlearnError) else "unexpected"
    return WorkerCrashedError(
        f"run {run}: the site's work failed ({kind}); under a privacy plan the reason stays in the site's own log"
    )


@lru_cache(maxsize=16)
def guard_of(study_text: str, account: str) -> Guard | None:
    """The guard of a study; None where it asks for no privacy. The first time its noise is found, which may take a second.

    Raises:
        StudyError: the plan's numbers do not fit each other.
        UnsupportedError: the strategy cannot carry the plan.
    """
    study = study_from_json(study_text)
    plan = plan_of(study)
    if plan is None:
        return None
    strategy = app_of(__file__).strategy(study.strategy.name, study.strategy.options)
    check_combination(study, strategy)
    return Guard(study, plan, strategy, account)


def is_noisy(guard: Guard | None) -> bool:
    """Whether an update has noise of its own, for each attempt. A server that adds noise sees the sum that was opened without it."""
    return guard is not None and not guard.plan.central


def _read(decode: Callable[[RecordDict], T], reply: RecordDict) -> T:
    """What the worker answered. Its own words, which an error would repeat, stay here."""
    try:
        return decode(reply)
    except FedlearnError as error:
        log.error("the worker's answer: %s", error)  # noqa: TRY400  # a foreseen error has no traceback
        raise _broken("it cannot be read") from None


def _broken(what: str) -> PolicyRefusedError:
    return PolicyRefusedError(f"gate: the worker's answer breaks the privacy plan: {what}; nothing left this site")
