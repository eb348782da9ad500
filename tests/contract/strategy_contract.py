"""What every strategy promises. A strategy's test class inherits this one and says what it tests."""

from __future__ import annotations

import copy
import json
from dataclasses import FrozenInstanceError, fields
from typing import ClassVar

import numpy as np
import pytest
import torch

import strategies
from fedlearn.aggregation.linear import IntegerSum
from fedlearn.arrays import Arrays, digest, from_bytes, specs_of, to_bytes
from fedlearn.errors import UpdateError
from fedlearn.learning.collect import collector_for
from fedlearn.learning.strategy import MAIN, ClientStart, ServerState, Strategy, Trained
from fedlearn.learning.update import DELTA, Aggregate, Update, Weighting
from tests.contract.toy import Federation, arrays, checkpointed, make_toy, tensors

MODEL = {"conv.weight": (2, 3, 2), "conv.bias": (3,), "scale": (), "head": (4, 1)}
CLIENTS = 7


def model_of(seed: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape)).astype(dtype) for name, shape in MODEL.items()}


def state_of(strategy: Strategy, dtype: str = "float32") -> ServerState:
    """A state in the middle of a run: after two rounds of random updates."""
    state = strategy.server_init(model_of(0, dtype))
    for number in (1, 2):
        state = strategy.server_step(state, aggregate_of(strategy, state.model, updates_of(strategy, number, dtype)))
    return state


def updates_of(strategy: Strategy, seed: int, dtype: str = "float32") -> dict[str, Update]:
    return {
        f"client-{k}": Update(
            {r.name: model_of(1000 * seed + 10 * k + i, dtype) for i, r in enumerate(strategy.releases)},
            examples=3 + 5 * k,
        )
        for k in range(CLIENTS)
    }


def aggregate_of(strategy: Strategy, model: Arrays, updates: dict[str, Update]) -> Aggregate:
    collector = collector_for(strategy, model)
    try:
        for client, update in updates.items():
            collector.add(client, update)
        return collector.aggregate(population=CLIENTS + 3)
    finally:
        collector.close()


def prints(state: ServerState) -> tuple[str, str, str, int]:
    """A state to the bit."""
    return digest(state.model), digest(state.shared), digest(state.memory), state.round


def frozen(mapping: Arrays) -> Arrays:
    for array in mapping.values():
        array.flags.writeable = False
    return mapping


