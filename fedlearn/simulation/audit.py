"""`fedlearn audit`: what a study claims, beside what an attacker got out of the code that trains it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Final

from fedlearn import events
from fedlearn.errors import StudyError, UnsupportedError
from fedlearn.privacy.accounting import account
from fedlearn.privacy.audit import CONFIDENCE, Finding, Power, judge, power
from fedlearn.privacy.membership import FEWEST_RUNS, FEWEST_UNITS, Membership, membership
from fedlearn.privacy.plan import PrivacyPlan, Unit
from fedlearn.privacy.study import plan_of
from fedlearn.simulation.audited import Audited, audit_site
from fedlearn.simulation.audited_crowd import audit_crowd
from fedlearn.simulation.shadows import train_shadows

if TYPE_CHECKING:
    from fedlearn.privacy.accounting import Bound
    from fedlearn.privacy.audit import Coins, Scores
    from fedlearn.privacy.canaries import MeasuredNoise
    from fedlearn.simulation.prepare import Ready

CANARIES: Final = 1_000
SHADOWS: Final = 8
"""Models of the membership test, for records and groups. For clients it is many whole federations: none unless asked for."""
_MEMBERS_SHARE: Final = 0.1
"""Of the error that a report may make, the part of the membership test: the weaker of the two."""
Told = Callable[[int, int, str], None]
"""Rounds done, rounds in all, what is being done."""


@dataclass(frozen=True)
class AuditReport:
    """A claim and what was found about it.

    Args:
        plan: audited; its delta is the one that was asked for.
        claim: its epsilon, and which accountant says so.
        audited: the run with canaries.
        finding: the bound from its guesses.
        membership: the test on final models; None where there was none.
        no_membership: why not; empty where there was one.
        seconds: wall time.
    """

    plan: PrivacyPlan
    claim: Bound
    audited: Audited
    finding: Finding
    membership: Membership | None
    no_membership: str
    seconds: float
    study: str = ""

    @property
    def refuted(self) -> bool:
        """Whether a test refutes the claim, or a release had less noise than the claim was computed from."""
        by_members = self.membership is not None and self.membership.finding.refuted
        return self.finding.refuted or by_members or bool(self.short_of_noise)

    @property
    def short_of_noise(self) -> tuple[MeasuredNoise, ...]:
        """Arrays with less noise than the plan has."""
        return tuple(one for one in self.audited.evidence.noise() if one.too_little)

    @cached_property
    def power(self) -> tuple[Power, ...]:
        """What this audit would have seen in other builds."""
        return power(self.plan, self.claim.epsilon, self.finding.canaries, self.finding.confidence)

    @property
    def scores(self) -> Scores:
        """The canaries' scores."""
        return self.audited.evidence.scores

    @property
    def inside(self) -> Coins:
        """Whether each canary was in."""
        return self.audited.evidence.canaries.inside


def audit(
    ready: Ready,
    *,
    canaries: int = CANARIES,
    client: str | None = None,
    shadows: int | None = None,
    delta: float | None = None,
    confidence: float = CONFIDENCE,
    told: Told = lambda done, total, what: None,  # noqa: ARG005  # nobody listens
) -> AuditReport:
    """Audit what a study claims, by running its own code in this process.

    Args:
        ready: the study with its data; it asks for privacy.
        canaries: how many are put in.
        client: whose records they are put among; the first client's if not told.
        shadows: models of the membership test; 0 for none. If not told, 8 for records and groups and none for clients.
        delta: at which the claim is put to the test; the plan's if not told. Every plan has an epsilon at every delta.
        confidence: of the whole report.
        told: hears of progress.

    Raises:
        StudyError: the study asks for no privacy, or a number does not fit.
        DataError: there is no such client.
        UnsupportedError: a client was named, and it is clients that are protected.
        RunFailedError: a client could not train.
    """
    study, started = ready.study, time.monotonic()
    plan = plan_of(study)
    if plan is None:
        raise StudyError(
            f"{study.name}: asks for no privacy, so there is no claim to put to the test",
            hint="add a table [privacy], or --set privacy.unit=record --set privacy.epsilon=3 --set privacy.delta=1e-5",
        )
    if plan.shares is not None:
        raise UnsupportedError(
            f"{study.name}: its clients add their noise in integers under masks, which this attack does not measure",
            hint='the same study with privacy.mechanism = "gaussian" and no [secure_aggregation] can be audited',
        )
    if not 0.5 < confidence < 1:
        raise StudyError(f"--confidence: got {confidence}, expected above 0.5 and below 1")
    if plan.unit is Unit.CLIENT and client is not None:
        raise UnsupportedError(
            f"audit of client {client!r}: this study protects clients, so the canaries are clients",
            hint="leave --client away",
        )
    asked = plan if delta is None else replace(plan, delta=delta)
    claim = account(asked.whole_cost(), asked.delta).reported
    shadows, why_not = _shadows(ready, plan, shadows)
    error = 1 - confidence
    of_members = _MEMBERS_SHARE * error if shadows else 0.0
    rounds = _Rounds(study.rounds * (1 + shadows), told)
    rounds.what = "canaries"
    if plan.unit is Unit.CLIENT:
        audited = audit_crowd(study, ready.population, ready.strategy, plan, canaries, rounds.hear)
    else:
        audited = audit_site(study, ready.population, ready.strategy, plan, canaries, client, rounds.hear)
    finding = judge(
        audited.evidence.scores, audited.evidence.canaries.inside, claim.epsilon, asked.delta, 1 - (error - of_members)
    )
    rounds.what = "membership"
    tested = None
    if shadows:
        found = train_shadows(study, ready.population, ready.strategy, plan, shadows, rounds.hear)
        tested = membership(found.scores, found.inside, claim.epsilon, asked.delta, 1 - of_members)
    seconds = time.monotonic() - started
    return AuditReport(asked, claim, audited, finding, tested, why_not, seconds, study.name)


def _shadows(ready: Ready, plan: PrivacyPlan, asked: int | None) -> tuple[int, str]:
    """How many models the membership test gets, and why none."""
    if asked is not None and 0 < asked < FEWEST_RUNS:
        raise StudyError(f"--shadows: got {asked}, expected 0, or at least {FEWEST_RUNS}")
    if asked == 0:
        return 0, "not asked for"
    if plan.unit is Unit.CLIENT:
        if len(ready.population.client_ids) < FEWEST_UNITS:
            return 0, f"{len(ready.population.client_ids)} clients; of fewer than {FEWEST_UNITS} nothing can be told"
        if asked is None:
            return 0, "each of its models is a whole federation: ask for it with --shadows"
    return asked or SHADOWS, ""


class _Rounds:
    """Counts finished rounds."""

    def __init__(self, total: int, told: Told) -> None:
        self._done, self._total, self._told, self.what = 0, total, told, ""

    def hear(self, event: events.Event) -> None:
        if isinstance(event, events.RoundFinished):
            self._done += 1
            self._told(self._done, self._total, self.what)
