"""The same replies into Flower's own strategies and into ours: the same model, or exactly the stated difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy.multikrum import compute_distances
from flwr.supercore.task_identity import TaskIdentity

import strategies
from fedlearn.aggregation.robust import squared_distances
from fedlearn.aggregation.stack import UpdateStack
from fedlearn.arrays import Arrays, specs_of
from fedlearn.errors import UpdateError
from fedlearn.learning.strategy import ServerState, Strategy
from fedlearn.learning.update import DELTA
from tests.contract.toy import combine

Replies = list[tuple[dict[str, np.ndarray], int]]

SHAPES = {"weight": (4, 3), "bias": (3,), "scale": ()}


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    """Message() asks for the identity of the running task, which a SuperLink would have set."""
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    yield
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


class NoGrid:
    """As much of a Grid as `configure_train` asks for."""

    def __init__(self, nodes: int) -> None:
        self._nodes = list(range(1, nodes + 1))

    def get_node_ids(self) -> list[int]:
        return self._nodes


def model(seed: int = 0, scale: float = 1.0, dtype: str = "float64") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (scale * np.asarray(rng.normal(size=shape))).astype(dtype) for name, shape in SHAPES.items()}


def replies_to(weights: Arrays, round_number: int, clients: int = 7, spread: float = 0.3) -> Replies:
    """What clients answer: weights near the ones they got, and their number of examples."""
    return [
        (
            {
                n: (w + a).astype(w.dtype)
                for (n, w), a in zip(weights.items(), _noise(round_number, k, spread), strict=True)
            },
            4 + 3 * k,
        )
        for k in range(clients)
    ]


def _noise(round_number: int, client: int, spread: float) -> Sequence[np.ndarray]:
    rng = np.random.default_rng([round_number, client])
    return [0.1 + spread * rng.normal(size=shape) for shape in SHAPES.values()]


def record(weights: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(w)) for name, w in weights.items()})


def flower_step(theirs: flower.FedAvg, round_number: int, weights: Arrays, replies: Replies) -> dict[str, np.ndarray]:
    """One round of Flower's strategy, as its `start` drives it."""
    asked = theirs.configure_train(round_number, record(weights), ConfigRecord(), NoGrid(len(replies)))
    messages = [
        Message(
            RecordDict({"arrays": record(arrays), "metrics": MetricRecord({"num-examples": examples})}),
            dst_node_id=k + 1,
            message_type=MessageType.TRAIN,
        )
        for k, (arrays, examples) in enumerate(replies)
    ]
    assert len(list(asked)) == len(replies)
    got, _ = theirs.aggregate_train(round_number, messages)
    assert got is not None
    return {name: array.numpy() for name, array in got.items()}


def our_step(ours: Strategy, state: ServerState, replies: Replies) -> ServerState:
    """One round of ours on the same replies: the differences are what a client of ours would have released."""
    releases = {
        k: {DELTA: {n: (arrays[n] - state.model[n]).astype(state.model[n].dtype) for n in state.model}}
        for k, (arrays, _) in enumerate(replies)
    }
    examples = {k: count for k, (_, count) in enumerate(replies)}
    return ours.server_step(state, combine(ours, state.model, releases, examples, population=len(replies)))


def close(got: Arrays, expected: Arrays, tolerance: float) -> bool:
    return all(
        np.linalg.norm(got[n].astype(float) - expected[n].astype(float))
        <= tolerance * max(1.0, float(np.linalg.norm(expected[n].astype(float))))
        for n in expected
    )


def run_both(
    ours: Strategy, theirs: flower.FedAvg, *, rounds: int = 4, clients: int = 7, dtype: str = "float64"
) -> Iterator[tuple[Arrays, Arrays, Arrays]]:
    """Both from the same model, each on replies near its own weights with the same noise: (before, ours, theirs) by round."""
    state, weights = ours.server_init(model(dtype=dtype)), model(dtype=dtype)
    for number in range(1, rounds + 1):
        before = state.model
        state = our_step(ours, state, replies_to(state.model, number, clients))
        weights = flower_step(theirs, number, weights, replies_to(weights, number, clients))
        yield before, state.model, weights


SAME = [
    ("fedavg", {}, flower.FedAvg()),
    ("fedprox", {"mu": 0.2}, flower.FedProx(proximal_mu=0.2)),
    ("fedavgm", {"server_lr": 0.5, "momentum": 0.8}, flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.8)),
    ("fedavgm", {"server_lr": 0.5, "momentum": 0.0}, flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.0)),
    (
        "fedyogi",
        {"server_lr": 0.05, "beta1": 0.8, "beta2": 0.95, "tau": 1e-2, "v0": 0},
        flower.FedYogi(eta=0.05, beta_1=0.8, beta_2=0.95, tau=1e-2),
    ),
    ("fedadagrad", {"server_lr": 0.05, "tau": 1e-2, "v0": 0}, flower.FedAdagrad(eta=0.05, tau=1e-2)),
    ("median", {}, flower.FedMedian()),
    ("trimmed_mean", {"beta": 0.2}, flower.FedTrimmedAvg(beta=0.2)),
    ("krum", {"byzantine": 1}, flower.Krum(num_malicious_nodes=1)),
    ("krum", {"byzantine": 2}, flower.Krum(num_malicious_nodes=2)),
]