class StrategyContract:
    strategy: ClassVar[Strategy]
    at_rest: ClassVar[bool] = True
    """Zero updates leave the model as it is in the middle of a run too, not only at its start."""

    # The server rule.

    def test_the_server_step_is_pure(self) -> None:
        state = state_of(self.strategy)
        aggregate = aggregate_of(self.strategy, state.model, updates_of(self.strategy, 5))
        for mapping in (state.model, state.shared, state.memory, *aggregate.means.values()):
            frozen(mapping)
        before = prints(state), {name: digest(mean) for name, mean in aggregate.means.items()}
        once = self.strategy.server_step(state, aggregate)
        again = self.strategy.server_step(copy.deepcopy(state), copy.deepcopy(aggregate))
        assert prints(once) == prints(again)
        assert (prints(state), {name: digest(mean) for name, mean in aggregate.means.items()}) == before
        assert prints(once)[0] != before[0][0]

    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
    def test_the_server_keeps_shapes_and_dtypes(self, dtype: str) -> None:
        first = self.strategy.server_init(model_of(0, dtype))
        later = state_of(self.strategy, dtype)
        assert (first.round, later.round) == (0, 2)
        assert specs_of(first.model) == specs_of(later.model) == specs_of(model_of(0, dtype))
        assert list(first.model) == list(later.model)
        assert specs_of(first.shared) == specs_of(later.shared)
        assert specs_of(first.memory) == specs_of(later.memory)
        assert all(str(array.dtype) == "float64" for array in later.memory.values())
        assert digest(first.model) == digest(model_of(0, dtype))

    def test_no_order_of_clients_changes_a_bit(self) -> None:
        state, updates = state_of(self.strategy), updates_of(self.strategy, 5)
        expected = prints(self.strategy.server_step(state, aggregate_of(self.strategy, state.model, updates)))
        for seed in range(4):
            order = np.random.default_rng(seed).permutation(list(updates))
            shuffled = {str(client): updates[str(client)] for client in order}
            got = self.strategy.server_step(state, aggregate_of(self.strategy, state.model, shuffled))
            assert prints(got) == expected

    def test_partial_sums_of_a_linear_strategy_combine(self) -> None:
        state, updates = state_of(self.strategy), updates_of(self.strategy, 5)
        if not self.strategy.linear:
            with pytest.raises(UpdateError):  # too few for the promise, or a stack and no sum
                self._too_few()
            return
        expected = aggregate_of(self.strategy, state.model, updates)
        means = {}
        for release in self.strategy.releases:
            parts = [IntegerSum(specs_of(state.model)) for _ in range(3)]
            for k, update in enumerate(updates.values()):
                weight = update.examples if release.weighting is Weighting.EXAMPLES else 1
                parts[k % 3].add(update.private[release.name], weight)
            parts[2].merge(parts[0])
            parts[2].merge(parts[1])
            means[release.name] = parts[2].mean()
        assert {n: digest(m) for n, m in means.items()} == {n: digest(m) for n, m in expected.means.items()}

    def _too_few(self) -> None:
        fewer = dict(list(updates_of(self.strategy, 5).items())[: self.strategy.min_clients - 1])
        aggregate_of(self.strategy, model_of(0), fewer)

    def test_zero_updates_are_a_fixed_point(self) -> None:
        zeros = {
            client: Update({n: {k: np.zeros_like(a) for k, a in r.items()} for n, r in u.private.items()}, u.examples)
            for client, u in updates_of(self.strategy, 5).items()
        }
        first = self.strategy.server_init(model_of(0))
        after = self.strategy.server_step(first, aggregate_of(self.strategy, first.model, zeros))
        assert digest(after.model) == digest(first.model)
        assert digest(after.shared) == digest(first.shared)
        middle = state_of(self.strategy)
        after = self.strategy.server_step(middle, aggregate_of(self.strategy, middle.model, zeros))
        assert (digest(after.model) == digest(middle.model)) is self.at_rest

    def test_a_model_in_another_order_is_the_same_model(self) -> None:
        state, updates = state_of(self.strategy), updates_of(self.strategy, 5)
        turned = checkpointed(state, lambda mapping: dict(reversed(list(mapping.items()))))
        expected = self.strategy.server_step(state, aggregate_of(self.strategy, state.model, updates))
        got = self.strategy.server_step(turned, aggregate_of(self.strategy, turned.model, updates))
        assert prints(got) == prints(expected)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_an_update_that_is_not_finite_is_refused_whole(self, bad: float) -> None:
        state, updates = state_of(self.strategy), updates_of(self.strategy, 5)
        expected = aggregate_of(self.strategy, state.model, updates)
        poisoned = copy.deepcopy(updates["client-3"])
        dict(poisoned.private)[self.strategy.releases[-1].name]["scale"][...] = bad
        collector = collector_for(self.strategy, state.model)
        for client, update in updates.items():
            if client == "client-3":
                with pytest.raises(UpdateError, match="not finite"):
                    collector.add(client, poisoned)
            collector.add(client, update)
        got = collector.aggregate(population=CLIENTS + 3)
        collector.close()
        assert {n: digest(m) for n, m in got.means.items()} == {n: digest(m) for n, m in expected.means.items()}

    def test_too_few_updates_are_refused(self) -> None:
        assert self.strategy.min_clients >= 1
        with pytest.raises(UpdateError):
            self._too_few()
        enough = dict(list(updates_of(self.strategy, 5).items())[: self.strategy.min_clients])
        aggregate_of(self.strategy, model_of(0), enough)

    # The client rule.

    def test_the_client_rule_is_pure_and_releases_what_it_declares(self) -> None:
        for round_number in (0, 1):  # without memory, and with
            start = self._start(round_number)
            before = [arrays(copy.deepcopy(part)) for part in (start.model, start.shared, start.state)]
            runs = [self._finish(start) for _ in range(2)]
            for part, old in zip((start.model, start.shared, start.state), before, strict=True):
                assert digest(arrays(part)) == digest(old)
            (releases, state), (releases_again, state_again) = runs
            assert {n: digest(r) for n, r in releases.items()} == {n: digest(r) for n, r in releases_again.items()}
            assert digest(state) == digest(state_again)
            assert list(releases) == [r.name for r in self.strategy.releases]
            assert self.strategy.releases[0].name == DELTA
            assert all(specs_of(r) == specs_of(model_of(0)) for r in releases.values())
            assert bool(state) is self.strategy.stateful
            assert all(str(a.dtype) == "float32" for a in state.values())
            model = arrays(self.strategy.client_model(start))
            assert specs_of(model) == specs_of(model_of(0))

    def test_one_pass_is_released(self) -> None:
        names = [one.name for one in self.strategy.client_passes(self._start(0))]
        assert names.count(MAIN) == 1
        assert len(set(names)) == len(names)

    def test_the_delta_is_local_minus_global(self) -> None:
        start = self._start(1)
        releases, _ = self._finish(start)
        assert np.array_equal(releases[DELTA]["head"], model_of(77)["head"] - model_of(20)["head"])

    @pytest.mark.parametrize("stacked_model", [False, True])
    def test_many_clients_at_once_are_one_by_one(self, stacked_model: bool) -> None:
        starts = [self._start(1, client=k) for k in range(4)]
        many = ClientStart(
            _stack([s.model for s in starts]) if stacked_model else starts[0].model,
            _stack([s.shared for s in starts]) if stacked_model else starts[0].shared,
            _stack([s.state for s in starts]),
        )
        gradients, weights = (
            [tensors(model_of(50 + k)) for k in range(4)],
            [tensors(model_of(60 + k)) for k in range(4)],
        )
        steps, lr = [2, 5, 1, 0], 0.1
        singles = [self.strategy.client_passes(s) for s in starts]
        together = self.strategy.client_passes(many)
        for position, one in enumerate(together):
            each = [s[position] for s in singles]
            assert {one.name} == {e.name for e in each}
            _same(_spread(one.initial, 4), _stack([e.initial for e in each]))
            assert (one.direction is None) == (each[0].direction is None)
            if one.direction is not None:
                got = one.direction(_stack(gradients), _stack(weights))
                _same(got, _stack([e.direction(g, w) for e, g, w in zip(each, gradients, weights, strict=True)]))
        finished = [
            self.strategy.client_finish(s, {e.name: Trained(weights[k], steps[k], lr) for e in singles[k]})
            for k, s in enumerate(starts)
        ]
        ended = self.strategy.client_finish(
            many, {e.name: Trained(_stack(weights), torch.tensor(steps), torch.full((4,), lr)) for e in together}
        )
        assert list(ended.releases) == list(finished[0].releases)
        for name, release in ended.releases.items():
            _same(release, _stack([f.releases[name] for f in finished]), exact=False)
        _same(ended.state, _stack([f.state for f in finished]), exact=False)
        _same(_spread(self.strategy.client_model(many), 4), _stack([self.strategy.client_model(s) for s in starts]))

    def _start(self, round_number: int, client: int = 0) -> ClientStart:
        """A client's start in its first round, or in a later one."""
        server = self.strategy.server_init(model_of(20))
        if round_number == 0:
            return ClientStart(tensors(server.model), tensors(server.shared), {})
        shared = {name: model_of(30)[name] for name in server.shared}
        first = ClientStart(tensors(model_of(20)), tensors(shared), {})
        trained = {p.name: Trained(tensors(model_of(40 + client)), 3, 0.1) for p in self.strategy.client_passes(first)}
        return ClientStart(first.model, first.shared, self.strategy.client_finish(first, trained).state)

    def _finish(self, start: ClientStart) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
        trained = {}
        for one in self.strategy.client_passes(start):
            weights = {name: w.clone() for name, w in one.initial.items()}
            if one.direction is not None:
                one.direction(tensors(model_of(76)), weights)
            trained[one.name] = Trained(tensors(model_of(77)), 3, 0.1)
        finish = self.strategy.client_finish(start, trained)
        return {name: arrays(release) for name, release in finish.releases.items()}, arrays(finish.state)

    # Both sides, over rounds.

    def test_bytes_between_all_rounds_change_nothing(self) -> None:
        toy = make_toy()
        straight, stored = (Federation.of(self.strategy, toy, "float32") for _ in range(2))
        for cohort in ([0, 1, 2, 3, 4, 5, 6], [6, 4, 2, 0, 1], [1, 2, 3, 5, 6, 0]):
            straight.round(cohort)
            stored.round(cohort)
            stored.state = checkpointed(stored.state, lambda mapping: dict(from_bytes(to_bytes(mapping))))
            stored.clients = {k: dict(from_bytes(to_bytes(memory))) for k, memory in stored.clients.items()}
            assert prints(stored.state) == prints(straight.state)
            assert [digest(m) for m in stored.clients.values()] == [digest(m) for m in straight.clients.values()]

    # Options.

    def test_options_go_through_json(self) -> None:
        text = json.dumps(dict(self.strategy.options))
        again = strategies.create(self.strategy.name, json.loads(text))
        assert again == self.strategy
        assert hash(again) == hash(self.strategy)

    def test_options_cannot_be_changed(self) -> None:
        for one in fields(self.strategy):
            with pytest.raises(FrozenInstanceError):
                setattr(self.strategy, one.name, 1)

    def test_it_names_its_paper(self) -> None:
        assert any(character.isdigit() for character in self.strategy.paper)
        assert type(self.strategy).__doc__


def _stack(mappings: list) -> dict[str, torch.Tensor]:
    return {name: torch.stack([m[name] for m in mappings]) for name in mappings[0]}


def _spread(mapping, count: int) -> dict[str, torch.Tensor]:
    """The same for everybody, or each its own: with the clients' dimension either way."""
    return {
        name: t if t.shape == (count, *MODEL[name]) else t.expand(count, *MODEL[name]) for name, t in mapping.items()
    }


def _same(got, expected, *, exact: bool = True) -> None:
    assert list(got) == list(expected)
    for name, tensor in got.items():
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(tensor, expected[name], **tolerance)
