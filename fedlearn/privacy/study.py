"""From a study to its plan: the one place where the table [privacy] becomes a `PrivacyPlan`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from fedlearn.errors import RemoteProtocolError, StudyError
from fedlearn.privacy.ftrl import Banded
from fedlearn.privacy.plan import (
    AdaptiveClip,
    Clipping,
    Evaluation,
    Everyone,
    FixedClip,
    FixedCohort,
    PoissonSampling,
    PrivacyPlan,
    Sampling,
    Spaced,
    Unit,
)

if TYPE_CHECKING:
    from fedlearn.arrays import Array, Arrays
    from fedlearn.learning.task import Task
    from fedlearn.privacy.ftrl import BufferedToeplitz
    from fedlearn.privacy.mechanisms import Chance
    from fedlearn.privacy.table import PrivacyTable
    from fedlearn.study import Study

T = TypeVar("T")

CLIP: Final = "privacy/clip_l2"
"""An adaptive clip among what the server broadcasts beside the model, and keeps with it; shape (), float64."""
UNITS: Final = 100
"""Of a client, where a study does not say: only what sums are divided by depends on it."""


def plan_of(study: Study) -> PrivacyPlan | None:
    """The study's plan, its noise found where it asks for a budget; None where it asks for no privacy.

    Raises:
        StudyError: the numbers do not fit each other; the message says which and why.
    """
    if study.privacy is None:
        return None
    cohort, every = study.cohort, study.evaluate.every
    return _plan(study.privacy, study.rounds, cohort.size, cohort.rate, study.data.clients, every)


@lru_cache(maxsize=64)
def _plan(
    table: PrivacyTable, rounds: int, size: int | None, rate: float | None, clients: int | None, every: int
) -> PrivacyPlan:
    unit = Unit(table.unit)
    units = table.units
    if units is None:
        units = clients if unit is Unit.CLIENT else UNITS
    if units is None:
        raise StudyError(
            "privacy.units: missing; the data names the clients, so the study must say how many there are at the least",
            hint="a public number: sums are divided by it, and delta must be below 1 / units",
        )
    if table.mechanism == "ftrl":
        sampling: Sampling = _spaced(table, rounds, size, rate, units)
    else:
        sampling = _client_sampling(size, rate, units) if unit is Unit.CLIENT else PoissonSampling(table.sampling_rate)
    plan = PrivacyPlan(
        unit,
        sampling,
        _clipping(table),
        table.noise_multiplier or 1.0,
        table.delta,
        units,
        rounds,
        1 if unit is Unit.CLIENT else table.steps,
        _matrix(table, rounds) if table.mechanism == "ftrl" else None,
        None if table.evaluation_noise is None else Evaluation(table.evaluation_noise, every),
    )
    if table.epsilon is None:
        return plan
    from fedlearn.privacy.accounting import calibrated

    return calibrated(plan, table.epsilon)


def _client_sampling(size: int | None, rate: float | None, units: int) -> Sampling:
    if rate is not None:
        return PoissonSampling(rate)
    return Everyone() if size is None else FixedCohort(size, units)


def _spaced(table: PrivacyTable, rounds: int, size: int | None, rate: float | None, units: int) -> Spaced:
    """Who is asked under correlated noise, where so many clients suffice."""
    separation, most = table.min_separation, table.max_participations
    assert separation is not None
    if rate is not None:
        raise StudyError(
            "cohort.rate: does not go with privacy.mechanism = 'ftrl', which amplifies nothing by coins",
            hint="take cohort.size, or mechanism = 'gaussian'",
        )
    if size is None and separation > 1:
        raise StudyError(
            f"cohort.size: missing; with privacy.min_separation = {separation} nobody is asked twice in {separation} rounds, so "
            "not everybody in one"
        )
    size = units if size is None else size
    # Asked at the same time may be as many as rest; and all together may be asked so often.
    needed = max(size * min(separation, rounds), 0 if most is None else -(-size * rounds // most))
    if needed > units:
        raise StudyError(
            f"privacy.min_separation, max_participations: rounds of {size} clients need {needed} of them, "
            f"privacy.units says {units} at the least",
            hint="a smaller cohort.size, a smaller min_separation, a larger max_participations, or fewer rounds",
        )
    return Spaced(size, separation, most)


def _matrix(table: PrivacyTable, rounds: int) -> Banded | BufferedToeplitz:
    separation = table.min_separation
    assert separation is not None
    if table.matrix == "banded":
        return Banded(min(separation, rounds))
    from fedlearn.privacy.ftrl_fit import fitted

    most = table.max_participations
    possible = -(-rounds // separation)
    return fitted(rounds, separation, possible if most is None else min(most, possible))


def _clipping(table: PrivacyTable) -> Clipping:
    if table.clipping == "fixed":
        return FixedClip(table.clip_l2)
    return AdaptiveClip(table.clip_l2, quantile=table.quantile, rate=table.clip_rate)


def protects_rows(study: Study) -> bool:
    """Whether each site protects its own records or groups: how data is read, split and trained on follows from it."""
    return study.privacy is not None and study.privacy.unit != "client"


def task_for(study: Study, task: Task) -> Task:
    """The task as the study's plan needs it; see `Task.for_units`.

    Raises:
        UnsupportedError: the task cannot protect what the plan protects.
    """
    if study.privacy is None or not protects_rows(study):
        return task
    from fedlearn.learning.task import for_units_of

    return for_units_of(task, study.privacy.group)


def with_clip(shared: Arrays, clip_l2: float | None) -> dict[str, Array]:
    """What is broadcast beside the model, with the clip in it where there is an adaptive one."""
    return {**shared} if clip_l2 is None else {**shared, CLIP: np.array(clip_l2)}


def without_clip(shared: Mapping[str, T]) -> dict[str, T]:
    """What the strategy shares: the plan's own is not its business."""
    return {name: value for name, value in shared.items() if name != CLIP}


def clip_in(table: PrivacyTable, shared: Arrays | None) -> float:
    """The clip of a client-level plan in this round; the first one where nothing was broadcast yet (None).

    Raises:
        RemoteProtocolError: it is adaptive and was not broadcast, or is no positive number.
    """
    if table.clipping == "fixed" or shared is None:
        return table.clip_l2
    clip = shared.get(CLIP)
    if clip is None or clip.shape != () or clip.dtype != np.float64 or not 0 < float(clip) < np.inf:
        raise RemoteProtocolError(f"message: {CLIP!r} is no positive number, and the study's clip is adaptive")
    return float(clip)


def is_seeded(study: Study, *, rehearsal: bool) -> bool:
    """Whether chance follows from the study's seed, so that nothing is private.

    Args:
        study: asks for privacy.
        rehearsal: True in a simulation, where all data are in one place and nothing is hidden.
    """
    return rehearsal or (study.privacy is not None and study.privacy.seeded)


def chance_for(study: Study, *path: str | int, rehearsal: bool) -> Chance:
    """Chance for one purpose; see `mechanisms.Chance`. Asked again for the same, a seeded study gets the same."""
    from fedlearn.privacy.mechanisms import secret_chance, seeded_chance

    return seeded_chance(study.seed, *path) if is_seeded(study, rehearsal=rehearsal) else secret_chance()
