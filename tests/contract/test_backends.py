"""What every backend promises the round loop. A new one is a subclass of `BackendContract` with a `backend` fixture."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import numpy as np
import pytest

from fedlearn.app import load_app
from fedlearn.arrays import digest
from fedlearn.data.population import build_population
from fedlearn.learning import local
from fedlearn.learning.backend import Backend, Failed, Fitted, Scored, Summed, Work
from fedlearn.learning.collect import collector_for
from fedlearn.learning.messages import RequestEncoder
from fedlearn.learning.postprocess import apply_on_client, chain_of
from fedlearn.learning.task import build_model
from fedlearn.learning.update import Update
from fedlearn.privacy.site import site_plan
from fedlearn.privacy.study import with_clip
from fedlearn.simulation.batched import BatchedBackend
from fedlearn.simulation.sequential import SequentialBackend
from fedlearn.simulation.sums import is_counted
from fedlearn.study import Study
from server.rounds import GridBackend
from tests.support.memory_grid import MemoryGrid, nodes_of
from tests.support.private_plans import PLANS
from tests.support.tiny_task import CLIENTS, TinyTask, tiny_study

TASK = TinyTask()


def strategy_of(study: Study):
    return load_app().strategy(study.strategy.name, study.strategy.options)


def work_of(study: Study, cohort=CLIENTS, round_: int = 1, attempt: int = 1, base=None, model=None) -> Work:
    model = local.initial_weights(TASK, study) if model is None else model
    adaptive = study.privacy is not None and study.privacy.unit == "client" and study.privacy.clipping == "adaptive"
    shared = with_clip(strategy_of(study).server_init(model).shared, study.privacy.clip_l2 if adaptive else None)
    return Work(round_, attempt, tuple(cohort), model, shared, digest(model), base or {}, 5.0)


def bytes_of(update: Update):
    return {name: digest(arrays) for name, arrays in update.private.items()}, update.examples, update.facts


def fitted(backend: Backend, work: Work):
    """By client, what came of it: its own update, or the sum that it is in."""
    found = {}
    for reply in backend.fit(work):
        if isinstance(reply, Fitted):
            found[reply.client] = bytes_of(reply.update)
        elif isinstance(reply, Summed):
            found |= {client: (reply.partial.checksum(), facts) for client, facts in reply.facts.items()}
    return found


def clients_of(reply) -> list[str]:
    return list(reply.facts) if isinstance(reply, Summed) else [reply.client]


def total_of(study: Study, model, replies):
    """The mean of all updates, by release and array."""
    collector = collector_for(strategy_of(study), model, counted=is_counted(chain_of(study)))
    for reply in replies:
        if isinstance(reply, Summed):
            collector.merge(reply.partial)
        else:
            collector.add(reply.client, reply.update)
    return {(release, name): a for release, m in collector.aggregate(9).means.items() for name, a in m.items()}


def trained_alone(study: Study, work: Work) -> list[Fitted]:
    """`local.fit`, called here for each client by itself, with the plan that the study asks for, and what is done on the way out."""
    population = build_population(study, TASK)
    replies = []
    for client in work.cohort:
        data = population.client(client)
        result = local.fit(
            TASK,
            build_model(TASK, 0),
            strategy_of(study),
            study.train,
            data,
            place=local.Place(study.seed, work.round, client),
            global_model=work.model,
            shared=work.shared,
            state={},
            private=site_plan(study, work.round, client, data.train, rehearsal=True),
        )
        replies.append(Fitted(client, apply_on_client(chain_of(study, work.shared), result.update)))
    return replies


class BackendContract:
    """The tests."""

    tolerance = 0.0
    """Of float32 results; 0 where they are the same bytes."""

    @abstractmethod
    def make(self, study: Study) -> Backend:
        """A backend with the tiny task's four clients."""

    def backend(self, study: Study) -> Backend:
        made = self.make(study)
        assert list(made.clients(4, 1.0)) == list(CLIENTS)
        return made

    @pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "scaffold", "ditto"])
    @pytest.mark.parametrize("clip", [None, 0.01])
    def test_updates_are_local_trainings(self, strategy, clip):
        """`local.fit`, called here for each client by itself, clipped where the study says so."""
        study = tiny_study(f"strategy.name={strategy}", *([] if clip is None else [f"update.clip_l2={clip}"]))
        work = work_of(study, round_=3)
        self.compare(study, work)

    @pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "scaffold", "ditto"])
    @pytest.mark.parametrize("kind", ["record", "record adaptive", "client", "client adaptive"])
    def test_under_a_plan_too(self, strategy, kind):
        """Seeded, so that everybody draws the same batches and noise."""
        study = tiny_study(f"strategy.name={strategy}", *PLANS[kind], "privacy.seeded=true")
        self.compare(study, work_of(study, round_=2))

    def compare(self, study, work):
        expected = trained_alone(study, work)
        wanted = total_of(study, work.model, expected)
        got = total_of(study, work.model, self.backend(study).fit(work))
        assert got.keys() == wanted.keys()
        for place, array in wanted.items():
            np.testing.assert_allclose(got[place], array, rtol=self.tolerance, atol=self.tolerance * 0.01)

    @pytest.mark.parametrize("kind", ["record", "client adaptive"])
    def test_under_a_plan_nothing_is_said_beside_an_update(self, kind):
        study = tiny_study(*PLANS[kind], "privacy.seeded=true")
        for reply in self.backend(study).fit(work_of(study)):
            if isinstance(reply, Summed):
                assert set(reply.partial.examples.values()) == {1}
                assert all(facts == {} for facts in reply.facts.values())
            else:
                assert isinstance(reply, Fitted)
                assert (reply.update.examples, reply.update.facts) == (1, {})

    def test_each_client_of_a_cohort_gets_one_reply(self):
        study = tiny_study()
        backend = self.backend(study)
        for cohort in (CLIENTS, CLIENTS[1:3], ("ada",), ()):
            replies = backend.fit(work_of(study, cohort))
            assert sorted(client for reply in replies for client in clients_of(reply)) == sorted(cohort)
            assert sorted(reply.client for reply in backend.evaluate(work_of(study, cohort))) == sorted(cohort)

    def test_somebody_who_is_not_there_fails_alone(self):
        study = tiny_study()
        backend = self.backend(study)
        for exchange in (backend.fit, backend.evaluate):
            replies = {c: reply for reply in exchange(work_of(study, ("ada", "zoe"))) for c in clients_of(reply)}
            assert isinstance(replies["zoe"], Failed)
            assert replies["zoe"].reason
            assert isinstance(replies["ada"], Fitted | Summed | Scored)

    def test_who_else_takes_part_and_who_went_before_does_not_matter(self):
        study = tiny_study("task.options.hidden=3", "task.options.dropout=0.5")
        model = local.initial_weights(TinyTask(hidden=3), study)
        backend = self.backend(study)
        everybody = fitted(backend, work_of(study, model=model))
        assert fitted(backend, work_of(study, ("cyd",), model=model)) == {"cyd": everybody["cyd"]}
        assert fitted(self.backend(study), work_of(study, ("bob", "cyd"), model=model))["cyd"] == everybody["cyd"]

    def test_a_retry_of_a_round_computes_the_same(self):
        study = tiny_study("strategy.name=scaffold")
        backend = self.backend(study)
        first = fitted(backend, work_of(study))
        assert fitted(backend, work_of(study)) == first
        assert fitted(backend, work_of(study, attempt=2)) == first

    @pytest.mark.parametrize("strategy", ["scaffold", "ditto"])
    def test_state_continues_from_its_base(self, strategy):
        study = tiny_study(f"strategy.name={strategy}", "strategy.options={}")
        fresh, backend = self.backend(study), self.backend(study)
        fitted(backend, work_of(study))
        fitted(backend, work_of(study, attempt=2))
        base = dict.fromkeys(CLIENTS, (1, 2))
        second = work_of(study, round_=2, base=base)
        continued = list(backend.evaluate(second)), fitted(backend, second)
        assert len(continued[1]) == 4
        from_nothing = list(fresh.evaluate(replace(second, base={}))), fitted(fresh, replace(second, base={}))
        assert continued != from_nothing
        assert fitted(backend, second) == continued[1], "asked again, the same"
        assert fitted(fresh, second) == {}, "who does not have the base does not take part"

    def test_evaluation_scores_the_test_rows(self):
        study = tiny_study()
        population = build_population(study, TASK)
        work = work_of(study)
        for reply in self.backend(study).evaluate(work):
            assert isinstance(reply, Scored)
            test = population.client(reply.client).test
            assert reply.examples == len(test)
            expected = local.evaluate(TASK, build_model(TASK, 0), study.train, test, work.model)
            assert dict(reply.metrics) == pytest.approx(expected, rel=self.tolerance, abs=0)


class TestSequential(BackendContract):
    def make(self, study):
        task = TinyTask(**study.task.options)
        return SequentialBackend(study, build_population(study, task), strategy_of(study))


class TestBatched(BackendContract):
    tolerance = 1e-5

    def make(self, study):
        task = TinyTask(**study.task.options)
        return BatchedBackend(study, build_population(study, task), strategy_of(study), workers=2)


class TestGrid(BackendContract):
    def make(self, study):
        return GridBackend(MemoryGrid(nodes_of(CLIENTS), order=1), RequestEncoder("run", study.to_json(), "app"))
