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
from fedlearn.privacy.shares import LEAST_SENSITIVITY, NoiseShares
from fedlearn.secure_aggregation import stated_clients

if TYPE_CHECKING:
    from fedlearn.arrays import Array, Arrays
    from fedlearn.learning.task import Task
    from fedlearn.privacy.distributed import DistributedPlan
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
    return _plan(study.privacy, study.rounds, cohort.size, cohort.rate, study.data.clients, every, _shares(study))


def noise_plan(study: Study, length: int) -> DistributedPlan | None:
    """How clients add noise to vectors of so many numbers; None where the study does not ask them to.

    Raises:
        StudyError: as `plan_of`; or a sum could wrap.
    """
    plan = plan_of(study)
    if plan is None or plan.shares is None:
        return None
    assert study.privacy is not None
    return _noise_plan(
        plan.shares, study.privacy.clip_l2, plan.noise_multiplier, length, study.secure_aggregation.ring_bits or 0
    )


@lru_cache(maxsize=64)
def _noise_plan(shares: NoiseShares, clip_l2: float, noise: float, length: int, ring_bits: int) -> DistributedPlan:
    from fedlearn.privacy.distributed import DistributedPlan
    from fedlearn.secagg.plan import Profile
    from fedlearn.secagg.primitives import Suite

    made = DistributedPlan(
        length,
        shares.clients,
        shares.survivors,
        clip_l2,
        noise,
        adversarial=shares.adversarial,
        dropout=shares.dropout,
        suite=Suite.P256_AES256,
        profile=Profile.MALICIOUS if shares.malicious else Profile.SEMI_MALICIOUS,
        ring_bits=ring_bits,
        levels=shares.levels,
    )
    assert made.honest == shares.honest
    if made.encoding.norm_bound < LEAST_SENSITIVITY:
        raise StudyError(
            f"privacy: distributed noise on {length} numbers has a sensitivity of {made.encoding.norm_bound:g} steps, the price "
            f"holds from {LEAST_SENSITIVITY:g}"
        )
    return made


def _shares(study: Study) -> NoiseShares | None:
    table = study.secure_aggregation
    if study.privacy is None or study.privacy.mechanism != "distributed":
        return None
    clients = stated_clients(study)
    if clients is None:
        raise StudyError(
            "secure_aggregation.max_clients: missing; how much noise each client adds depends on how many there are",
            hint="the most clients of a round: all sites of the study, or cohort.size",
        )
    survivors = study.privacy.survivors
    if survivors is None:
        missing = -(-clients * round(table.dropout * 1_000_000) // 1_000_000)
        survivors = max(3, study.cohort.minimum, clients - missing)
    if not max(3, study.cohort.minimum) <= survivors <= clients:
        raise StudyError(
            f"privacy.survivors: got {survivors}, expected {max(3, study.cohort.minimum)} to {clients}, the clients of a round"
        )
    malicious = table.profile == "malicious"
    return NoiseShares(clients, survivors, table.adversarial, table.dropout, study.privacy.surplus, malicious)


@lru_cache(maxsize=64)
def _plan(
    table: PrivacyTable,
    rounds: int,
    size: int | None,
    rate: float | None,
    clients: int | None,
    every: int,
    shares: NoiseShares | None,
) -> PrivacyPlan:
    unit = Unit(table.unit)
    units = table.units
    if units is None:
        units = clients if unit is Unit.CLIENT else UNITS
    if units is None and shares is not None:
        units = shares.clients
    if units is None:
        raise StudyError(
            "privacy.units: missing; the data names the clients, so the study must say how many there are at the least",
            hint="a public number: sums are divided by it, and delta must be below 1 / units",
        )
    if table.mechanism == "ftrl":
        sampling: Sampling = _spaced(table, rounds, size, rate, units)
    elif shares is not None:
        sampling = Everyone()  # the server picks who takes part
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
        shares,
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
