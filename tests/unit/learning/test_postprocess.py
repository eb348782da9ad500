"""The chain of postprocessors: what clipping promises, for every update."""

from __future__ import annotations

from dataclasses import dataclass, replace

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.errors import UpdateError
from fedlearn.learning.postprocess import ClipL2, apply_on_client, apply_on_server, chain_of, joint_l2_norm
from fedlearn.learning.update import Aggregate, Update
from tests.support.tiny_task import tiny_study

DTYPES = st.sampled_from([np.float16, np.float32, np.float64])


def arrays(dtype) -> st.SearchStrategy:
    width = np.dtype(dtype).itemsize * 8
    limit = {16: 100.0, 32: 2.0**100, 64: 2.0**400}[width]
    return hnp.arrays(
        dtype, hnp.array_shapes(min_dims=0, max_dims=2, max_side=4), elements=st.floats(-limit, limit, width=width)
    )


UPDATES = st.dictionaries(
    st.sampled_from(["delta", "control"]),
    st.dictionaries(st.sampled_from("abc"), DTYPES.flatmap(arrays), min_size=1),
    min_size=1,
).map(lambda private: Update(private, examples=3, facts={"loss": 1.0}))


def flat(update: Update) -> np.ndarray:
    return np.concatenate(
        [
            update.private[r][n].astype(np.float64).ravel()
            for r in sorted(update.private)
            for n in sorted(update.private[r])
        ]
    )


@given(UPDATES, st.floats(1e-3, 1e6))
def test_a_clipped_update_is_within_its_bound(update, bound):
    clipped = ClipL2(bound).on_client(update)
    assert joint_l2_norm(clipped) <= bound * (1 + 1e-12)
    assert (clipped.examples, clipped.facts) == (3, {"loss": 1.0})
    for release, named in update.private.items():
        for name, array in named.items():
            assert clipped.private[release][name].dtype == array.dtype
            assert clipped.private[release][name].shape == array.shape


@given(UPDATES, st.floats(1e-3, 1e6))
def test_what_is_within_its_bound_is_left_alone(update, bound):
    if joint_l2_norm(update) <= bound:
        assert ClipL2(bound).on_client(update) is update


@given(UPDATES, st.floats(1e-3, 1e6))
def test_clipping_keeps_the_direction_and_never_lifts_a_value(update, bound):
    before, after = flat(update), flat(ClipL2(bound).on_client(update))
    assert (np.abs(after) <= np.abs(before)).all()
    assert (after * before >= 0).all()


def test_all_releases_are_one_vector():
    update = Update({"delta": {"w": np.array([3.0])}, "control": {"w": np.array([4.0])}}, examples=1)
    assert joint_l2_norm(update) == 5
    clipped = ClipL2(1.0).on_client(update)
    assert clipped.private["delta"]["w"] == pytest.approx(0.6)
    assert clipped.private["control"]["w"] == pytest.approx(0.8)


def test_rounding_does_not_lift_the_norm():
    """Plain rounding of these float16 values would end above the bound."""
    update = Update({"delta": {"w": np.full(1000, 1.001, np.float16)}}, examples=1)
    for bound in np.linspace(0.1, 20, 50):
        assert joint_l2_norm(ClipL2(float(bound)).on_client(update)) <= bound * (1 + 1e-12)


def test_nothing_to_clip_in_zeros():
    update = Update({"delta": {"w": np.zeros(3), "e": np.zeros((0, 2))}}, examples=1)
    assert ClipL2(1e-300).on_client(update) is update


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value):
    update = Update({"delta": {"w": np.array([0.0, value], np.float32)}}, examples=1)
    with pytest.raises(UpdateError, match="not finite"):
        ClipL2(1.0).on_client(update)


@pytest.mark.parametrize("values", [[1e200], [1.3e154] * 3, [1e308, -1e308]])
def test_a_norm_beyond_floats_is_refused(values):
    update = Update({"delta": {"w": np.array(values)}}, examples=1)
    with pytest.raises(UpdateError, match="its L2 norm is inf"):
        ClipL2(1.0).on_client(update)


@dataclass(frozen=True)
class Times:
    factor: float
    seen: list

    def on_client(self, update):
        self.seen.append(("client", self.factor))
        return replace(update, examples=int(update.examples * self.factor))

    def on_server(self, aggregate):
        self.seen.append(("server", self.factor))
        return replace(aggregate, examples=int(aggregate.examples / self.factor))


def test_a_chain_is_applied_in_order_and_undone_in_reverse():
    seen: list = []
    chain = (Times(2, seen), Times(3, seen))
    assert apply_on_client(chain, Update({}, examples=5)).examples == 30
    assert apply_on_server(chain, Aggregate({}, 1, 1, examples=30)).examples == 5
    assert seen == [("client", 2), ("client", 3), ("server", 3), ("server", 2)]


def test_a_study_names_its_chain():
    assert chain_of(tiny_study()) == ()
    assert chain_of(tiny_study("update.clip_l2=0.5")) == (ClipL2(0.5),)
