"""Event trees: what they count, and that a ledger gets back what it wrote."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.errors import StateError, StudyError
from fedlearn.privacy.events import (
    Composed,
    Cost,
    Gaussian,
    PoissonSampled,
    Relation,
    Repeated,
    SampledWithoutReplacement,
    ZeroConcentrated,
    leaves,
)

NOISE = st.floats(1e-3, 1e6)
GAUSSIANS = st.builds(Gaussian, NOISE)
LEAVES = st.one_of(
    GAUSSIANS,
    st.builds(PoissonSampled, st.floats(1e-9, 1.0), GAUSSIANS),
    st.builds(
        lambda m, extra, g: SampledWithoutReplacement(m, m + extra, g),
        st.integers(1, 99),
        st.integers(0, 99),
        GAUSSIANS,
    ),
    st.builds(ZeroConcentrated, st.floats(0, 10), st.floats(0, 1)),
)
EVENTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(Repeated, inner, st.integers(0, 10**6)),
        st.builds(lambda parts: Composed(tuple(parts)), st.lists(inner, max_size=4)),
    ),
    max_leaves=8,
)
COSTS = st.builds(Cost, EVENTS, st.sampled_from(Relation))


@given(COSTS)
def test_a_cost_comes_back_from_its_text(cost):
    assert Cost.from_text(cost.to_text()) == cost
    assert Cost.from_text(cost.to_text()).to_text() == cost.to_text()


def test_leaves_are_counted_through_the_tree():
    a, b = Gaussian(1.0), PoissonSampled(0.5, Gaussian(2.0))
    tree = Repeated(Composed((a, Repeated(b, 3), a, Repeated(Gaussian(9.0), 0))), 10)
    assert leaves(tree) == {a: 20, b: 30}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gaussian(0.0),
        lambda: Gaussian(-1.0),
        lambda: Gaussian(float("nan")),
        lambda: Gaussian(float("inf")),
        lambda: PoissonSampled(0.0, Gaussian(1.0)),
        lambda: PoissonSampled(1.1, Gaussian(1.0)),
        lambda: SampledWithoutReplacement(11, 10, Gaussian(1.0)),
        lambda: ZeroConcentrated(-0.1),
        lambda: ZeroConcentrated(float("inf")),
        lambda: Repeated(Gaussian(1.0), -1),
        lambda: Repeated(Gaussian(1.0), 10**13),
        lambda: Composed((Gaussian(1.0),) * 10_001),
    ],
)
def test_what_could_not_happen_cannot_be_said(make):
    with pytest.raises(StudyError, match="event"):
        make()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("relation"),
        lambda t: t.update(relation="next-door"),
        lambda t: t.update(event="Laplace"),
        lambda t: t.update(count=1.5),
        lambda t: t.update(count=True),
        lambda t: t.update(count="3"),
        lambda t: t.update(more=1),
        lambda t: t.pop("count"),
        lambda t: t.update(of=7),
        lambda t: t["of"]["of"].update(noise_multiplier=0),
        lambda t: t["of"].update(of={"event": "ZeroConcentrated", "rho": 1.0, "xi": 0.0}),
    ],
)
def test_a_text_that_is_no_cost_is_refused(change):
    tree = json.loads(Cost(Repeated(PoissonSampled(0.1, Gaussian(1.0)), 5)).to_text())
    change(tree)
    with pytest.raises(StateError):
        Cost.from_text(json.dumps(tree))


@pytest.mark.parametrize("text", ["", "null", "[]", "1", "{}", "[" * 100_000])
def test_a_text_that_is_no_object_is_refused(text):
    with pytest.raises(StateError, match="cost"):
        Cost.from_text(text)


def test_a_tree_too_deep_is_refused():
    text = '{"event":"Gaussian","noise_multiplier":1.0}'
    for _ in range(20):
        text = f'{{"event":"Repeated","count":1,"of":{text}}}'
    with pytest.raises(StateError, match="MAX_DEPTH"):
        Cost.from_text(text[:-1] + ',"relation":"replace-one"}')
