"""A population gives each client the same data whichever way it is asked, and keeps a limited share of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fedlearn import seeds
from fedlearn.data.partition import make_partition
from fedlearn.data.population import build_population, site_population
from fedlearn.errors import DataError
from fedlearn.learning import population as populations
from fedlearn.learning.population import Population
from fedlearn.learning.task import Batch, ClientData
from tests.support.tiny_task import CLIENTS, TinyTask, tiny_study


@dataclass(frozen=True)
class Centred(TinyTask):
    """Learns its centre from a client's own rows."""

    def prepare(self, train, test):
        centre = train.x.mean(axis=0)
        return ClientData(Batch(train.x - centre, train.y), Batch(test.x - centre, test.y))


@dataclass(frozen=True)
class Halved(TinyTask):
    """Its own prepare, row by row."""

    prepares_rows = True

    def prepare(self, train, test):
        return ClientData(Batch(train.x / 2, train.y), Batch(test.x / 2, test.y))


STUDIES = {
    "natural": (),
    "natural, no test rows": ("data.folds=1",),
    "iid": ("data.partition=iid", "data.clients=7", "data.folds=1"),
    "bootstrap": ("data.partition=bootstrap", "data.clients=90", "data.options.examples_per_client=8"),
    "bootstrap, no test rows": ("data.partition=bootstrap", "data.clients=90", "data.folds=1"),
}


def population(kind=TinyTask, overrides=()) -> Population:
    return build_population(tiny_study(*overrides), kind())


def same(a: Batch, b: Batch) -> bool:
    return a.x.tobytes() == b.x.tobytes() and a.y.tobytes() == b.y.tobytes() and a.x.dtype == b.x.dtype


@pytest.mark.parametrize("kind", [TinyTask, Centred, Halved])
@pytest.mark.parametrize("overrides", STUDIES.values(), ids=STUDIES)
def test_a_block_is_each_clients_own_training_examples(kind, overrides):
    one, other = population(kind, overrides), population(kind, overrides)
    clients = [one.client_ids[i] for i in (2, 0, 3, 2)]
    block = one.block(clients)
    assert all(same(got, other.client(client).train) for got, client in zip(block, clients, strict=True))
    assert one.train_sizes(clients).tolist() == [len(batch) for batch in block]
    assert one.block([]) == []


@pytest.mark.parametrize("overrides", STUDIES.values(), ids=STUDIES)
def test_one_client_alone_has_what_it_has_among_all(overrides):
    whole = population(overrides=overrides)
    for client in whole.client_ids[1:3]:
        alone = whole.only(client)
        assert list(alone.client_ids) == list(alone.rows) == [client]
        assert same(alone.client(client).train, whole.client(client).train)
        assert same(alone.client(client).test, whole.client(client).test)
        for ask in (alone.client, alone.only, lambda c, a=alone: a.block([c]), lambda c, a=alone: a.train_sizes([c])):
            with pytest.raises(DataError, match="not in this population of 1 clients"):
                ask(whole.client_ids[0])


def test_rows_are_prepared_together_only_where_the_class_that_prepares_says_so():
    together = ("data.folds=1",)
    assert population(TinyTask, together)._in_one
    assert population(Halved, together)._in_one
    assert not population(Centred, together)._in_one, "the base's promise is not inherited with another prepare"
    assert not population(TinyTask)._in_one, "each client splits its own rows"

    @dataclass(frozen=True)
    class Other(Population):
        def client(self, client_id):
            return super().client("ada")

    whole = population(TinyTask, together)
    changed = Other(whole.task, whole.examples, whole.rows, whole.seed, 1)
    assert same(changed.block(["bob"])[0], whole.client("ada").train)


def test_the_split_of_a_client_is_what_it_has_always_been():
    whole = population()
    mine = whole.examples.take(whole.rows["bob"])
    train, test = whole.task.split(mine, seeds.derive(5, "split", "bob"), 3, 0)
    assert same(whole.client("bob").train, Batch(mine.x[train], mine.y[train]))
    assert same(whole.client("bob").test, Batch(mine.x[test], mine.y[test]))


def test_clients_that_share_rows_never_test_on_what_another_trains_on():
    whole = population(overrides=STUDIES["bootstrap"])
    trained, tested = set(), set()
    for client in whole.client_ids:
        train, test = whole.rows.halves(client)
        assert (len(train), len(test)) == (5, 3)
        trained |= set(train.tolist())
        tested |= set(test.tolist())
    assert not trained & tested
    assert trained | tested == set(range(len(whole.examples)))


def test_the_cache_keeps_its_limit_and_serves_threads(monkeypatch):
    monkeypatch.setattr(populations, "CACHE_BYTES", 2_700)
    whole = population()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(whole.client, CLIENTS * 50))
    assert whole._cache.used_bytes <= 2_700
    assert len(whole._cache) == 2
    fresh = {client: population().client(client) for client in CLIENTS}
    assert all(same(got.train, fresh[client].train) for got, client in zip(found, CLIENTS * 50, strict=True))
    assert whole.client("ada") is whole.client("ada")
    assert not len(replace(whole, fold=1)._cache), "another split is other data"


def test_a_dict_of_rows_is_a_population_too():
    examples = TinyTask().load()
    rows = dict(make_partition(examples, "natural", None, 0))
    plain = Population(TinyTask(), examples, {c: rows[c] for c in reversed(CLIENTS)}, seed=5, folds=1)
    assert list(plain.client_ids) == list(CLIENTS)
    assert [len(batch) for batch in plain.block(CLIENTS)] == [9, 14, 20, 11]
    assert np.concatenate([batch.y for batch in plain.block(CLIENTS)]).tolist() == examples.y.tolist()


@pytest.mark.parametrize("overrides", STUDIES.values(), ids=STUDIES)
def test_a_site_has_what_it_has_in_the_simulation(overrides):
    study = tiny_study(*overrides)
    whole = build_population(study, TinyTask())
    client = whole.client_ids[2]
    site = site_population(study, TinyTask(), client, None)
    assert list(site.client_ids) == [client]
    assert same(site.client(client).train, whole.client(client).train)
    assert same(site.client(client).test, whole.client(client).test)
    with pytest.raises(DataError, match="is not one of this study's"):
        site_population(study, TinyTask(), "nobody", None)
