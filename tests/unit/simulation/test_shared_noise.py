"""Studies whose clients add the noise, in simulations: every mask or none to the same bits, and as much noise as the plan says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedlearn
from fedlearn import arrays, events
from fedlearn.app import load_app
from fedlearn.data.population import build_population
from fedlearn.errors import UnsupportedError
from fedlearn.simulation.audit import audit
from fedlearn.simulation.prepare import Ready
from fedlearn.simulation.sequential import SequentialBackend
from fedlearn.simulation.workspace import Setting
from fedlearn.tasks import load_task
from tests.support.shared_noise import assert_noise, noise_std, noisy_study, steps_of

SURPLUS = "privacy.surplus=true"
CROWD = (
    *("data.partition=iid", "data.clients=18", "data.folds=1", "cohort.size=12", "cohort.wait_for=12"),
    *("secure_aggregation.max_clients=none", "privacy.units=18", "privacy.survivors=10"),
)


def simulated(study):
    seen: list[events.Event] = []
    return fedlearn.simulate(study, emit=seen.append), seen


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("strategy.name=scaffold",),
        ("strategy.name=fedadam", "cohort.size=3", "rounds=5"),
        CROWD,
        (SURPLUS, *CROWD),
        (SURPLUS, "secure_aggregation.profile=malicious", *CROWD),
        (SURPLUS, "cohort.size=3", "rounds=5", "secure_aggregation.max_clients=4"),
    ],
    ids=[
        "fedavg",
        "scaffold",
        "three of four",
        "twelve of eighteen",
        "surplus",
        "surplus, agreed upon",
        "surplus below its level",
    ],
)
def test_with_every_mask_and_without_one_gives_the_same_bits(overrides):
    study = noisy_study("task.options={hidden=6}", *overrides)
    exact, _ = simulated(study.with_overrides(["secure_aggregation.mode=exact"]))
    equivalent, _ = simulated(study.with_overrides(["secure_aggregation.mode=equivalent"]))
    assert arrays.digest(exact.weights) == arrays.digest(equivalent.weights)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_every_size_of_a_round_gives_the_same_bits_in_both_modes(data):
    size = data.draw(st.integers(3, 9), "clients of a round")
    most = data.draw(st.integers(size, 10), "the most that the plan has room for")
    survivors = data.draw(st.integers(max(3, 2 * most // 3), size), "survivors") if size > 2 * most // 3 else size
    study = noisy_study(
        *("task.options={hidden=6}", "rounds=2", f"seed={data.draw(st.integers(0, 999), 'seed')}"),
        *(*CROWD, f"cohort.size={size}", f"cohort.wait_for={size}", f"secure_aggregation.max_clients={most}"),
        *(f"privacy.survivors={survivors}", f"privacy.surplus={str(data.draw(st.booleans(), 'surplus')).lower()}"),
    )
    exact, equivalent = (
        fedlearn.simulate(study.with_overrides([f"secure_aggregation.mode={mode}"])) for mode in ("exact", "equivalent")
    )
    assert arrays.digest(exact.weights) == arrays.digest(equivalent.weights)


@pytest.mark.parametrize("more", [(), (SURPLUS,)], ids=["", "surplus"])
def test_vanishing_clients_leave_noise_or_void_the_round_in_both_modes(more):
    study = noisy_study("task.options={hidden=6}", *CROWD, "environment.dropout=0.15", "rounds=6", *more)
    exact, seen = simulated(study.with_overrides(["secure_aggregation.mode=exact"]))
    equivalent, other = simulated(study.with_overrides(["secure_aggregation.mode=equivalent"]))
    assert arrays.digest(exact.weights) == arrays.digest(equivalent.weights)
    kinds = (events.RoundVoid, events.ClientDropped, events.RoundFinished)
    assert [type(e) for e in seen if isinstance(e, kinds)] == [type(e) for e in other if isinstance(e, kinds)]
    assert any(isinstance(event, events.ClientDropped) for event in seen)
    assert all(event.clients >= 10 for event in seen if isinstance(event, events.RoundFinished))


@pytest.mark.parametrize("more", [(), (SURPLUS,)], ids=["", "surplus"])
@pytest.mark.parametrize("dropout", [False, True])
def test_the_open_sum_has_the_plans_noise_whoever_vanishes(dropout, more, monkeypatch):
    """The environment's clients that vanish take their noise with them; what is left is what the plan says of so many."""
    vanishing = ("environment.dropout=0.1",) if dropout else ()
    study = noisy_study("rounds=12", "task.options={hidden=150}", *CROWD, *vanishing, "train.lr=0.001", *more)
    models, fit = [], SequentialBackend.fit

    def watched(backend, work):
        if work.attempt == 1:
            models.append(work.model)
        return fit(backend, work)

    monkeypatch.setattr(SequentialBackend, "fit", watched)
    seen: list[events.Event] = []
    models.append(fedlearn.simulate(study, backend="sequential", emit=seen.append).weights)
    clients = [event.clients for event in seen if isinstance(event, events.RoundFinished)]
    assert dropout == (min(clients) < 12)
    length = sum(array.size for array in models[0].values())
    assert_noise(steps_of(models), [noise_std(study, length, n) for n in clients])


def test_an_audit_says_that_it_cannot_look_at_this_noise():
    study = noisy_study()
    task = load_task(study.task.name, study.task.options)
    given = Ready(study, build_population(study, task), load_app().strategy("fedavg", {}), Setting())
    with pytest.raises(UnsupportedError, match="under masks"):
        audit(given)
