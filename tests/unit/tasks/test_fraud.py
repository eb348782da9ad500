from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlearn.data.partition import make_partition
from fedlearn.data.payments import DAY_S, FEATURE_NAMES, LABEL_DELAY_DAYS
from fedlearn.errors import DataError
from fedlearn.learning.population import Population
from fedlearn.tasks.fraud import PRIOR, FraudTask

SMALL = FraudTask(customers=150, terminals=60, days=40)


@pytest.fixture(scope="module")
def data():
    return SMALL.load()


def test_banks_are_the_clients_and_rows_are_in_time_order(data):
    rows = make_partition(data, "natural", None, 0)
    assert list(rows) == ["bank-01", "bank-02", "bank-03", "bank-04", "bank-05"]
    assert all((np.diff(data.x[r, 0]) >= 0).all() for r in rows.values())
    assert data.x.shape[1] == 1 + len(FEATURE_NAMES)


@pytest.mark.parametrize("partition", ["natural", "iid"])
@pytest.mark.parametrize("fold", [0, 1])
def test_the_past_trains_the_future_tests_with_the_label_delay_between(data, partition, fold):
    rows = make_partition(data, partition, None if partition == "natural" else 3, 0)
    for mine in (data.take(r) for r in rows.values()):
        train, test = SMALL.split(mine, 0, 5, fold)
        assert len(test) >= len(mine) // 5
        assert mine.x[train, 0].max() < mine.x[test, 0].min() - LABEL_DELAY_DAYS * DAY_S
    train, test = SMALL.split(data, 0, 1, 0)
    assert (len(train), len(test)) == (len(data), 0)


def test_a_bank_with_its_own_file_computes_what_the_simulation_does(tmp_path, data):
    from fedlearn.data.synthetic.fraud import FraudParameters, fraud_synthetic

    p = fraud_synthetic(FraudParameters(customers=150, terminals=60, days=40), 1)
    mine = np.flatnonzero(p.bank == 1)
    lines = [
        f"{p.time_s[i]},c{p.customer[i]},t{p.terminal[i]},{p.amount[i]:.2f},{int(p.scenario[i] > 0)}"
        for i in np.random.default_rng(0).permutation(mine)
    ]
    path = tmp_path / "bank.csv"
    path.write_text("\n".join(["time_s,customer,terminal,amount,fraud", *lines]))
    own = SMALL.load(path)
    assert own.client is None
    whole = data.take(make_partition(data, "natural", None, 0)["bank-02"])
    assert np.array_equal(own.x[:, 0], whole.x[:, 0])
    assert np.allclose(np.sort(own.x, axis=0), np.sort(whole.x, axis=0), atol=1e-5)
    path.write_text("time_s,customer,terminal,amount,fraud\n1,a,b,-3,0\n")
    with pytest.raises(DataError, match="column 'amount', line 2: got '-3'"):
        SMALL.load(path).whole()
    path.write_text("time_s,customer,terminal,amount,fraud\n100000000000,a,b,3,0\n")
    with pytest.raises(DataError, match=r"column 'time_s', line 2: .* from 0 to 1e\+10"):
        SMALL.load(path).whole()  # it would leave others' features no room in 64 bits
    path.write_text("time_s,customer,terminal,amount,fraud\n1,a,b,3,yes\n")
    with pytest.raises(DataError, match="column 'fraud', line 2"):
        SMALL.load(path).whole()


def test_objectives():
    outputs, y = torch.tensor([[0.0], [0.0], [5.0], [-5.0]]), torch.tensor([0, 1, 1, 1])
    plain, weighted, focal = (FraudTask(objective=o).loss(outputs, y) for o in ("plain", "weighted", "focal"))
    entropy = torch.log1p(torch.exp(torch.tensor([0.0, 0.0, -5.0, 5.0])))
    torch.testing.assert_close(plain, entropy)
    torch.testing.assert_close(weighted, entropy * torch.tensor([1.0, 10, 10, 10]))
    p = torch.exp(-entropy)
    torch.testing.assert_close(focal, weighted * (1 - p) ** 2)


def test_the_model_starts_at_the_prior():
    torch.manual_seed(0)
    out = torch.sigmoid(SMALL.model()(torch.zeros(1, len(FEATURE_NAMES))))
    assert out.item() == pytest.approx(PRIOR, rel=0.8)


def test_metrics(data):
    outputs = np.array([[0.1], [0.4], [0.35], [0.8]])
    assert SMALL.metrics(outputs, np.array([0, 0, 1, 1])) == pytest.approx({"average_precision": 5 / 6, "auc": 0.75})
    prepared = Population(SMALL, data, make_partition(data, "natural", None, 0), 0).client("bank-01")
    assert np.isfinite(prepared.train.x).all()
    assert np.abs(prepared.train.x).max() < 12