@pytest.mark.parametrize("clients", [7, 8], ids=["odd", "even"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
@pytest.mark.parametrize(("name", "options", "theirs"), SAME, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(SAME)])
def test_the_same_model_as_flowers(name, options, theirs, dtype, tolerance, clients) -> None:
    theirs = _fresh(theirs)
    for before, ours, flowers in run_both(strategies.create(name, options), theirs, clients=clients, dtype=dtype):
        assert close(ours, flowers, tolerance)
        assert not close(ours, before, 1e-3)  # something moved


def _fresh(theirs: flower.FedAvg) -> flower.FedAvg:
    """Flower's strategies keep their moments in themselves, so each test takes a new one with the same settings."""
    again = object.__new__(type(theirs))
    again.__dict__.update(theirs.__dict__)
    return again


# Where Flower does otherwise than the paper: exactly the difference.


def test_flowers_adam_scales_its_steps_by_a_correction_that_is_in_neither_paper() -> None:
    """Theirs is ours with v0 = 0, times sqrt(1 - beta2^(t+1)) / (1 - beta1^(t+1)) in round t = 1, 2, ..."""
    beta1, beta2, options = 0.8, 0.95, {"server_lr": 0.05, "tau": 1e-2, "v0": 0}
    theirs = flower.FedAdam(eta=0.05, beta_1=beta1, beta_2=beta2, tau=1e-2)
    ours = strategies.create("fedadam", {"beta1": beta1, "beta2": beta2, **options})
    steps = []
    state, weights = ours.server_init(model()), model()
    for number in range(1, 5):
        after = our_step(ours, state, replies_to(state.model, number))
        flowers = flower_step(theirs, number, weights, replies_to(weights, number))
        factor = np.sqrt(1 - beta2 ** (number + 1)) / (1 - beta1 ** (number + 1))
        expected = {n: weights[n] + factor * (after.model[n] - state.model[n]) for n in weights}
        assert close(flowers, expected, 1e-9)
        assert not close(flowers, {n: weights[n] + after.model[n] - state.model[n] for n in weights}, 1e-3)
        steps.append(factor)
        state, weights = after, flowers
    assert steps[0] != pytest.approx(np.sqrt(1 - beta2) / (1 - beta1))  # nor is it Adam's own, which has t for t + 1


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("fedyogi", flower.FedYogi(eta=0.05, tau=0.1)), ("fedadagrad", flower.FedAdagrad(eta=0.05, tau=0.1))],
)
def test_flowers_second_moment_starts_at_zero_and_the_papers_at_tau_squared(name, theirs) -> None:
    """The first step is shorter here by (sqrt(v_0) + tau) / (sqrt(v) + tau), with v_0 theirs and v ours after one round."""
    beta1, beta2, tau = (0.9, 0.99, 0.1) if name == "fedyogi" else (0.0, 0.0, 0.1)
    ours = strategies.create(name, {"server_lr": 0.05, "tau": tau})
    ((before, got, flowers),) = run_both(ours, _fresh(theirs), rounds=1)
    for n in before:
        delta = _mean(replies_to(before, 1), n) - before[n]
        squared = delta**2
        v = tau**2 + squared if name == "fedadagrad" else tau**2 - (1 - beta2) * squared * np.sign(tau**2 - squared)
        v_theirs = squared if name == "fedadagrad" else (1 - beta2) * squared
        assert np.allclose(got[n] - before[n], 0.05 * (1 - beta1) * delta / (np.sqrt(v) + tau), atol=1e-10)
        assert np.allclose(flowers[n] - before[n], 0.05 * (1 - beta1) * delta / (np.sqrt(v_theirs) + tau), atol=1e-10)


def _mean(replies: Replies, name: str) -> np.ndarray:
    total = sum(count for _, count in replies)
    return sum(count * arrays[name] for arrays, count in replies) / total


