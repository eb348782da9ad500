"""Our rules on the toy give what the papers' algorithms give, written down a second time."""

from __future__ import annotations

import numpy as np
import pytest

import strategies
from tests.contract import oracles
from tests.contract.toy import Federation, flat, make_toy, start_model

EVERYBODY = [list(range(7))] * 6
PARTIAL = [
    [0, 1, 2, 3, 4, 5],
    [6, 2, 4, 0, 1],
    [5, 3, 1, 6, 2, 0],
    [4, 2, 0, 5, 6, 3, 1],
    [0, 6, 1, 5, 2],
    [2, 3, 4, 5, 6],
]

CASES = [
    ("fedavg", {}),
    ("fedprox", {"mu": 0.3}),
    ("fedprox", {"mu": 0}),
    ("fedavgm", {"server_lr": 0.5, "momentum": 0.8}),
    ("fedadam", {"server_lr": 0.05, "beta1": 0.8, "beta2": 0.95, "tau": 1e-2}),
    ("fedadam", {"server_lr": 0.05, "beta1": 0.8, "beta2": 0.95, "tau": 1e-2, "v0": 0.5}),
    ("fedyogi", {"server_lr": 0.05, "beta1": 0.8, "beta2": 0.9, "tau": 1e-2}),
    ("fedadagrad", {"server_lr": 0.2, "beta1": 0.0, "tau": 1e-2}),
    ("fedadagrad", {"server_lr": 0.2, "beta1": 0.7, "tau": 1e-2}),
    ("scaffold", {"server_lr": 0.7}),
    ("ditto", {"lam": 0.4}),
    ("median", {}),
    ("trimmed_mean", {"beta": 0.2}),
    ("trimmed_mean", {"beta": 0.4}),
    ("krum", {"byzantine": 1}),
    ("multi_krum", {"byzantine": 1}),
    ("multi_krum", {"byzantine": 1, "select": 2}),
]


@pytest.mark.parametrize("rounds", [EVERYBODY, PARTIAL], ids=["everybody", "partial"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
def test_several_rounds_equal_the_oracle(name, options, dtype, tolerance, rounds) -> None:
    toy = make_toy()
    ours = Federation.of(strategies.create(name, options), toy, dtype)
    clients = oracles.Clients(toy.x, toy.y, ours.steps, ours.lr)
    expected = getattr(oracles, name)(clients, flat(start_model(dtype=dtype)), rounds, **options)
    for cohort in rounds:
        ours.round(cohort)
    if name in {"scaffold", "ditto"}:
        expected, *rest = expected
        _check_memory(name, ours, rest, tolerance)
    _close(ours.state.model, expected, tolerance)
    assert np.linalg.norm(expected - flat(start_model(dtype=dtype))) > 0.1  # something was learnt
    assert ours.state.round == len(rounds)


def _check_memory(name: str, ours: Federation, rest: list, tolerance: float) -> None:
    if name == "scaffold":
        control, own = rest
        # A float32 difference divided by K eta_l keeps about 1e-7 / 0.3 of the weights' size.
        _close(ours.state.shared, control, tolerance * 10)
        for k, vector in enumerate(own):
            _close(ours.clients[k], vector, tolerance * 10)
    else:
        (personal,) = rest
        assert len(personal) == len(ours.clients)
        for k, vector in personal.items():
            _close(ours.clients[k], vector, tolerance)
            model = {n: t.numpy() for n, t in ours.strategy.client_model(ours.client_start(k)).items()}
            assert np.array_equal(flat(model), flat(ours.clients[k]))


def _close(got, expected, tolerance: float) -> None:
    assert np.linalg.norm(flat(got) - expected) <= tolerance * max(1.0, np.linalg.norm(expected))


def test_every_strategy_has_an_oracle() -> None:
    assert {name for name, _ in CASES} == set(strategies.names())


def test_scaffolds_control_variate_is_the_mean_of_the_clients() -> None:
    toy = make_toy()
    ours = Federation.of(strategies.create("scaffold", {}), toy)
    for cohort in PARTIAL:
        ours.round(cohort)
        of_clients = [flat(c) if c else np.zeros(4) for c in ours.clients.values()]
        assert np.allclose(flat(ours.state.shared), np.mean(of_clients, axis=0), atol=1e-11)


def test_scaffold_reaches_the_optimum_that_fedavg_misses() -> None:
    """With unequal steps and unequal clients FedAvg drifts; the control variates take the drift away (paper, section 4)."""
    toy = make_toy()
    fixed, drifting = (Federation.of(strategies.create(n), toy, lr=0.05) for n in ("scaffold", "fedavg"))
    for _ in range(400):
        for federation in (fixed, drifting):
            federation.round(range(7))
    optimum = _uniform_optimum(toy)
    assert np.linalg.norm(flat(fixed.state.model) - optimum) < 1e-6
    assert np.linalg.norm(flat(drifting.state.model) - optimum) > 1e-2


def _uniform_optimum(toy) -> np.ndarray:
    a, b = np.zeros((4, 4)), np.zeros(4)
    for x, y in zip(toy.x, toy.y, strict=True):
        ones = np.hstack([x, np.ones((len(x), 1))])
        a, b = a + ones.T @ ones / len(y), b + ones.T @ y / len(y)
    return np.linalg.solve(a, b)


@pytest.mark.parametrize("name", ["median", "trimmed_mean", "krum", "multi_krum"])
def test_one_attacker_among_seven_is_withstood(name) -> None:
    """A client with poisoned labels moves FedAvg far away, and a robust strategy no further than honest clients disagree."""
    toy = make_toy(seed=3)
    poisoned = type(toy)(toy.x, (*toy.y[:-1], toy.y[-1] + 1e4))
    honest, robust, plain = (
        Federation.of(strategies.create(n), t) for n, t in ((name, toy), (name, poisoned), ("fedavg", poisoned))
    )
    for federation in (honest, robust, plain):
        for _ in range(5):
            federation.round(range(7))
    moved = np.linalg.norm(flat(robust.state.model) - flat(honest.state.model))
    assert moved < 3
    assert np.linalg.norm(flat(plain.state.model) - flat(honest.state.model)) > 1000
