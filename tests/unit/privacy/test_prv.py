"""Opacus' PRV accountant: the same numbers as loaded whole, quickly, and no answer where it has none."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest

from fedlearn.privacy.accounting import Method, account, pld_epsilon
from fedlearn.privacy.events import Composed, Cost, Gaussian, PoissonSampled, Repeated, leaves
from fedlearn.privacy.prv import LEAST_DELTA, interval

RELEASES = {
    "sampled": {PoissonSampled(0.01, Gaussian(1.0)): 1_000},
    "everybody": {Gaussian(5.0): 30},
    "with evaluations": {PoissonSampled(0.05, Gaussian(2.0)): 200, Gaussian(20.0): 4},
}


@pytest.mark.parametrize("counts", RELEASES.values(), ids=RELEASES)
def test_it_says_what_the_whole_of_opacus_says(counts):
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant

        whole = PRVAccountant()
        whole.history = [
            (leaf.noise_multiplier, 1.0, n)
            if isinstance(leaf, Gaussian)
            else (leaf.event.noise_multiplier, leaf.rate, n)
            for leaf, n in counts.items()
        ]
        expected = whole.get_epsilon(1e-5)
    lower, estimate, upper = interval(counts, 1e-5)
    assert upper == expected
    assert lower < estimate < upper
    exact = pld_epsilon(Cost(Composed(tuple(Repeated(leaf, n) for leaf, n in counts.items()))), 1e-5)
    assert lower <= exact <= upper


def test_it_needs_no_torch():
    code = (
        "import sys\n"
        "from fedlearn.privacy.events import Gaussian\n"
        "from fedlearn.privacy.prv import interval\n"
        "assert interval({Gaussian(5.0): 3}, 1e-5)\n"
        "assert not {'torch', 'opacus'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_coarser_grid_serves_long_plans_and_nothing_serves_the_longest():
    lower, _, upper = interval({PoissonSampled(0.01, Gaussian(50.0)): 1_000_000}, 1e-5)
    assert 0.19 < upper - lower < 0.21
    assert interval({Gaussian(100.0): 1_000_000}, 1e-5) is None


@pytest.mark.parametrize(
    "leaf", [Gaussian(0.01), PoissonSampled(0.5, Gaussian(0.02)), PoissonSampled(1e-6, Gaussian(0.01))]
)
def test_what_opacus_itself_refuses_has_no_answer(leaf):
    assert interval({leaf: 1}, 0.5) is None


def test_no_epsilon_is_below_zero():
    assert interval({PoissonSampled(1e-6, Gaussian(1e5)): 1}, 1e-2) == (0.0, 0.0, 0.0)


def test_where_it_has_no_answer_two_accountants_remain(monkeypatch):
    cost = Cost(Repeated(PoissonSampled(0.01, Gaussian(1.0)), 100))
    assert interval(leaves(cost.event), LEAST_DELTA / 10) is None
    assert [b.method for b in account(cost, LEAST_DELTA / 10, prv=True).shown] == [Method.RDP]
    monkeypatch.setattr("fedlearn.privacy.prv._accountant", lambda: None)  # as without Opacus
    assert [b.method for b in account(cost, 1e-5, prv=True).shown] == [Method.RDP]
