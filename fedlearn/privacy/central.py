"""A client-level plan at the coordinator: who is drawn, and what is released of a round's sum.

Membership of a cohort and its size are secrets that the guarantee rests on: nothing that a reader of the model sees may depend on them but
through the noisy sum. So a round goes on with whoever comes, nobody at all included, is divided by what the plan expects, and tells the
server rule the plan's numbers in place of the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from fedlearn.errors import RunFailedError
from fedlearn.learning.cohort import pick_cohort
from fedlearn.learning.postprocess import joint_l2_norm
from fedlearn.learning.rows import in_order
from fedlearn.learning.update import UNCLIPPED, Aggregate, Update
from fedlearn.privacy.clipping import COUNT, central_release, denominator
from fedlearn.privacy.ftrl_run import FtrlRun
from fedlearn.privacy.plan import AdaptiveClip, FixedCohort, PoissonSampling, PrivacyPlan
from fedlearn.privacy.study import chance_for, clip_in, is_seeded, plan_of

if TYPE_CHECKING:
    from fedlearn.arrays import Arrays
    from fedlearn.learning.collect import SumCollector
    from fedlearn.learning.secure_sum import OpenSum
    from fedlearn.release.journal import Changes, Journal
    from fedlearn.release.keys import AttemptId
    from fedlearn.study import Study

_ROUNDING: Final = 1e-6
"""How much longer than the clip a norm may come out, clipped in one order and added up in another."""


@dataclass(frozen=True)
class CentralPlan:
    """Draws cohorts and adds the noise of one study.

    Args:
        study: asks for client-level privacy.
        plan: the study's.
        rehearsal: True in a simulation; see `fedlearn.privacy.study.is_seeded`.
        ftrl: what correlated noise remembers; None where each round's is drawn anew.
    """

    study: Study
    plan: PrivacyPlan
    rehearsal: bool
    ftrl: FtrlRun | None = None

    @classmethod
    def of(cls, study: Study, journal: Journal, run: str, *, rehearsal: bool) -> CentralPlan | None:
        """Of a study and its run so far; None where it asks for no client-level privacy, or its clients add the noise."""
        plan = plan_of(study)
        if plan is None or not plan.central:
            return None
        if plan.matrix is None:
            return cls(study, plan, rehearsal)
        seed = study.seed if is_seeded(study, rehearsal=rehearsal) else None
        return cls(study, plan, rehearsal, FtrlRun(plan, journal, run, seed))

    @property
    def counted(self) -> bool:
        """Whether a bit goes with each update, for an adaptive clip."""
        return isinstance(self.plan.clipping, AdaptiveClip)

    @property
    def first_clip(self) -> float | None:
        """What an adaptive clip starts from; None where it is fixed."""
        return self.plan.clipping.initial_l2 if isinstance(self.plan.clipping, AdaptiveClip) else None

    @property
    def least_clients(self) -> int:
        """How many must be here when the run begins: everybody whom sums are divided by, and nobody where clients come when they can."""
        return self.plan.units if self.ftrl is None else 0

    def opening(self) -> Changes:
        """What must be durable before the first round."""
        return {} if self.ftrl is None else self.ftrl.opening()

    def closing(self, at: AttemptId, roster: Sequence[str]) -> Changes:
        """What must be durable together with a round, of those who were asked in it."""
        return {} if self.ftrl is None else self.ftrl.closing(at.round, roster)

    def check_population(self, clients: int) -> None:
        """Refuse a population that is smaller than the plan's.

        Raises:
            RunFailedError: it is.
        """
        if clients < self.least_clients:
            raise RunFailedError(
                f"privacy: {clients} clients are here, the plan is for {self.plan.units} at the least",
                hint="start the missing clients, or state a smaller privacy.units; that needs more noise for the same epsilon",
            )

    def cohort(self, clients: Sequence[str], at: AttemptId) -> tuple[str, ...]:
        """Who is asked in an attempt: drawn as the plan says, sorted.

        Args:
            at: the attempt.
            clients: for a fixed cohort all whom the plan counts on, here or not: a drawn client that is away is not replaced.

        Raises:
            RunFailedError: under correlated noise, nobody who is here may be asked.
        """
        chance = chance_for(self.study, "cohort", at.round, at.attempt, rehearsal=self.rehearsal)
        if self.ftrl is not None:
            return self.ftrl.pick(clients, at.round, chance)
        ordered = in_order(clients)
        match self.plan.sampling:
            case PoissonSampling(rate):
                return tuple(ordered.at(int(i)) for i in np.flatnonzero(chance.coins(len(ordered), rate)))
            case FixedCohort(size, _):
                if is_seeded(self.study, rehearsal=self.rehearsal):
                    return pick_cohort(clients, size, self.study.seed, "train", at.round)
                first = np.argpartition(chance.uniform(len(ordered)), size - 1)[
                    :size
                ]  # the smallest of as many numbers
                return tuple(ordered.at(int(i)) for i in np.sort(first))
            case _:
                return tuple(ordered)

    def refusal(self, update: Update, shared: Arrays) -> str | None:
        """Why an update is not what a client sends under this plan, and stays out of the sum; None where it is.

        Clients clip and weigh; one that does not, out of date or mistaken, would move the sum further than the noise covers.

        Args:
            update: as it came.
            shared: what was broadcast, for the clip.
        """
        table = self.study.privacy
        assert table is not None
        if update.examples != 1 or update.facts:
            return "privacy: the update says how many examples it is from, or more; under a client-level plan each counts once"
        released = {name: arrays for name, arrays in update.private.items() if name != UNCLIPPED}
        norm = joint_l2_norm(replace(update, private=released))
        if not norm <= clip_in(table, shared) * (1 + _ROUNDING):
            return "privacy: the update is longer than the plan's clip, or not finite"
        if UNCLIPPED in update.private:
            bit = update.private[UNCLIPPED].get(COUNT)
            if bit is None or bit.shape != (1,) or bit[0] not in (0, 1):
                return "privacy: the update's bit for the adaptive clip is neither 0 nor 1"
        return None

    def release(self, at: AttemptId, total: SumCollector | OpenSum, shared: Arrays) -> tuple[Aggregate, float | None]:
        """What a round's sum becomes before anything is made of it.

        Args:
            at: the attempt; its noise is drawn for it.
            total: the exact sum.
            shared: what was broadcast, for the clip that was used.

        Returns:
            Noisy means under the plan's own numbers of clients, and the next clip; None where it is fixed.
        """
        table = self.study.privacy
        assert table is not None
        sums = total.totals()
        unclipped = round(float(sums[UNCLIPPED][COUNT][0])) if self.counted else 0
        exact = {name: one for name, one in sums.items() if name != UNCLIPPED}
        clip_l2 = clip_in(table, shared)
        longer = total.rounding_l2 + _ROUNDING * clip_l2
        chance = chance_for(self.study, "noise", at.round, at.attempt, rehearsal=self.rehearsal)
        clients = max(1, round(denominator(self.plan)))
        numbers = {"clients": clients, "population": self.plan.units, "examples": clients}
        if self.ftrl is not None:
            return Aggregate(self.ftrl.means(at.round, exact, 1 + longer / clip_l2), **numbers), None
        made = central_release(self.plan, clip_l2, exact, unclipped, total.clients, chance, longer=longer)
        return Aggregate(made.means, **numbers), made.clip_l2 if self.counted else None
