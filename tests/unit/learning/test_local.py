"""Local training against a plain torch loop, written here without the module under test."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from fedlearn import seeds
from fedlearn.errors import UpdateError
from fedlearn.learning import local
from fedlearn.learning.local import Place
from fedlearn.learning.strategy import MAIN
from fedlearn.learning.task import Batch, ClientData, build_model
from fedlearn.learning.update import DELTA
from fedlearn.study import TrainTable
from strategies import create
from tests.support.tiny_task import TinyTask, tiny_study

PLACE = Place(seed=5, round=3, client="ada")


def client_data(rows: int = 22) -> ClientData:
    examples = TinyTask().load()
    return ClientData(Batch(examples.x[:rows], examples.y[:rows]), Batch(examples.x[rows:], examples.y[rows:]))


def plain_loop(task, train: TrainTable, data: Batch, start: dict[str, np.ndarray], place: Place):
    """What a person would write: batches from one permutation an epoch, backward, step."""
    wide = train.precision == "float64"
    model = build_model(task, 0).to(torch.float64 if wide else torch.float32)
    model.load_state_dict({name: torch.tensor(w) for name, w in start.items()})
    makers = {
        "sgd": lambda p: torch.optim.SGD(p, train.lr, momentum=train.momentum, weight_decay=train.weight_decay),
        "adam": lambda p: torch.optim.Adam(p, train.lr, weight_decay=train.weight_decay),
        "adamw": lambda p: torch.optim.AdamW(p, train.lr, weight_decay=train.weight_decay),
    }
    optimizer = makers[train.optimizer](model.parameters())
    generator = seeds.numpy_generator(place.seed, "batches", place.round, place.client, MAIN)
    x = torch.tensor(data.x, dtype=torch.float64 if wide else torch.float32)
    y = torch.tensor(data.y)
    losses, steps = [], 0
    for _ in range(train.epochs):
        for rows in torch.tensor(generator.permutation(len(x))).split(train.batch_size):
            if train.max_steps is not None and steps == train.max_steps:
                break
            optimizer.zero_grad()
            torch.manual_seed(seeds.derive(place.seed, "layers", place.round, place.client, MAIN, steps))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=train.precision == "bfloat16"):
                loss = task.loss(model(x[rows]), y[rows])
                loss.mean().backward()
            optimizer.step()
            losses += loss.detach().tolist()
            steps += 1
    trained = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return {name: trained[name] - start[name] for name in start}, np.mean(losses), steps


def fit(
    train: TrainTable, *, task=None, strategy="fedavg", data=None, place=PLACE, start=None, shared=None, state=None
):
    task = task or TinyTask()
    study = tiny_study(f"train.precision={train.precision}")
    start = local.initial_weights(task, study) if start is None else start
    model = build_model(task, 99)
    rule = create(strategy)
    shared = {name: np.zeros_like(w) for name, w in start.items()} if strategy == "scaffold" else shared or {}
    result = local.fit(
        task,
        model,
        rule,
        train,
        data or client_data(),
        place=place,
        global_model=start,
        shared=shared,
        state=state or {},
    )
    return start, result


TABLES = {
    "sgd": TrainTable(lr=0.3, batch_size=4),
    "short last batch": TrainTable(lr=0.3, batch_size=5),
    "one batch": TrainTable(lr=0.3, batch_size=100),
    "momentum": TrainTable(lr=0.1, momentum=0.9, batch_size=4, epochs=2),
    "weight decay": TrainTable(lr=0.1, weight_decay=0.1, batch_size=4),
    "epochs": TrainTable(lr=0.1, batch_size=8, epochs=3),
    "max_steps within an epoch": TrainTable(lr=0.1, batch_size=4, epochs=3, max_steps=2),
    "max_steps at an epoch's end": TrainTable(lr=0.1, batch_size=11, epochs=3, max_steps=2),
    "max_steps beyond the end": TrainTable(lr=0.1, batch_size=11, epochs=1, max_steps=9),
    "adam": TrainTable(optimizer="adam", lr=0.01, batch_size=4, epochs=2),
    "adam with decay": TrainTable(optimizer="adam", lr=0.01, weight_decay=0.1, batch_size=4),
    "adamw": TrainTable(optimizer="adamw", lr=0.01, weight_decay=0.1, batch_size=4, epochs=2),
    "float64": TrainTable(lr=0.3, batch_size=4, precision="float64"),
    "float64 adam": TrainTable(optimizer="adam", lr=0.01, batch_size=4, precision="float64"),
    "bfloat16": TrainTable(lr=0.3, batch_size=4, precision="bfloat16"),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("task", [TinyTask(), TinyTask(hidden=5, dropout=0.4)], ids=["linear", "dropout"])
def test_equals_a_plain_torch_loop(name, task):
    train = TABLES[name]
    start, result = fit(train, task=task)
    expected, loss, steps = plain_loop(task, train, client_data().train, start, PLACE)
    delta = result.update.private[DELTA]
    for key, array in expected.items():
        assert delta[key].dtype == array.dtype
        np.testing.assert_array_equal(delta[key], array)
    assert result.update.facts["steps"] == steps
    assert result.update.facts["loss"] == pytest.approx(loss, rel=1e-6)
    assert result.update.examples == 22
    assert result.state == {}


def test_bfloat16_computes_coarsely_and_keeps_float32():
    exact = fit(TABLES["sgd"])[1].update.private[DELTA]["weight"]
    coarse = fit(TABLES["bfloat16"])[1].update.private[DELTA]["weight"]
    assert coarse.dtype == exact.dtype == np.float32
    assert not np.array_equal(coarse, exact)
    np.testing.assert_allclose(coarse, exact, atol=0.03)


def test_one_place_gives_one_result_and_other_places_others():
    task = TinyTask(hidden=5, dropout=0.4)
    train = TABLES["sgd"]

    def delta(place):
        return fit(train, task=task, place=place)[1].update.private[DELTA]["0.weight"]

    np.testing.assert_array_equal(delta(PLACE), delta(PLACE))
    for other in (Place(6, 3, "ada"), Place(5, 4, "ada"), Place(5, 3, "bob")):
        assert not np.array_equal(delta(other), delta(PLACE))


def test_neither_global_generators_nor_a_used_model_matter():
    task = TinyTask(hidden=5, dropout=0.4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = fit(TABLES["adam"], task=task)[1]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    np.random.seed(3)  # noqa: NPY002  # the generator that must not matter
    used = build_model(task, 1)
    start = local.initial_weights(task, tiny_study())
    for _ in range(2):
        again = local.fit(
            task,
            used,
            create("fedavg"),
            TABLES["adam"],
            client_data(),
            place=PLACE,
            global_model=start,
            shared={},
            state={},
        )
        for name, array in first.update.private[DELTA].items():
            np.testing.assert_array_equal(again.update.private[DELTA][name], array)


def test_arguments_are_not_changed():
    start = local.initial_weights(TinyTask(), tiny_study())
    for array in start.values():
        array.setflags(write=False)
    fit(TABLES["momentum"], start=start)


def test_initial_weights_come_from_the_study_alone():
    torch.manual_seed(1)
    a = local.initial_weights(TinyTask(), tiny_study())
    torch.manual_seed(2)
    b = local.initial_weights(TinyTask(), tiny_study())
    c = local.initial_weights(TinyTask(), tiny_study("seed=6"))
    np.testing.assert_array_equal(a["weight"], b["weight"])
    assert not np.array_equal(a["weight"], c["weight"])
    assert local.initial_weights(TinyTask(), tiny_study("train.precision=float64"))["weight"].dtype == np.float64


def test_a_client_without_rows_takes_no_step():
    empty = ClientData(Batch(np.zeros((0, 3), np.float32), np.zeros(0, np.int64)), client_data().test)
    for strategy in ("fedavg", "scaffold", "ditto", "fedprox"):
        _, result = fit(TABLES["sgd"], data=empty, strategy=strategy)
        assert result.update.examples == 0
        assert result.update.facts["steps"] == 0
        assert math.isnan(result.update.facts["loss"])
        assert all(not array.any() for array in result.update.private[DELTA].values())


# Rules that strategies add.


def test_fedprox_pulls_towards_the_global_model():
    _, result = fit(TrainTable(lr=0.1, batch_size=22, epochs=2), strategy="fedprox")
    mu = create("fedprox").options["mu"]
    start, task, data = local.initial_weights(TinyTask(), tiny_study()), TinyTask(), client_data().train
    w = {name: torch.tensor(a, dtype=torch.float64, requires_grad=True) for name, a in start.items()}
    x, y = torch.tensor(data.x, dtype=torch.float64), torch.tensor(data.y)
    for _ in range(2):
        loss = task.loss(x @ w["weight"].T + w["bias"], y).mean()
        gradients = torch.autograd.grad(loss, list(w.values()))
        w = {
            name: (p - 0.1 * (g + mu * (p - torch.tensor(start[name])))).detach().requires_grad_(True)
            for (name, p), g in zip(w.items(), gradients, strict=True)
        }
    for name, p in w.items():
        np.testing.assert_allclose(result.update.private[DELTA][name], p.detach().numpy() - start[name], atol=1e-6)


def test_scaffolds_control_is_the_mean_gradient():
    train = TrainTable(lr=0.1, batch_size=22, epochs=3)
    _, result = fit(train, strategy="scaffold")
    for name, control in result.update.private["control"].items():
        np.testing.assert_allclose(control, -result.update.private[DELTA][name] / (3 * 0.1), rtol=1e-5)
        np.testing.assert_array_equal(result.state[name], control)


def test_dittos_two_models_train_apart():
    _, alone = fit(TABLES["sgd"])
    _, result = fit(TABLES["sgd"], strategy="ditto")
    for name, array in alone.update.private[DELTA].items():
        np.testing.assert_array_equal(result.update.private[DELTA][name], array)
    assert set(result.state) == set(alone.update.private[DELTA])


# Evaluation.


def test_evaluation_is_the_whole_sets_whatever_the_batch():
    task, study = TinyTask(hidden=5, dropout=0.9), tiny_study()
    weights = local.initial_weights(task, study)
    data = client_data().test
    model = build_model(task, 1)
    whole = local.evaluate(task, model, study.train, data, weights)
    for size in (1, 7, len(data)):
        assert local.evaluate(task, model, study.train, data, weights, size) == pytest.approx(whole, rel=1e-6)
    reference = build_model(task, 0).eval()
    reference.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})
    with torch.no_grad():
        outputs = reference(torch.tensor(data.x))
    assert whole["accuracy"] == (outputs.argmax(1).numpy() == data.y).mean()
    assert whole["loss"] == pytest.approx(task.loss(outputs, torch.tensor(data.y)).mean().item(), rel=1e-6)


def test_nothing_to_evaluate_gives_no_metrics():
    task, study = TinyTask(), tiny_study()
    nothing = Batch(np.zeros((0, 3), np.float32), np.zeros(0, np.int64))
    weights = local.initial_weights(task, study)
    assert local.evaluate(task, build_model(task, 1), study.train, nothing, weights) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": np.zeros(1, np.float32)}, r"got bias \(1,\), expected bias \(2,\)"),
        ({"weight": np.zeros((3, 2), np.float32)}, r"got weight \(3, 2\), expected weight \(2, 3\)"),
        ({"more": np.zeros(1, np.float32)}, r"got more \(1,\), expected more None"),
    ],
)
def test_another_model_is_refused_and_not_broadcast(change, message):
    start = {**local.initial_weights(TinyTask(), tiny_study()), **change}
    with pytest.raises(UpdateError, match=message):
        fit(TABLES["sgd"], start=start)
    model = build_model(TinyTask(), 1)
    with pytest.raises(UpdateError, match=message):
        local.set_weights(model, start)


# Models that cannot, or need not, be federated whole.


@dataclass(frozen=True)
class FrozenTask(TinyTask):
    name: ClassVar[str] = "frozen"

    def model(self):
        body = torch.nn.Linear(3, 3)
        body.requires_grad_(False)
        return torch.nn.Sequential(body, torch.nn.Linear(3, 2))


def test_frozen_parameters_neither_travel_nor_change():
    task, study = FrozenTask(), tiny_study()
    start = local.initial_weights(task, study)
    assert set(start) == {"1.weight", "1.bias"}
    model = build_model(task, study.seed)
    body = model[0].weight.clone()
    local.fit(
        task,
        model,
        create("fedavg"),
        TABLES["weight decay"],
        client_data(),
        place=PLACE,
        global_model=start,
        shared={},
        state={},
    )
    assert torch.equal(model[0].weight, body)


def test_running_statistics_are_refused():
    with pytest.raises(UpdateError, match=r"running statistics \['1.running_mean', '1.running_var'\]") as caught:
        local.get_weights(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)))
    assert "GroupNorm" in caught.value.hint
