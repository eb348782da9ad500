"""Secure aggregation in simulations: with every mask, without them, and against the plain sum of the same integers."""

from __future__ import annotations

import numpy as np
import pytest

import fedlearn
from fedlearn import arrays, events
from fedlearn.app import load_app
from fedlearn.arrays import specs_of
from fedlearn.data.population import build_population
from fedlearn.errors import FedlearnError, LocalProtocolError, RunFailedError
from fedlearn.learning.backend import Exchange, Failed, Said
from fedlearn.learning.federation import Federation
from fedlearn.learning.local import initial_weights
from fedlearn.learning.vectors import Vectors, rounding_key
from fedlearn.release.journal import DictJournal
from fedlearn.secagg.ring import from_ring
from fedlearn.simulation.masked import secure_rounds
from fedlearn.simulation.sequential import SequentialBackend
from fedlearn.tasks import load_task
from tests.support.secagg_world import sparse_graphs
from tests.support.tiny_task import CLIENTS, tiny_study

MASKED = ("secure_aggregation.enabled=true", "secure_aggregation.max_examples=20", "task.options={hidden=6}")
ORDER = (Exchange.CHECK_IN, Exchange.REVEAL, Exchange.SHARE, Exchange.TRAIN, Exchange.AGREE, Exchange.UNMASK)
AGREED = ("secure_aggregation.profile=malicious",)
TWELVE = (
    *("data.partition=iid", "data.clients=12", "data.folds=1", "cohort.wait_for=12"),
    *("secure_aggregation.adversarial=0", "secure_aggregation.mode=exact"),
)
"""With graphs that are sparse above ten clients: four neighbours each, three of whom open a mask."""
STAGES = [
    *(((), exchange) for exchange in (Exchange.CHECK_IN, Exchange.SHARE, Exchange.TRAIN, Exchange.UNMASK)),
    *((AGREED, exchange) for exchange in (Exchange.TRAIN, Exchange.AGREE, Exchange.UNMASK)),
    *((TWELVE, exchange) for exchange in ORDER),
]
CROWD = ("data.partition=iid", "data.clients=18", "data.folds=1", "cohort.size=12", "cohort.wait_for=12")


def study_of(*overrides: str):
    return tiny_study(*MASKED, *overrides)


def simulated(study, backend="auto"):
    seen: list[events.Event] = []
    return fedlearn.simulate(study, backend=backend, emit=seen.append), seen


class Sim:
    """A simulation in parts: what `simulate` puts together, with a say in what clients answer."""

    def __init__(self, study, journal=None, spoil=None):
        self.study, self.seen = study, []
        self.task = load_task(study.task.name, study.task.options)
        self.strategy = load_app().strategy(study.strategy.name, study.strategy.options)
        self.initial = initial_weights(self.task, study)
        self.backend = SequentialBackend(study, build_population(study, self.task), self.strategy)
        self.journal = journal if journal is not None else DictJournal()
        clients = len(self.backend.clients())
        self.secure = secure_rounds(study, self.strategy, self.initial, self.backend, self.journal, clients)
        if spoil is not None:
            speak = self.secure._backend.secure
            self.secure._backend.secure = lambda *asked: spoil(*asked[:2], speak(*asked))
        self.federation = Federation(
            study,
            study.name,
            self.strategy,
            self.initial,
            self.backend,
            self.journal,
            metric=self.task.card.metric,
            emit=self.seen.append,
            may_join=False,
            rehearsal=True,
            secure=self.secure,
        )

    def run(self):
        return self.federation.run().state.model

    def of(self, kind):
        return [event for event in self.seen if isinstance(event, kind)]


def opened_sums(sim):
    """Runs it; by round, the integers and the total weight that were opened, and the work that they came of."""
    found, opened, train = {}, sim.secure.opened, sim.secure.train
    works = {}

    def watched_train(machine, work):
        works[work.round] = work
        return train(machine, work)

    def watched(sum_, round_, shared):
        found[max(works)] = [*sum_.decoded.integers.tolist(), sum_.decoded.weight]
        return opened(sum_, round_, shared)

    sim.secure.opened, sim.secure.train = watched, watched_train
    sim.run()
    return found, works


