"""Edge cases of single rules that neither contract nor oracle meets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlearn.aggregation.stack import UpdateStack
from fedlearn.arrays import specs_of
from fedlearn.errors import UpdateError
from fedlearn.learning.strategy import MAIN, ClientStart, ServerState, Strategy, Trained, apply_step, per_client
from fedlearn.learning.update import DELTA, Aggregate, Weighting
from strategies import REGISTRY, create
from strategies.scaffold import CONTROL


def _start(**state: float) -> ClientStart:
    shared = {"w": torch.tensor([0.5, -0.5], dtype=torch.float64)}
    memory = {"w": torch.full((2,), state["own"], dtype=torch.float64)} if state else {}
    return ClientStart({"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}, shared, memory)


def test_scaffold_without_a_step_leaves_the_control_variate() -> None:
    start = _start(own=3.0)
    finish = create("scaffold").client_finish(start, {MAIN: Trained(dict(start.model), 0, 0.1)})
    assert not finish.releases[DELTA]["w"].any()
    assert not finish.releases[CONTROL]["w"].any()
    assert finish.state["w"].tolist() == [3.0, 3.0]


def test_scaffolds_control_variate_is_the_mean_gradient_after_plain_sgd() -> None:
    """c_i+ = mean of g(y) over the steps: the corrections cancel (paper, equation 4, option II)."""
    start = _start(own=3.0)
    (only,) = create("scaffold").client_passes(start)
    rng = np.random.default_rng(0)
    gradients = [torch.from_numpy(rng.normal(size=2)) for _ in range(5)]
    weights = dict(only.initial)
    for gradient in gradients:
        weights = {"w": weights["w"] - 0.05 * only.direction({"w": gradient}, weights)["w"]}
    finish = create("scaffold").client_finish(start, {MAIN: Trained(weights, 5, 0.05)})
    assert torch.allclose(finish.state["w"], torch.stack(gradients).mean(dim=0), atol=1e-12)
    assert torch.allclose(finish.releases[CONTROL]["w"], finish.state["w"] - 3.0, atol=1e-12)


def test_scaffolds_server_control_moves_by_the_share_of_clients() -> None:
    model = {"w": np.zeros(1, np.float32)}
    scaffold = create("scaffold", {"server_lr": 0.5})
    means = {DELTA: {"w": np.array([2.0])}, CONTROL: {"w": np.array([4.0])}}
    after = scaffold.server_step(scaffold.server_init(model), Aggregate(means, clients=3, population=12, examples=99))
    assert (float(after.model["w"][0]), float(after.shared["w"][0])) == (1.0, 1.0)


def test_numbers_for_each_client_keep_the_weights_precision() -> None:
    like = torch.zeros(3, 2, 2, dtype=torch.float64)
    shaped = per_client(torch.tensor([1, 2, 3]), like)
    assert isinstance(shaped, torch.Tensor)
    assert (shaped.shape, shaped.dtype) == ((3, 1, 1), torch.float64)
    assert per_client(5, like) == 5


def test_ditto_starts_from_the_global_weights_and_then_from_its_own() -> None:
    ditto = create("ditto", {"lam": 2.0})
    first, later = _start(), _start(own=7.0)
    for start, begins in ((first, [1.0, 2.0]), (later, [7.0, 7.0])):
        released, personal = ditto.client_passes(start)
        assert (released.name, released.direction) == (MAIN, None)
        assert released.initial["w"].tolist() == [1.0, 2.0]
        assert personal.initial["w"].tolist() == begins
        along = personal.direction({"w": torch.zeros(2, dtype=torch.float64)}, {"w": torch.tensor([4.0, 4.0])})
        assert along["w"].tolist() == [6.0, 4.0]  # 2 (w - global), not 2 (w - own)
        assert ditto.client_model(start)["w"].tolist() == begins
    ended = ditto.client_finish(
        later,
        {MAIN: Trained({"w": torch.tensor([2.0, 2.0])}, 1, 0.1), personal.name: Trained({"w": torch.ones(2)}, 1, 0.1)},
    )
    assert list(ended.releases) == [DELTA]
    assert ended.releases[DELTA]["w"].tolist() == [1.0, 0.0]
    assert ended.state["w"].tolist() == [1.0, 1.0]


def test_fedprox_pulls_towards_what_was_broadcast() -> None:
    (only,) = create("fedprox", {"mu": 0.5}).client_passes(_start())
    along = only.direction({"w": torch.ones(2)}, {"w": torch.tensor([3.0, 2.0])})
    assert along["w"].tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [
        ("fedavg", {}, 1),
        ("median", {}, 1),
        ("trimmed_mean", {"beta": 0.0}, 1),
        ("trimmed_mean", {"beta": 0.1}, 10),
        ("trimmed_mean", {"beta": 0.29}, 4),
        ("trimmed_mean", {"beta": 0.3}, 4),
        ("krum", {"byzantine": 0}, 3),
        ("krum", {"byzantine": 2}, 7),
        ("multi_krum", {"byzantine": 2}, 7),
        ("multi_krum", {"byzantine": 2, "select": 6}, 8),
    ],
)
def test_fewest_clients(name, options, least) -> None:
    strategy = create(name, options)
    assert strategy.min_clients == least
    if strategy.linear:
        return
    with UpdateStack({"w": specs_of({"w": np.zeros(2)})["w"]}) as stack:
        for k in range(least):
            if k == least - 1 and k > 0:
                with pytest.raises(UpdateError, match=f"got {k} updates, expected at least {least}"):
                    strategy.aggregate_stack(stack)
            stack.add(str(k), {"w": np.array([k, -k], dtype=float)}, 1)
        assert strategy.aggregate_stack(stack)["w"].shape == (2,)


def test_robust_strategies_give_each_client_one_vote() -> None:
    robust = {name for name, kind in REGISTRY.items() if not kind.linear}
    assert robust == {"median", "trimmed_mean", "krum", "multi_krum"}
    for name in robust | {"scaffold"}:
        assert all(release.weighting is Weighting.UNIFORM for release in REGISTRY[name].releases)


def test_a_linear_strategy_has_no_stack() -> None:
    with UpdateStack({}) as stack, pytest.raises(TypeError, match="summed, not stacked"):
        create("fedavg").aggregate_stack(stack)


def test_only_scaffold_needs_plain_sgd_and_nothing_keeps_raw_gradients() -> None:
    assert [name for name, kind in REGISTRY.items() if kind.plain_sgd] == ["scaffold"]
    assert not any(kind.raw_gradient_state for kind in REGISTRY.values())
    assert {name for name, kind in REGISTRY.items() if kind.stateful} == {"scaffold", "ditto"}


def test_integer_parameters_are_rounded_half_to_even() -> None:
    model = {"count": np.array([10, 10, 10, -10])}
    after = apply_step(model, {"count": np.array([0.5, 1.5, 0.9, -0.9])})
    assert after["count"].tolist() == [10, 12, 11, -11]
    assert after["count"].dtype == model["count"].dtype


def test_the_first_moments_are_the_papers() -> None:
    model = {"w": np.zeros(2, np.float32)}
    for name in ("fedadam", "fedyogi", "fedadagrad"):
        state = create(name, {"tau": 0.25}).server_init(model)
        assert state.memory["v:w"].tolist() == [0.0625, 0.0625]
        assert state.memory["m:w"].tolist() == [0.0, 0.0]
        assert create(name, {"v0": 3}).server_init(model).memory["v:w"].tolist() == [3.0, 3.0]


def test_a_server_state_shows_no_weights() -> None:
    strategy: Strategy = create("fedadam")
    state: ServerState = strategy.server_init({"w": np.full(1, 123.456)})
    assert "123.456" not in repr(state)