def test_flowers_multi_krum_weights_the_chosen_by_the_examples_that_they_claim() -> None:
    """The same choice, and the plain mean of it here, as in the paper."""
    ours = strategies.create("multi_krum", {"byzantine": 1, "select": 3})
    plain, theirs = (flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3) for _ in range(2))
    weights = model()
    replies = replies_to(weights, 1)
    got = our_step(ours, ours.server_init(weights), replies).model
    assert close(got, flower_step(plain, 1, weights, [(arrays, 10) for arrays, _ in replies]), 1e-9)
    claiming = flower_step(theirs, 1, weights, replies)
    assert not close(got, claiming, 1e-3)
    with UpdateStack(specs_of(weights)) as stack:
        for k, (arrays, _) in enumerate(replies):
            stack.add(str(k), arrays, 1)
        scores = np.sort(squared_distances(stack), axis=1)[:, 1:5].sum(axis=1)
    chosen = [replies[i] for i in np.argsort(scores)[:3]]
    assert all(np.allclose(claiming[n], _mean(chosen, n)) for n in claiming)


def test_flowers_krum_takes_any_number_of_replies() -> None:
    """Four replies cannot outvote one attacker by Krum's own theorem: refused here, answered there."""
    weights = model()
    replies = replies_to(weights, 1, clients=4)
    flower_step(flower.Krum(num_malicious_nodes=1), 1, weights, replies)
    ours = strategies.create("krum", {"byzantine": 1})
    with pytest.raises(UpdateError, match=r"got 4 updates, expected at least 5 \(2 byzantine \+ 3\)"):
        our_step(ours, ours.server_init(weights), replies)


def test_flowers_distances_lose_small_updates_of_large_float32_weights() -> None:
    """||a||^2 + ||b||^2 - 2ab cancels: with weights near 100 and updates near 1e-3 theirs are off by more than 100 %."""
    weights = {n: (100 + w).astype("float32") for n, w in model(dtype="float32").items()}
    replies = replies_to(weights, 1, spread=1e-3)
    exact = np.array(
        [
            [sum(float(((a[n].astype(float) - b[n].astype(float)) ** 2).sum()) for n in a) for b, _ in replies]
            for a, _ in replies
        ]
    )
    with UpdateStack(specs_of(weights)) as stack:
        for k, (arrays, _) in enumerate(replies):
            stack.add(str(k), {n: arrays[n] - weights[n] for n in weights}, 1)
        ours = squared_distances(stack)
    theirs = compute_distances([record(arrays) for arrays, _ in replies])
    pairs = ~np.eye(len(replies), dtype=bool)
    assert np.allclose(ours[pairs], exact[pairs], rtol=1e-9)
    assert np.max(np.abs(theirs[pairs] - exact[pairs]) / exact[pairs]) > 1


def test_flowers_trimmed_mean_counts_in_binary_and_may_trim_nothing() -> None:
    weights = {"w": np.zeros(1)}
    values = np.random.default_rng(0).normal(size=100) ** 3
    replies = [({"w": np.array([value])}, 1) for value in values]
    ordered = np.sort(values)
    ours = strategies.create("trimmed_mean", {"beta": 0.29})
    assert our_step(ours, ours.server_init(weights), replies).model["w"][0] == pytest.approx(ordered[29:71].mean())
    got = flower_step(flower.FedTrimmedAvg(beta=0.29), 1, weights, replies)
    assert got["w"][0] == pytest.approx(ordered[28:72].mean())

    few = replies[:4]
    got = flower_step(flower.FedTrimmedAvg(beta=0.2), 1, weights, few)
    assert got["w"][0] == pytest.approx(values[:4].mean())  # no protection at all
    ours = strategies.create("trimmed_mean", {"beta": 0.2})
    with pytest.raises(UpdateError, match="expected at least 5"):
        our_step(ours, ours.server_init(weights), few)


def test_flowers_momentum_pairs_tensors_by_position() -> None:
    """Replies whose tensors come in another order than the model's: by name here, mixed up there."""
    weights = {"a": np.zeros(2), "b": np.full(2, 10.0)}
    replies = [({"b": np.full(2, 11.0), "a": np.full(2, 1.0)}, 5) for _ in range(3)]
    ours = strategies.create("fedavgm", {"server_lr": 0.5, "momentum": 0.8})
    got = our_step(ours, ours.server_init(weights), replies).model
    assert close(got, {"a": np.full(2, 0.5), "b": np.full(2, 10.5)}, 1e-9)
    theirs = flower_step(flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.8), 1, weights, replies)
    # Their "b" is a's old value moved half way to b's new one.
    assert close(theirs, {"b": np.full(2, 5.5), "a": np.full(2, 5.5)}, 1e-9)


def test_flowers_mean_depends_on_the_order_of_arrival_and_ours_does_not() -> None:
    weights = model(dtype="float32")
    replies = replies_to(weights, 1, clients=20)
    turned = replies[::-1]
    ours = strategies.create("fedavg")
    results = [our_step(ours, ours.server_init(weights), r).model for r in (replies, turned)]
    assert all(np.array_equal(results[0][n], results[1][n]) for n in weights)
    theirs = [flower_step(flower.FedAvg(), 1, weights, r) for r in (replies, turned)]
    assert not all(np.array_equal(theirs[0][n], theirs[1][n]) for n in weights)
