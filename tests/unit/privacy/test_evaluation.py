"""A charged evaluation, in a simulation and in a client's own app: what leaves, what it costs, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client import app as client_app
from fedlearn import events
from fedlearn.data.population import build_population
from fedlearn.errors import PolicyRefusedError, RemoteProtocolError, StudyError
from fedlearn.learning import messages
from fedlearn.learning.backend import Exchange, Scored, Work
from fedlearn.learning.local import initial_weights
from fedlearn.learning.memory import MemoriesInRam
from fedlearn.learning.task import Batch
from fedlearn.link import flower
from fedlearn.privacy.accounting import account
from fedlearn.privacy.evaluation import Reader, evaluation_cost, noisy_sums
from fedlearn.privacy.events import Cost, Gaussian, Repeated, leaves
from fedlearn.privacy.scoring import ShareRight
from fedlearn.privacy.study import plan_of
from fedlearn.simulation.backends import make_backend
from fedlearn.simulation.run import simulate_population
from fedlearn.simulation.sequential import SequentialBackend
from strategies.ditto import Ditto
from strategies.fedavg import FedAvg
from tests.support.tiny_task import CLIENTS, TinyTask, tiny_study

RECORD = ("privacy.unit=record", "privacy.noise_multiplier=1.5", "privacy.delta=1e-3")
CHARGED = (*RECORD, "privacy.evaluation_noise=2.0")


def work_of(study, number: int = 1) -> Work:
    return Work(number, 1, CLIENTS, initial_weights(TinyTask(), study), {}, "", {}, 60.0)


def scored(study, name: str, work: Work) -> dict[str, tuple[float, ...]]:
    population = build_population(study, TinyTask())
    backend = make_backend(name, study, population, FedAvg(), device="cpu", workers=1, memories=MemoriesInRam())
    try:
        return {reply.client: reply.cells for reply in backend.evaluate(work)}
    finally:
        backend.close()


def test_every_backend_answers_with_the_same_noisy_sums_and_nothing_else():
    study = tiny_study(*CHARGED)
    one, other = (scored(study, name, work_of(study)) for name in ("sequential", "batched"))
    assert one == other
    assert set(one) == set(CLIENTS)
    assert one == scored(study, "sequential", work_of(study)), "a rehearsal can be repeated"
    assert one != scored(study, "sequential", work_of(study, 2)), "the next round has noise of its own"
    population = build_population(study, TinyTask())
    backend = SequentialBackend(study, population, FedAvg())
    assert all((reply.metrics, reply.examples) == ({}, 0) for reply in backend.evaluate(work_of(study)))


def test_the_noise_is_as_large_as_it_is_charged_for():
    study = tiny_study(*CHARGED, "privacy.evaluation_noise=3.0")
    test = Batch(np.zeros((4, 3), np.float32), np.array([0, 1, 1, 1]))
    outputs = np.tile([0.0, 1.0], (4, 1))
    draws = np.array(
        [noisy_sums(study, ShareRight(), outputs.__getitem__, test, (0, "ada"), rehearsal=False) for _ in range(3_000)]
    )
    assert draws.mean(axis=0) == pytest.approx([3, 1], abs=5 * 3 / 3_000**0.5)
    assert draws.std(axis=0) == pytest.approx([3, 3], rel=0.07)
    assert evaluation_cost(study) == Cost(Gaussian(3.0))


def test_a_site_without_test_rows_answers_too():
    study = tiny_study(*CHARGED)
    nothing = Batch(np.zeros((0, 3), np.float32), np.zeros(0, np.int64))
    answer = noisy_sums(study, ShareRight(), pytest.fail, nothing, (1, "ada"), rehearsal=False)
    assert len(answer) == 2
    assert any(answer)


def test_evaluations_are_in_the_plans_cost():
    plan = plan_of(tiny_study(*CHARGED, "rounds=5", "evaluate.every=2"))
    assert [plan.evaluations(n) for n in range(6)] == [0, 0, 1, 1, 2, 3]
    assert leaves(plan.whole_cost().event) == leaves(plan.cost().event) + leaves(Repeated(Gaussian(2.0), 3))
    assert plan.whole_cost(2, 4).event != plan.whole_cost(2).event, "void attempts cost too"
    assert plan_of(tiny_study(*CHARGED, "evaluate.every=0")).evaluations() == 0
    never = plan_of(tiny_study(*RECORD))
    assert never.whole_cost() == never.cost()


def test_a_budget_covers_both():
    over = ("privacy.unit=record", "privacy.epsilon=2.0", "privacy.delta=1e-3", "evaluate.every=1")
    plain, with_scores = (plan_of(tiny_study(*over, *more)) for more in ((), ("privacy.evaluation_noise=6.0",)))
    assert with_scores.noise_multiplier > plain.noise_multiplier
    assert 2 - 1e-3 <= account(with_scores.whole_cost(), 1e-3).reported.epsilon <= 2
    with pytest.raises(StudyError, match="3 evaluations alone cost epsilon"):
        plan_of(tiny_study(*over, "privacy.evaluation_noise=0.5"))


def test_the_round_loop_reads_sums_and_the_run_says_what_they_cost():
    study = tiny_study(*CHARGED, "rounds=2")
    seen: list[events.Event] = []
    result = simulate_population(study, build_population(study, TinyTask()), emit=seen.append)
    evaluated = [event for event in seen if isinstance(event, events.Evaluated)]
    assert [event.round for event in evaluated] == [1, 2]
    assert all(set(event.mean) == {"accuracy"} for event in evaluated)
    exact = {c: len(build_population(study, TinyTask()).client(c).test) for c in CLIENTS}
    assert {c: row["examples"] for c, row in evaluated[0].clients.items()} != exact
    assert result.privacy["evaluations"] == 2
    assert result.privacy["rehearsed_epsilon"] == account(plan_of(study).whole_cost(), 1e-3).reported.epsilon


def test_sums_of_all_sites_have_the_least_noise_and_wrong_replies_are_left_out():
    reader = Reader(ShareRight(), 2.0)
    replies = [
        Scored(name, {}, 0, cells) for name, cells in (("a", (30.0, 10.0)), ("b", (-1.0, 0.5)), ("c", (50.0, 10.0)))
    ]
    bad = [Scored("d", {}, 0, (1.0,)), Scored("e", {}, 0, (float("nan"), 1.0)), Scored("f", {"accuracy": 1.0}, 9)]
    each, pooled = reader.read([*replies, *bad])
    assert [(reply.client, reply.examples) for reply in each] == [("a", 40), ("b", 0), ("c", 60)]
    assert each[0].metrics == {"accuracy": 0.75}
    assert np.isnan(each[1].metrics["accuracy"])
    assert pooled == {"accuracy": pytest.approx(79 / 99.5)}
    assert reader.read(bad) == ([], {})
    assert Reader.of(tiny_study(*RECORD)) is None


@dataclass(frozen=True)
class Watched(TinyTask):
    """Nothing of its own: a class that the client app loads by name."""

    name = "tests.unit.privacy.test_evaluation:Watched"


def asked_to_evaluate(study, *, model=None, state=None) -> RecordDict:
    """A client's answer, as its app gives it under any link."""
    study = study.model_copy(update={"task": study.task.model_copy(update={"name": Watched.name})})
    work = work_of(study)
    work = replace(work, cohort=("ada",), model=work.model if model is None else model)
    encoder = messages.RequestEncoder("run", study.to_json(), client_app.app_of(client_app.__file__).digest)
    flower.ensure_identity(77)
    request = Message(encoder.encode(Exchange.EVALUATE, work)["ada"], dst_node_id=1, message_type="evaluate")
    context = Context(1, 1, {"client-id": "ada"}, state or RecordDict(), {})
    return client_app.app(request, context).content


