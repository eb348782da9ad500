"""A record- or group-level plan at a client: what local training needs of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlearn.errors import DataError
from fedlearn.privacy.plan import Unit
from fedlearn.privacy.study import chance_for, plan_of, protects_rows

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

    from fedlearn.learning.task import Batch
    from fedlearn.privacy.dpsgd import DpSgd, GradientEngine, Losses
    from fedlearn.privacy.mechanisms import Chance
    from fedlearn.privacy.plan import PrivacyPlan
    from fedlearn.study import Study


@dataclass(frozen=True)
class SitePlan:
    """How one client trains in one round.

    Args:
        plan: of its records or groups.
        chance: of batches and noise.
        groups: the group of each training row, shape (rows,), for a group-level plan.
    """

    plan: PrivacyPlan
    chance: Chance
    groups: npt.NDArray[Any] | None = field(default=None, repr=False)

    def gradients(self, model: nn.Module, losses: Losses, rows: int, engine: GradientEngine | None = None) -> DpSgd:
        """What its steps follow; see `DpSgd`."""
        from fedlearn.privacy.dpsgd import DpSgd

        return DpSgd(model, losses, rows, self.plan, self.chance, groups=self.groups, engine=engine)


def site_plan(study: Study, round_number: int, client: str, train: Batch, *, rehearsal: bool) -> SitePlan | None:
    """What a client's training in a round must keep to; None where the study has no plan for records or groups.

    How many rows a real site has refuses nothing: a server could ask for one delta after another until it knows the number, for free.
    There the ledger adds up at the site's own delta, whatever the study's is, and no rows at all give noise.

    Args:
        study: may ask for privacy.
        round_number: of the seeded mode's noise.
        client: likewise.
        train: the client's training rows.
        rehearsal: True in a simulation, and in a site's dry run; see `fedlearn.privacy.study.is_seeded`.

    Raises:
        DataError: in a rehearsal, the client has no rows, or as many units that delta promises nothing to them.
    """
    if not protects_rows(study):
        return None
    plan = plan_of(study)
    assert plan is not None
    groups = train.groups if plan.unit is Unit.GROUP else None
    if rehearsal:
        _check_count(plan, len(train) if groups is None else len(np.unique(groups)))
    chance = chance_for(study, "dp-sgd", round_number, client, rehearsal=rehearsal)
    return SitePlan(plan, chance, groups)


def _check_count(plan: PrivacyPlan, units: int) -> None:
    if units < 1:
        raise DataError("DP-SGD: no training rows", hint="a site without data takes no part in the run")
    if plan.delta * units >= 1:
        raise DataError(
            f"privacy: delta is {plan.delta:g}, this client's {plan.unit.value}s need less than 1 over their number",
            hint="a smaller privacy.delta",
        )