def plain_sum(sim, work, clients=CLIENTS):
    """The sum of some clients' rounded integers, by Python's integers."""
    vectors = Vectors.of(sim.study, sim.strategy, specs_of(sim.initial))
    columns = []
    for reply in sim.backend.fit(work):
        if reply.client in clients:
            vector = vectors.encode(reply.update, rounding_key(sim.study, work.round, reply.client))
            columns.append(from_ring(vector, vectors.plan.encoding.ring_bits).tolist())
    return [sum(column) for column in zip(*columns, strict=True)]


def lost(exchange, client, at_round=2):
    """A client that is gone from this exchange on, for one round."""
    order = list(ORDER)

    def spoil(now, work, replies):
        for reply in replies:
            gone = work.round == at_round and order.index(now) >= order.index(exchange)
            yield Failed(client, "pulled the plug") if gone and reply.client == client else reply

    return spoil


@pytest.mark.parametrize("ring_bits", [16, 24, 32])
def test_what_is_opened_is_the_sum_of_the_rounded_updates_bit_for_bit(ring_bits):
    sim = Sim(study_of(f"secure_aggregation.ring_bits={ring_bits}", "secure_aggregation.max_clients=4"))
    found, works = opened_sums(sim)
    assert found == {number: plain_sum(sim, work) for number, work in works.items()}
    assert len(found) == 3


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "scaffold", "fedprox"])
@pytest.mark.parametrize("more", [(), CROWD], ids=["four", "crowd"])
def test_without_masks_the_model_is_the_same(strategy, more):
    study = study_of(f"strategy.name={strategy}", *more)
    exact, _ = simulated(study.with_overrides(["secure_aggregation.mode=exact"]))
    equivalent, _ = simulated(study.with_overrides(["secure_aggregation.mode=equivalent"]))
    assert arrays.digest(exact.weights) == arrays.digest(equivalent.weights)


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_the_model_is_close_to_the_one_without_secure_aggregation(strategy):
    masked, _ = simulated(study_of(f"strategy.name={strategy}", "secure_aggregation.max_clients=4"))
    plain, _ = simulated(tiny_study("task.options={hidden=6}", f"strategy.name={strategy}"))
    for name, array in plain.weights.items():
        np.testing.assert_allclose(masked.weights[name], array, atol=2e-5)


def test_blocks_give_what_one_client_after_another_gives():
    study = study_of(*CROWD, "secure_aggregation.mode=equivalent")
    one, other = (simulated(study, backend)[0] for backend in ("sequential", "batched"))
    for name, array in one.weights.items():
        np.testing.assert_allclose(other.weights[name], array, atol=1e-5)


@pytest.mark.parametrize("clipping", ["fixed", "adaptive"])
@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_noise_for_whole_clients_is_added_to_the_open_sum(clipping, strategy):
    plan = [f'{{unit="client", noise_multiplier=0.5, delta=0.01, units=4, clip_l2=0.3, clipping="{clipping}"}}']
    study = tiny_study("task.options={hidden=6}", f"strategy.name={strategy}", f"privacy={plan[0]}")
    plain, _ = simulated(study)
    masked, _ = simulated(study.with_overrides(["secure_aggregation.enabled=true", "secure_aggregation.max_clients=4"]))
    for name, array in plain.weights.items():
        np.testing.assert_allclose(masked.weights[name], array, atol=1e-5)


def test_sites_with_noise_of_their_own_count_once_each():
    plan = '{unit="record", noise_multiplier=0.5, delta=0.001, clip_l2=0.3}'
    study = tiny_study("task.options={hidden=6}", f"privacy={plan}", "train.batch_size=32")
    plain, _ = simulated(study)
    masked, _ = simulated(study.with_overrides(["secure_aggregation.enabled=true", "secure_aggregation.max_clients=4"]))
    for name, array in plain.weights.items():
        np.testing.assert_allclose(masked.weights[name], array, atol=1e-5)


def test_nothing_is_said_about_the_examples():
    _, seen = simulated(study_of())
    finished = [event for event in seen if isinstance(event, events.ClientFinished)]
    assert len(finished) == 12
    assert {tuple(event.facts) for event in finished} == {()}
    assert all(np.isnan(event.train_loss) for event in seen if isinstance(event, events.RoundFinished))


@pytest.fixture
def sparse():
    with sparse_graphs(above=10):
        yield


