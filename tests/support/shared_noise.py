"""A study of four clients that add their noise themselves, and how much of it a run shows."""

from __future__ import annotations

import itertools

import numpy as np

from fedlearn.privacy.study import noise_plan, plan_of
from fedlearn.secagg.floor import honest_floor
from fedlearn.secagg.plan import Profile
from tests.support.tiny_task import tiny_study

OVERRIDES = (
    'privacy={unit="client", mechanism="distributed", noise_multiplier=3.0, delta=0.01, clip_l2=0.3, units=4, seeded=true}',
    "secure_aggregation={enabled=true, max_clients=4}",
    "task.options={hidden=300}",
    "evaluate.every=0",
    "runtime.deadline_s=20.0",
)


def noisy_study(*overrides: str):
    return tiny_study(*OVERRIDES, *overrides)


def noise_std(study, length: int, clients: int) -> float:
    """Of each number of a mean over so many clients, by the plan."""
    plan, shares = noise_plan(study, length), plan_of(study).shares
    paid = plan.noise_multiplier * plan.encoding.norm_bound / plan.encoding.scale
    reached = [level for level in shares.levels if clients >= level]
    honest = honest_floor(
        *(shares.clients, shares.survivors, shares.adversarial, shares.dropout, Profile.SEMI_MALICIOUS),
        survivors=max(reached, default=0),
    )
    return paid * (clients / honest) ** 0.5 / clients


def steps_of(models) -> list[np.ndarray]:
    """What each round added to the model, as one vector: next to nothing but noise, whose length is 40 times the clip's."""
    flat = [np.concatenate([np.ravel(array) for array in model.values()]).astype(np.float64) for model in models]
    return [after - before for before, after in itertools.pairwise(flat)]


def assert_noise(steps, expected: list[float]) -> None:
    """Within five standard errors of these deviations."""
    scaled = np.concatenate([step / std for step, std in zip(steps, expected, strict=True)])
    assert abs(np.var(scaled) - 1) < 5 * (2 / len(scaled)) ** 0.5
    assert abs(np.mean(scaled)) < 5 / len(scaled) ** 0.5