def test_a_clients_app_sends_sums_and_no_count():
    study = tiny_study(*CHARGED, "privacy.seeded=true")
    content = asked_to_evaluate(study)
    assert set(content) == {messages.RECORD, "metrics", "cells"}
    reply = messages.decode_scores("ada", content)
    assert (reply.metrics, reply.examples, len(reply.cells)) == ({}, 0, 2)
    assert reply.cells == scored(study, "sequential", work_of(study))["ada"], "seeded, it is the simulation's answer"
    secret = messages.decode_scores("ada", asked_to_evaluate(tiny_study(*CHARGED)))
    assert secret.cells != reply.cells


@pytest.mark.parametrize(
    "over", [RECORD, ("privacy.unit=client", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3", "privacy.units=4")]
)
def test_a_clients_app_says_nothing_that_is_not_charged(over):
    with pytest.raises(PolicyRefusedError, match="not covered by the study's privacy plan"):
        asked_to_evaluate(tiny_study(*over))


def test_what_is_scored_is_the_global_model_and_never_a_clients_own():
    """Ditto's own model is made of raw training rows: scores of it would tell of them without noise."""
    study = tiny_study(*CHARGED, "strategy.name=ditto")
    population = build_population(study, TinyTask())
    backend = SequentialBackend(study, population, Ditto())
    first = work_of(study)
    before = {reply.client: reply.cells for reply in backend.evaluate(first)}
    list(backend.fit(first))
    base = dict.fromkeys(CLIENTS, (1, 1))
    after = {reply.client: reply.cells for reply in backend.evaluate(replace(first, base=base))}
    assert before == after
    backend.close()


def test_sums_of_another_form_are_refused_at_the_door():
    content = messages.encode_scores({}, 0, (1.0, 2.0))
    assert messages.decode_scores("a", content).cells == (1.0, 2.0)
    for cells in (np.zeros((2, 2)), np.zeros(2, np.float32), np.zeros(messages.MAX_CELLS + 1)):
        content["cells"] = messages.to_record({"cells": cells})
        with pytest.raises(RemoteProtocolError, match="expected float64"):
            messages.decode_scores("a", content)
    content["cells"] = ConfigRecord({"cells": [1.0]})
    with pytest.raises(RemoteProtocolError, match="expected arrays"):
        messages.decode_scores("a", content)
