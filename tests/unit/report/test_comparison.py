"""Local-only, federated and pooled on one split."""

import dataclasses

import fedlearn
from fedlearn import arrays
from fedlearn.data.population import build_population
from fedlearn.report.comparison import WAYS, Together, compare
from fedlearn.study import load_study
from fedlearn.tasks import load_task


def study(rounds=2):
    return load_study("simulations/heart.toml", (f"rounds={rounds}",))


def test_the_federated_column_is_the_simulation(tmp_path):
    one = study()
    result = fedlearn.simulate(one)
    found = compare(one, arrays.to_bytes(result.weights))
    assert found.identical
    for client, scores in found.scores.items():
        assert tuple(scores) == WAYS
        assert scores["federated"] == result.history.final(f"auc@{client}")
    found.plot(tmp_path / "auc.png")
    assert (tmp_path / "auc.png").read_bytes().startswith(b"\x89PNG")


def test_other_weights_are_noticed():
    assert not compare(study(1), b"something else").identical


def test_labels_are_counted_on_the_test_rows():
    found = compare(study(1))
    assert found.labels["switzerland"] == {"healthy": 2, "ill": 23}
    assert {c: sum(n.values()) for c, n in found.labels.items()} == dict(found.test_rows)


def test_pooled_rows_are_everybodys_training_rows_prepared_at_home():
    one = study()
    task = load_task(one.task.name)
    population = build_population(one, task)
    fields = {f.name: getattr(population, f.name) for f in dataclasses.fields(population) if f.name != "_cache"}
    together = Together(**fields).client("pooled")
    assert len(together.train) == sum(len(population.client(c).train) for c in population.client_ids)
    first = population.client("cleveland").train
    assert (together.train.x[: len(first)] == first.x).all()
