from __future__ import annotations

import hashlib

import numpy as np

from fedlearn.data.payments import DAY_S, FEATURE_NAMES, LABEL_DELAY_DAYS, payment_features
from fedlearn.data.synthetic.fraud import LARGE_AMOUNT, FraudParameters, Transactions, fraud_synthetic

SMALL = FraudParameters(customers=120, terminals=60, days=40, radius=20.0, terminals_a_day=0.3, cards_a_day=0.3)
GOLDEN = "2964436eb54200b4eb481e2b611e4404429b71862bc38ffa752d57a57ee6107b"


def test_a_small_sample_is_the_golden_one():
    p = fraud_synthetic(SMALL, 7)
    columns = (p.time_s, p.customer, p.terminal, (p.amount * 100).round().astype(np.int64), p.scenario, p.bank)
    assert hashlib.sha256(b"".join(c.tobytes() for c in columns)).hexdigest() == GOLDEN


def test_what_the_datasheet_says():
    p = fraud_synthetic(FraudParameters(), 1)
    assert 300_000 < len(p) < 400_000
    assert (np.diff(p.time_s) >= 0).all()
    assert p.amount.min() >= 0
    share = np.bincount(p.scenario, minlength=4) / len(p)
    assert 0.01 < share[1:].sum() < 0.02
    assert (share[1:] > 0).all()
    assert (p.scenario[p.amount > LARGE_AMOUNT] > 0).all()
    assert sorted(np.unique(p.bank)) == [0, 1, 2, 3, 4]
    assert all(len(np.unique(p.bank[p.customer == c])) <= 1 for c in range(0, 2000, 97))
    # Terminals are shared: most see customers of several banks.
    banks_at = [len(np.unique(p.bank[p.terminal == t])) for t in range(0, 1000, 37)]
    assert np.median(banks_at) >= 3


def slow_features(p, frauds):
    """The definition, one payment at a time."""
    rows = []
    for i in range(len(p)):
        t = p.time_s[i]
        row = [np.log1p(p.amount[i]) - 4, t % DAY_S < 6 * 3600, (t // DAY_S) % 7 >= 5]
        mean = 0.0
        for days in (1, 7, 30):
            mine = (p.customer == p.customer[i]) & (p.time_s < t) & (p.time_s >= t - days * DAY_S)
            mean = p.amount[mine].mean() if mine.any() else 0.0
            row += [np.log1p(mine.sum()) - 1, np.log1p(mean) - 3]
        known = t - LABEL_DELAY_DAYS * DAY_S
        for days in (1, 7, 30):
            here = (p.terminal == p.terminal[i]) & (p.time_s < known) & (p.time_s >= known - days * DAY_S)
            row += [np.log1p(here.sum()) - 1, 3 * frauds[here].mean() if here.any() else 0.0]
        row.append(np.log((p.amount[i] + 1) / (mean + 1)))
        rows.append(row)
    return np.array(rows, dtype=np.float64)


def test_features_are_their_definition():
    p = fraud_synthetic(FraudParameters(customers=25, terminals=8, days=45, radius=60.0, cards_a_day=0.4), 3)
    frauds = p.scenario > 0
    assert frauds.sum() > 20
    features = payment_features(p, frauds)
    assert features.shape == (len(p), len(FEATURE_NAMES))
    assert np.allclose(features, slow_features(p, frauds), atol=1e-4)


def test_features_see_no_future_and_no_label_before_its_delay():
    p = fraud_synthetic(SMALL, 2)
    frauds = p.scenario > 0
    cut = len(p) // 2
    before = payment_features(p, frauds)[: cut + 1]
    head = Transactions(*(getattr(p, name)[: cut + 1] for name in Transactions.__dataclass_fields__))
    assert np.allclose(before, payment_features(head, frauds[: cut + 1]), atol=1e-4)
    recent = p.time_s >= p.time_s[cut] - LABEL_DELAY_DAYS * DAY_S
    assert np.array_equal(payment_features(p, frauds)[cut], payment_features(p, frauds ^ recent)[cut])
