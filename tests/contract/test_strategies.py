"""The contract, for every strategy in the registry. One that is not listed here fails the last test."""

from __future__ import annotations

import strategies
from strategies import create
from tests.contract.strategy_contract import StrategyContract


class TestFedAvg(StrategyContract):
    strategy = create("fedavg")


class TestFedProx(StrategyContract):
    strategy = create("fedprox", {"mu": 0.3})


class TestFedAvgM(StrategyContract):
    strategy = create("fedavgm", {"momentum": 0.5})
    at_rest = False


class TestFedAdam(StrategyContract):
    strategy = create("fedadam", {"server_lr": 0.1})
    at_rest = False


class TestFedYogi(StrategyContract):
    strategy = create("fedyogi", {"server_lr": 0.1, "v0": 0.0})
    at_rest = False


class TestFedAdagrad(StrategyContract):
    strategy = create("fedadagrad")


class TestFedAdagradWithMomentum(StrategyContract):
    strategy = create("fedadagrad", {"beta1": 0.5})
    at_rest = False


class TestScaffold(StrategyContract):
    strategy = create("scaffold", {"server_lr": 0.7})


class TestDitto(StrategyContract):
    strategy = create("ditto", {"lam": 0.4})


class TestMedian(StrategyContract):
    strategy = create("median")


class TestTrimmedMean(StrategyContract):
    strategy = create("trimmed_mean", {"beta": 0.2})


class TestKrum(StrategyContract):
    strategy = create("krum", {"byzantine": 1})


class TestMultiKrum(StrategyContract):
    strategy = create("multi_krum", {"byzantine": 1, "select": 3})


def test_every_strategy_is_held_to_the_contract() -> None:
    held = [kind.strategy.name for kind in StrategyContract.__subclasses__()]
    assert set(held) == set(strategies.names())