@pytest.mark.parametrize(("study", "exchange"), STAGES)
@pytest.mark.usefixtures("sparse")
def test_one_client_may_drop_out_at_any_stage(study, exchange):
    gone = "client-0003" if study is TWELVE else "bob"
    sim = Sim(study_of(*study), spoil=lost(exchange, gone))
    everybody = tuple(sim.backend.clients())
    found, works = opened_sums(sim)
    left = everybody if exchange in ORDER[4:] else tuple(client for client in everybody if client != gone)
    assert found[2] == plain_sum(sim, works[2], left)
    assert found[3] == plain_sum(sim, works[3], everybody), "it is back in the next round"
    assert not sim.of(events.RoundVoid)


@pytest.mark.slow
def test_more_clients_than_a_complete_graph_has():
    """Nothing is made smaller here: 210 clients, the neighbours and thresholds of 210."""
    study = study_of(
        *("data.partition=bootstrap", "data.clients=210", "data.folds=1", "cohort.wait_for=210", "rounds=1"),
        *("secure_aggregation.adversarial=0.05", "secure_aggregation.dropout=0.05", "evaluate.every=0"),
    )
    asked = []

    def away(client):
        return client.endswith("7") and client < "client-0100"

    def spoil(now, _work, replies):
        asked.append(now)
        for reply in replies:
            yield Failed(reply.client, "gone") if now is Exchange.TRAIN and away(reply.client) else reply

    sim = Sim(study.with_overrides(["secure_aggregation.mode=exact"]), spoil=spoil)
    found, works = opened_sums(sim)
    left = tuple(c for c in sim.backend.clients() if not away(c))
    assert asked == list(ORDER)
    assert len(left) == 200
    assert found == {1: plain_sum(sim, works[1], left)}


@pytest.mark.parametrize("gone", [1, 2])
def test_too_few_that_agree_void_the_round(gone):
    """Three of four have to sign."""

    def spoil(now, work, replies):
        for reply in replies:
            away = now is Exchange.AGREE and (work.round, work.attempt) == (2, 1) and reply.client in CLIENTS[:gone]
            yield Failed(reply.client, "gone") if away else reply

    sim = Sim(study_of(*AGREED), spoil=spoil)
    model = sim.run()
    why = "the survivors did not agree: secure aggregation: got 2 clients that agreed, expected at least 3; the last of the others: client 'bob': gone"
    assert [event.reason for event in sim.of(events.RoundVoid)] == ([] if gone == 1 else [why])
    assert arrays.digest(model) == arrays.digest(Sim(study_of()).run())


@pytest.mark.usefixtures("sparse")
def test_a_sparse_graph_gives_the_bits_of_the_sum_without_masks():
    exact, seen = simulated(study_of(*TWELVE))
    equivalent, _ = simulated(study_of(*TWELVE).with_overrides(["secure_aggregation.mode=equivalent"]))
    assert arrays.digest(exact.weights) == arrays.digest(equivalent.weights)
    assert [event.clients for event in seen if isinstance(event, events.RoundFinished)] == [12] * 3


def test_two_of_four_void_the_round_and_the_next_attempt_has_fresh_keys():
    bodies: list[bytes] = []

    def spoil(now, work, replies):
        for reply in replies:
            if now is Exchange.TRAIN and isinstance(reply, Said) and reply.client == "ada" and work.round == 2:
                bodies.append(reply.body)
            gone = now is Exchange.TRAIN and (work.round, work.attempt) == (2, 1) and reply.client in {"bob", "cyd"}
            yield Failed(reply.client, "gone") if gone else reply

    sim = Sim(study_of(), spoil=spoil)
    model = sim.run()
    (void,) = sim.of(events.RoundVoid)
    assert (void.round, void.attempt) == (2, 1)
    assert "survivors around a client" in void.reason or "clients that sent a vector" in void.reason
    assert len(set(bodies)) == 2, "the same update under other masks"
    assert arrays.digest(model) == arrays.digest(Sim(study_of()).run())


def test_a_run_with_too_few_clients_fails_with_the_reason():
    study = study_of("runtime.max_attempts=2")
    sim = Sim(study, spoil=lambda now, work, replies: (Failed(r.client, "away") for r in replies))
    with pytest.raises(RunFailedError, match="got 0 clients, expected at least 3"):
        sim.run()


