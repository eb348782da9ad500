"""However a server has a site read its rows, what comes back under a privacy plan is an update: a failure would tell of the rows."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

from client import app as client_app
from fedlearn.app import load_app
from fedlearn.errors import DataError, UnsupportedError
from fedlearn.learning import messages
from fedlearn.learning.backend import Exchange, Work
from fedlearn.learning.checkpoint import broadcast_digest
from fedlearn.learning.local import initial_weights
from fedlearn.learning.strategy import ServerState
from fedlearn.learning.update import UNCLIPPED
from fedlearn.link import flower
from fedlearn.models.tabular import TabularNet
from fedlearn.privacy.clipping import COUNT
from fedlearn.privacy.study import CLIP
from fedlearn.study import parse_study
from fedlearn.tasks import task_of

SITE = "north"
ROWS = "age,ward,sick\n40,a,no\n50,b,yes\n60,a,no\n70,c,yes\nold,a,no\n44,a,perhaps\n51,a\n"
FITTING = {
    "label": '"sick"',
    "features": '["age"]',
    "ranges": "{age = [0, 100]}",
    "classes": '["no", "yes", "perhaps"]',
}
READINGS = {
    "all but a few": {},
    "a class less": {"classes": '["no", "yes"]'},
    "levels that hardly any row has": {"categorical": '{ward = ["a"]}'},
    "no row's classes": {"classes": '["x", "y"]'},
    "a number for a label": {"label": '"age"', "features": "[]", "ranges": "{}", "categorical": '{ward = ["a"]}'}
    | {"kind": '"regression"', "classes": "[]"},
    "nobody's rows": {"client": '"ward"'},
}
RECORD = 'unit = "record"\nnoise_multiplier = 1.0\ndelta = 1e-5\nevaluation_noise = 2.0\n'
CLIENT = 'unit = "client"\nnoise_multiplier = 1.0\ndelta = 1e-5\nclipping = "adaptive"\n'


def study_of(privacy, reading):
    options = "\n".join(f"{name} = {value}" for name, value in (FITTING | reading).items())
    return parse_study(
        f'name = "s"\nrounds = 2\n[task]\nname = "tabular/csv"\n[task.options]\n{options}\n'
        + (f"[privacy]\n{privacy}" if privacy else "")
    )


def context_of(data):
    return Context(1, 5, {"client-id": SITE, "data": str(data)}, RecordDict(), {})


def ask(study, data, exchange, context=None, at=(1, 1), base=None):
    """What the app answers."""
    flower.ensure_identity(7)
    model = initial_weights(task_of(study), study)
    shared = dict(load_app().strategy(study.strategy.name, study.strategy.options).server_init(model).shared)
    if study.privacy is not None and study.privacy.unit == "client":
        shared[CLIP] = np.array(1.0)
    bases = {} if base is None else {SITE: base}
    work = Work(*at, (SITE,), model, shared, broadcast_digest(ServerState(model, shared)), bases, 60.0)
    content = messages.RequestEncoder("run", study.to_json(), load_app().digest).encode(exchange, work)[SITE]
    context = context or context_of(data)
    return client_app.app(Message(content, 5, messages.MESSAGE_TYPES[exchange]), context).content


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("privacy", [RECORD, CLIENT], ids=["record", "client"])
@pytest.mark.parametrize("rows", [ROWS, ROWS.splitlines()[0] + "\n"], ids=["rows", "none"])
def test_every_reading_of_the_rows_is_answered_alike(tmp_path, privacy, reading, rows):
    data = tmp_path / "site.csv"
    data.write_text(rows)
    study = study_of(privacy, READINGS[reading])
    update = messages.decode_update(ask(study, data, Exchange.TRAIN))
    assert update.private["delta"]
    assert (update.examples, update.facts) == (1, {})
    assert all(np.isfinite(array).all() for array in update.private["delta"].values())
    if privacy is RECORD:
        assert all(array.any() for array in update.private["delta"].values()), "noise, whatever was read"
        scored = messages.decode_scores(SITE, ask(study, data, Exchange.EVALUATE))
        assert any(scored.cells)


@pytest.mark.parametrize("reading", READINGS)
def test_without_a_plan_a_row_that_does_not_fit_is_refused(tmp_path, reading):
    data = tmp_path / "site.csv"
    data.write_text(ROWS)
    with pytest.raises(DataError):
        ask(study_of("", READINGS[reading]), data, Exchange.TRAIN)


def test_what_is_wrong_with_the_file_as_a_whole_is_told(tmp_path):
    """Whether there is such a column is no record's secret."""
    data = tmp_path / "site.csv"
    data.write_text(ROWS.replace("ward", "room"))
    study = study_of(RECORD, {"categorical": '{ward = ["a"]}'})
    with pytest.raises(DataError, match="missing column 'ward'"):
        ask(study, data, Exchange.TRAIN)


