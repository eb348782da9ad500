"""Rows that a task's code cannot take count as nothing, and change nothing for the others; models are tried on rows of nobody."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedlearn.errors import UnsupportedError
from fedlearn.learning import local
from fedlearn.learning.task import Batch
from fedlearn.privacy.dpsgd import DpSgd
from fedlearn.privacy.evaluation import noisy_sums
from fedlearn.privacy.mechanisms import seeded_chance
from fedlearn.privacy.plan import FixedClip, PoissonSampling, PrivacyPlan, Unit
from fedlearn.privacy.scoring import ShareRight
from fedlearn.privacy.unfit import STAND_INS, stand_ins, where_it_works
from fedlearn.study import TrainTable
from tests.support.tiny_task import TinyTask, tiny_study


@given(bad=st.sets(st.integers(0, 19)), count=st.integers(0, 20))
def test_every_row_is_worked_on_once_but_those_that_raise(bad, count):
    def work(rows):
        if bad & set(rows.tolist()):
            raise KeyError("a row")
        return rows * 2

    found = list(where_it_works(np.arange(count), work))
    assert [row for rows, _ in found for row in rows.tolist()] == sorted(set(range(count)) - bad)
    assert all((done == rows * 2).all() for rows, done in found)


def test_one_line_says_how_many_and_why(caplog):
    def work(rows):
        if (rows > 5).any():
            raise ValueError("a label that nobody knows")

    list(where_it_works(np.arange(8), work))
    assert [r.message for r in caplog.records] == [
        "2 of 8 rows count as nothing; on the first the task's own code raised ValueError: a label that nobody knows"
    ]


def test_what_is_wrong_with_the_model_is_no_rows_fault():
    def work(_):
        raise UnsupportedError("model: it mixes")

    with pytest.raises(UnsupportedError, match="mixes"):
        list(where_it_works(np.arange(3), work))


def test_clipped_gradients_are_those_of_the_rows_that_can_be_taken():
    torch.manual_seed(1)
    model = nn.Linear(4, 3)
    x, y = torch.randn(40, 4), torch.randint(3, (40,))

    plan = PrivacyPlan(Unit.RECORD, PoissonSampling(0.5), FixedClip(0.5), 1e-9, 1e-4, units=40, rounds=1, steps=1)

    def step(losses):
        dp = DpSgd(model, losses, 40, plan, seeded_chance(3), part_rows=16)
        return dp.gradient(), dp.tally

    def raising(rows):
        return nn.functional.cross_entropy(model(x[rows]), spoilt[rows], reduction="none")

    def ignoring(rows):
        found = nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
        return found * torch.from_numpy(rows < 35)

    spoilt = torch.where(torch.arange(40) < 35, y, 7)  # a class that the model has not
    (found, tally), (expected, _) = step(raising), step(ignoring)
    assert tally.not_finite > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_a_test_row_that_raises_counts_as_nothing():
    study = tiny_study(
        "privacy.unit=record", "privacy.noise_multiplier=1", "privacy.delta=1e-3", "privacy.evaluation_noise=1e-6"
    )
    test = Batch(np.zeros((6, 3), np.float32), np.array([0, 1, 1, 1, 0, 1]))

    def outputs(rows):
        if 4 in rows:
            raise LookupError("a token that nobody knows")
        return np.tile([0.0, 1.0], (len(rows), 1))

    cells = noisy_sums(study, ShareRight(), outputs, test, (1, "ada"), rehearsal=True)
    assert cells == pytest.approx([4, 1], abs=1e-4)


@pytest.mark.parametrize(("x", "y"), [("float32", "int64"), ("int64", "int64"), ("float64", "float32")])
def test_stand_ins_look_like_the_rows_and_know_nothing_of_them(x, y):
    like = Batch(np.full((3, 2, 4), 99, x), np.full((3, 5), 99, y))
    found, others = stand_ins(like), stand_ins(Batch(np.zeros((0, 2, 4), x), np.zeros((0, 5), y)))
    assert (found.x.shape, found.y.shape) == ((STAND_INS, 2, 4), (STAND_INS, 5))
    assert (found.x.dtype, found.y.dtype) == (np.dtype(x), np.dtype(y))
    assert found.x.min() >= 0
    assert found.x.max() <= 2
    for one, other in ((found.x, others.x), (found.y, others.y)):
        assert np.array_equal(one, other)


def test_a_model_that_cannot_be_tried_says_what_on():
    class Picky(TinyTask):
        def loss(self, outputs, y):
            if not bool((y == 9).all()):
                raise ValueError("nines only")
            return super().loss(outputs, y)

    task, nines = Picky(), Batch(np.ones((4, 3), np.float32), np.full(4, 9))
    with pytest.raises(UnsupportedError, match="does not run on made-up rows: ValueError: nines only"):
        local.gradient_engine(task, task.model(), TrainTable(), nines)
