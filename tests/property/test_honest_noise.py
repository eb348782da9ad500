"""The noise that leaves is the noise that was promised: measured in whole rounds, with and without clients that vanish.

Bounds are five standard errors of what is measured, and the seed is fixed: a build whose noise is off by a tenth fails.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from torch import nn

from fedlearn.learning.backend import Failed, Summed
from fedlearn.learning.collect import collector_for
from fedlearn.learning.federation import Federation
from fedlearn.learning.local import initial_weights
from fedlearn.learning.postprocess import chain_of
from fedlearn.learning.update import DELTA, UNCLIPPED
from fedlearn.privacy.clipping import COUNT, denominator
from fedlearn.privacy.study import CLIP, plan_of
from fedlearn.release.journal import DictJournal
from fedlearn.simulation.batched import BatchedBackend
from fedlearn.simulation.sequential import SequentialBackend
from fedlearn.simulation.sums import is_counted
from tests.support.private_plans import ADAPTIVE, CLIENT, RECORD
from tests.support.ragged_task import RaggedTask, population_of, ragged_study, strategy_of

BACKENDS = {"sequential": SequentialBackend, "batched": BatchedBackend}
SIZES = [5, 1, 9, 4, 12, 3, 7, 2, 6, 8, 1, 5]


@dataclass(frozen=True)
class Measured(RaggedTask):
    """Three thousand parameters to see noise on. Labels say what a client does: 9 raises, 8 learns nothing, and nobody does with `slope` 0."""

    slope: float = 1.0
    hidden: ClassVar[int] = 300

    def model(self):
        return nn.Sequential(nn.Linear(6, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 3))

    def loss(self, outputs, y):
        if bool((y == 9).any()):
            raise ValueError("a label that nobody knows")
        learns = (y < 8) * self.slope
        return super().loss(outputs, y.clamp(max=2)) * learns


@dataclass(frozen=True)
class Round:
    """What was broadcast and what came back: the exact sums, of how many clients."""

    model: dict
    clip_l2: float | None
    sums: dict
    clients: int


class Watching:
    """A backend whose sums are looked at on their way."""

    def __init__(self, inner, study) -> None:
        self._inner, self._study, self.rounds = inner, study, []

    def clients(self, at_least=0, timeout_s=0.0):
        return self._inner.clients(at_least, timeout_s)

    def fit(self, work):
        collector = collector_for(strategy_of(self._study), work.model, counted=is_counted(chain_of(self._study)))
        for reply in self._inner.fit(work):
            if isinstance(reply, Summed):
                collector.merge(reply.partial)
            elif not isinstance(reply, Failed):
                collector.add(reply.client, reply.update)
            yield reply
        clip = work.shared.get(CLIP)
        sums = {name: one.total() for name, one in collector.sums.items()}
        self.rounds.append(Round(work.model, None if clip is None else float(clip), sums, collector.clients))

    def evaluate(self, work):
        return self._inner.evaluate(work)

    def close(self):
        self._inner.close()


def run(backend, *overrides, slope=1.0, label=None, clients=()):
    """The study, its rounds, and the model and state after each."""
    study = ragged_study(f"task.options.sizes={SIZES}", "train.precision=float64", *overrides)
    population = replace(population_of(study), task=Measured(sizes=tuple(SIZES), slope=slope))
    for client in clients:
        population.examples.y[population.rows[client]] = label
    watching = Watching(BACKENDS[backend](study, population, strategy_of(study)), study)
    first = initial_weights(population.task, study)
    federation = Federation(
        study,
        "run",
        strategy_of(study),
        first,
        watching,
        DictJournal(),
        metric="accuracy",
        emit=lambda event: None,
        may_join=False,
        rehearsal=True,
    )
    state = federation.run().state
    watching.close()
    after = [*(r.model for r in watching.rounds[1:]), state.model]
    return study, watching.rounds, after, state


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays.values()])


def assert_noise(noise, std):
    """Rows of independent normal numbers of mean 0 and this standard deviation."""
    n = noise.size
    assert abs(noise.var() / std**2 - 1) < 5 * np.sqrt(2 / n)
    assert abs(noise.mean()) < 5 * std / np.sqrt(n)
    kurtosis = ((noise / std) ** 4).mean()
    assert abs(kurtosis - 3) < 5 * np.sqrt(96 / n)
    for one, other in zip(noise[1:], noise[:-1], strict=True):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(len(one))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gone", [(), ("c002", "c004", "c009")])
@pytest.mark.parametrize("more", [(), ("cohort.size=9",), ("cohort.rate=0.5",), ADAPTIVE, ("strategy.name=scaffold",)])
def test_a_client_level_release_is_the_exact_mean_and_the_plans_noise(backend, gone, more):
    study, rounds, after, _ = run(backend, *CLIENT, *more, label=9, clients=gone)
    plan = plan_of(study)
    noise = []
    for one, model in zip(rounds, after, strict=True):
        released = flat(model) - flat(one.model)
        exact = flat(one.sums[DELTA]) / denominator(plan)
        noise.append((released - exact) / (one.clip_l2 or study.privacy.clip_l2))
    if gone and "cohort" not in str(more):
        assert [one.clients for one in rounds] == [len(SIZES) - len(gone)] * study.rounds
    share = 0.01 if is_counted(chain_of(study)) else 0.0
    std = study.privacy.noise_multiplier / np.sqrt(1 - share) / denominator(plan)
    assert_noise(np.array(noise), std)


def test_the_count_behind_an_adaptive_clip_is_noised_as_planned():
    """Half of the clients learn nothing, the others more than the clip: the share of updates within it is a half and noise."""
    idle = [f"c{i:03d}" for i in range(0, len(SIZES), 2)]
    table = (*CLIENT, *ADAPTIVE, "privacy.noise_multiplier=0.3", "privacy.clip_l2=1e-9", "privacy.clip_rate=1e-3")
    study, rounds, _, state = run("batched", *table, "train.max_steps=1", "rounds=250", label=8, clients=idle)
    clips = np.array([one.clip_l2 for one in rounds] + [float(state.shared[CLIP])])
    assert {float(one.sums[UNCLIPPED][COUNT][0]) for one in rounds} == {len(idle)}
    plan = plan_of(study)
    share = plan.clipping.quantile - np.diff(np.log(clips)) / plan.clipping.rate
    noise = (share - 0.5) * denominator(plan)
    std = study.privacy.noise_multiplier / (2 * np.sqrt(0.01))
    assert abs(noise.var() / std**2 - 1) < 5 * np.sqrt(2 / len(noise))
    assert abs(noise.mean()) < 5 * std / np.sqrt(len(noise))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gone", [(), ("c002", "c004", "c009")])
@pytest.mark.parametrize(
    "more",
    [(), ("privacy.sampling_rate=1e-9", "privacy.units=1000000000", "privacy.delta=1e-12"), ("strategy.name=fedprox",)],
)
def test_dp_sgd_releases_the_plans_noise_and_nothing_else_where_there_is_nothing_to_learn(backend, gone, more):
    """Whatever a client's number of rows: each of its steps moves by noise over what the plan expects, drawn or not."""
    study, rounds, after, _ = run(backend, *RECORD, *more, "rounds=4", slope=0.0, label=9, clients=gone)
    plan, lr = plan_of(study), study.train.lr
    step = study.privacy.noise_multiplier * study.privacy.clip_l2 / (study.privacy.sampling_rate * study.privacy.units)
    pull = 1 - lr * strategy_of(study).options.get("mu", 0.0)
    walk = np.sqrt(sum(pull ** (2 * k) for k in range(plan.steps)))  # FedProx pulls back what earlier steps did
    # A row that raises counts as nothing, and that is all: who holds it answers like everybody else.
    assert [one.clients for one in rounds] == [len(SIZES)] * study.rounds
    moved = np.array([flat(model) - flat(one.model) for one, model in zip(rounds, after, strict=True)])
    assert_noise(moved, lr * step * walk / np.sqrt(len(SIZES)))