@pytest.mark.parametrize("broken", ["data", "training"])
def test_a_client_that_is_the_unit_and_fails_sends_an_update_of_zero(tmp_path, monkeypatch, caplog, broken):
    data = tmp_path / "site.csv"
    study = study_of(CLIENT, {"classes": '["no", "yes"]'})
    if broken == "training":
        data.write_text("age,sick\n40,no\n")
        monkeypatch.setattr("fedlearn.learning.local.fit", lambda *_, **__: 1 // 0)
    client_app._warm_site.cache_clear()
    with caplog.at_level(logging.ERROR):
        update = messages.decode_update(ask(study, data, Exchange.TRAIN))
    assert not any(array.any() for array in update.private["delta"].values())
    assert update.private[UNCLIPPED][COUNT].tolist() == [1.0]
    assert "updates of zero" in caplog.text or "an update of zero" in caplog.text
    client_app._warm_site.cache_clear()


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "ditto"])
def test_noise_that_leaves_the_range_of_numbers_is_an_answer_like_any_other(tmp_path, strategy):
    """A refusal is free: a learning rate at the edge of the range would ask for the sign of noisy gradients as often as one likes."""
    data = tmp_path / "site.csv"
    data.write_text("age,sick\n60,yes\n40,no\n")
    table = RECORD + "sampling_rate = 1.0\nunits = 1\nsteps = 1\n"
    study = study_of(table, {"hidden": "[]"}).with_overrides([f"strategy.name={strategy}", "train.lr=3e38"])
    context, zeros = context_of(data), 0
    for number in range(1, 13):
        asked = {"at": (number, 1), "base": (number - 1, 1) if number > 1 and strategy != "fedavg" else None}
        update = messages.decode_update(ask(study, data, Exchange.TRAIN, context, **asked))
        assert all(np.isfinite(a).all() for arrays in update.private.values() for a in arrays.values())
        zeros += not any(array.any() for array in update.private["delta"].values())
    assert zeros > 0


def test_a_failure_costs_a_client_that_is_the_unit_one_update_and_not_its_memory(tmp_path, monkeypatch):
    data = tmp_path / "site.csv"
    data.write_text("age,sick\n60,yes\n40,no\n")
    study = study_of(CLIENT, {}).with_overrides(["strategy.name=scaffold"])
    context, moved = context_of(data), []
    for number in (1, 2):
        with monkeypatch.context() as patch:
            if number == 1:
                patch.setattr("fedlearn.learning.local.fit", lambda *_, **__: 1 // 0)
            base = (1, 1) if number == 2 else None
            update = messages.decode_update(ask(study, data, Exchange.TRAIN, context, (number, 1), base))
        moved.append(any(array.any() for array in update.private["delta"].values()))
    assert moved == [False, True]


def test_a_pass_beside_the_private_one_does_not_tell_of_its_rows_either(tmp_path, monkeypatch, caplog):
    data = tmp_path / "site.csv"
    data.write_text("age,sick\n60,yes\n40,no\n")
    monkeypatch.setattr("fedlearn.learning.local.LocalTrainer.step", lambda *_: 1 // 0)  # the private pass has its own
    with caplog.at_level(logging.ERROR):
        ask(study_of(RECORD, {}).with_overrides(["strategy.name=ditto"]), data, Exchange.TRAIN)
    assert "'personal': a batch of 2 rows counts as nothing" in caplog.text


@pytest.mark.parametrize("exchange", [Exchange.EVALUATE, Exchange.TRAIN])
@pytest.mark.parametrize("mode", ["always", "in training", "in evaluation"])
def test_a_model_that_mixes_rows_is_refused_whatever_is_asked_first(tmp_path, monkeypatch, exchange, mode):
    """In an evaluation one row more would change how all are scored, and the noise is for one."""
    data, forward = tmp_path / "site.csv", TabularNet.forward
    data.write_text(ROWS)

    def mixed(self, x):
        mixes = mode == "always" or self.training == (mode == "in training")
        return forward(self, x) + (x.max() if mixes else 0) * x[:, :1] * torch.tensor([1.0, -1.0, 0.0])

    monkeypatch.setattr(TabularNet, "forward", mixed)
    with pytest.raises(UnsupportedError, match="depends on which rows are beside it"):
        ask(study_of(RECORD, {}), data, exchange)