@pytest.mark.parametrize("exchange", [Exchange.CHECK_IN, Exchange.SHARE])
def test_a_refusal_for_good_while_keys_are_exchanged_ends_a_run_before_anybody_trains(exchange):
    asked = []

    def spoil(now, work, replies):
        asked.append((work.round, now))
        for reply in replies:
            refuses = now is exchange and reply.client == "bob"
            yield Failed("bob", "budget: spent", permanent=True) if refuses else reply

    sim = Sim(study_of("cohort.minimum=4", "runtime.max_attempts=5"), spoil=spoil)
    backend = sim.backend
    backend.could_come, backend.refusals = 3, [Failed("bob", "budget: spent", permanent=True)]
    here = backend.clients
    backend.clients = lambda *args: [c for c in here(*args) if c != "bob" or not asked]
    with pytest.raises(RunFailedError, match="3 clients are left, needs 4; refused: bob: budget: spent"):
        sim.run()
    assert {now for _, now in asked} <= {Exchange.CHECK_IN, exchange}
    assert len(sim.of(events.RoundVoid)) == 1


def test_nobody_trains_where_too_few_have_shared_keys():
    asked = []
    gone = lost(Exchange.SHARE, "bob", at_round=1)

    def spoil(now, work, replies):
        asked.append((work.attempt, now))
        return gone(now, work, replies) if work.attempt == 1 else replies

    sim = Sim(study_of("cohort.minimum=4", "rounds=1"), spoil=spoil)
    sim.run()
    assert [now for attempt, now in asked if attempt == 1] == [Exchange.CHECK_IN, Exchange.SHARE]
    (void,) = sim.of(events.RoundVoid)
    assert "got 3 clients that shared, expected at least 4" in void.reason


class Crash(BaseException):
    """The process is killed."""


@pytest.mark.parametrize(("study", "exchange"), STAGES)
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.usefixtures("sparse")
def test_a_coordinator_that_is_killed_goes_on_to_the_same_model(study, exchange, after):
    left = Sim(study_of(*study)).run()

    def spoil(now, work, replies):
        for place, reply in enumerate(replies):
            if now is exchange and work.round == (1 if exchange is Exchange.CHECK_IN else 2) and place == after:
                raise Crash
            yield reply

    journal = DictJournal()
    with pytest.raises(Crash):
        Sim(study_of(*study), journal, spoil).run()
    again = Sim(study_of(*study), journal)
    assert arrays.digest(again.run()) == arrays.digest(left)
    assert not again.of(events.RoundVoid)


def test_vanishing_clients_of_an_environment_leave_or_void_a_round():
    study = study_of(*CROWD, "environment.dropout=0.2", "rounds=6", "secure_aggregation.mode=exact")
    exact, seen = simulated(study)
    equivalent, other = simulated(study.with_overrides(["secure_aggregation.mode=equivalent"]))
    assert arrays.digest(exact.weights) == arrays.digest(equivalent.weights)
    kinds = (events.RoundVoid, events.ClientDropped)
    assert any(isinstance(event, events.ClientDropped) for event in seen)
    assert [type(e) for e in seen if isinstance(e, kinds)] == [type(e) for e in other if isinstance(e, kinds)]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("strategy.name=krum",), "looks at each client's update"),
        (("cohort.size=2", "cohort.wait_for=2"), "there is nothing to protect"),
        (("update.clip_l2=5.0", "secure_aggregation.clip_l2=1.0"), "smaller one"),
        (("secure_aggregation.ring_bits=16", "secure_aggregation.max_examples=100000"), "could wrap"),
        (("secure_aggregation.max_clients=3",), "room for 3"),
        (("secure_aggregation.dropout=0.5",), "no threshold"),
    ],
)
def test_what_cannot_work_is_refused_when_the_study_is_read(overrides, says):
    with pytest.raises(FedlearnError, match=says) as caught:
        simulated(study_of(*overrides))
    assert not isinstance(caught.value, RunFailedError)


def test_a_federation_never_runs_unmasked_where_masks_are_asked_for():
    sim = Sim(study_of())
    with pytest.raises(LocalProtocolError, match="not masked"):
        Federation(sim.study, "r", sim.strategy, sim.initial, sim.backend, DictJournal(), metric="x", emit=print)
