"""What a plan promises, and against whom: one epsilon for each adversary, never without what it rests on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from enum import Enum
from typing import TYPE_CHECKING, Final

from fedlearn.privacy.plan import Everyone, FixedCohort, Spaced, Unit

if TYPE_CHECKING:
    from fedlearn.privacy.events import Relation
    from fedlearn.privacy.plan import PrivacyPlan, Sampling


class Adversary(Enum):
    """Against whom an epsilon holds."""

    MODEL_READER = "reader of the model"
    OTHER_SITES = "other sites"
    SERVER = "server"


@dataclass(frozen=True)
class Claim:
    """One epsilon with all that it means. Print it whole or not at all.

    Args:
        epsilon: infinite where nothing is promised; None where the noise is reproducible, so that nothing can be.
        delta: of the guarantee.
        unit: whose presence is hidden.
        relation: which data sets are neighbours.
        adversary: against whom.
        sampling: what the code does to draw units.
        accountant: which one computed epsilon, with its version.
        caveat: what the reader must know besides; empty if nothing.
    """

    epsilon: float | None
    delta: float
    unit: Unit
    relation: Relation
    adversary: Adversary
    sampling: Sampling
    accountant: str
    caveat: str = ""


NOT_PRIVATE: Final = "not private: the run is seeded, so its noise can be drawn again and taken off"
REAL_NUMBERS: Final = "proved for real numbers; the noise is drawn in floating point"
HIDDEN_COHORT: Final = "holds while cohort membership and size stay hidden"
ZERO_OUT: Final = (
    "neighbours: one client's updates are zero or are not; when it is asked is not hidden. Holds while the server asks nobody too often; the whole "
    "run is spent with its first round"
)
SERVER_SEES_ALL: Final = "the server adds the noise, so it sees every update as it is"
SITES_KNOW: Final = "sites that mask together know who takes part in a round, so nothing is gained by sampling"
SITES_ARE_DRAWN: Final = (
    "each site knows whether it was drawn itself, and so many are drawn each round: what all others know together says who else was, so "
    "nothing is gained by sampling"
)
SERVER_SEES_SUM: Final = "the server adds the noise, so it sees each round's exact sum; single updates are masked"


def shown(epsilon: float | Decimal, digits: int = 4) -> str:
    """An epsilon as people see it: rounded up, so that none stands anywhere that is not true."""
    exact = Decimal(str(epsilon))
    return f"{exact.quantize(Decimal(10) ** -digits, rounding=ROUND_CEILING):f}" if exact.is_finite() else "infinite"


def claims(
    plan: PrivacyPlan, epsilon: float, accountant: str, *, seeded: bool, unsampled: float, masked: bool = False
) -> tuple[Claim, ...]:
    """What a plan promises against each adversary.

    Args:
        plan: the plan.
        epsilon: of its cost.
        accountant: that computed it, with its version.
        seeded: whether the run derives its noise from the study's seed.
        unsampled: epsilon without what a draw of a fixed number of clients gains; `epsilon` where there is no such draw.
        masked: whether updates travel under secure aggregation.
    """
    found = []
    for adversary in Adversary:
        value: float | None = epsilon
        caveat = REAL_NUMBERS
        if plan.shares is not None:
            caveat = plan.shares.premise
        elif plan.unit is Unit.CLIENT and adversary is Adversary.SERVER:
            value, caveat = math.inf, SERVER_SEES_SUM if masked else SERVER_SEES_ALL
        elif isinstance(plan.sampling, FixedCohort) and adversary is Adversary.OTHER_SITES:
            value, caveat = unsampled, f"{SITES_KNOW if masked else SITES_ARE_DRAWN}; {REAL_NUMBERS}"
        elif isinstance(plan.sampling, Spaced):
            caveat = f"{ZERO_OUT}; {caveat}"
        elif plan.unit is Unit.CLIENT and not isinstance(plan.sampling, Everyone):
            caveat = f"{HIDDEN_COHORT}; {caveat}"
        if seeded:
            value, caveat = None, NOT_PRIVATE
        found.append(Claim(value, plan.delta, plan.unit, plan.relation, adversary, plan.sampling, accountant, caveat))
    return tuple(found)
