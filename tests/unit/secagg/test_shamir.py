"""Shamir's scheme: exact in any subset, nothing from fewer, liars found."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlearn.secagg.breach import SecureAggregationError
from fedlearn.secagg.primitives import SeededDraw
from fedlearn.secagg.shamir import PRIME, SHARE_BYTES, check_share, combine, liars, split, subsets


def shares_of(secret, threshold, holders, seed=b"shares"):
    return dict(enumerate(split(secret, threshold, holders, SeededDraw(seed)), start=1))


def test_the_modulus_is_prime_and_the_smallest_above_all_secrets():
    def probably_prime(n):
        d, s = n - 1, 0
        while d % 2 == 0:
            d, s = d // 2, s + 1
        for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41):
            x = pow(base, d, n)
            if x in {1, n - 1}:
                continue
            for _ in range(s - 1):
                x = x * x % n
                if x == n - 1:
                    break
            else:
                return False
        return True

    assert probably_prime(PRIME)
    assert not any(probably_prime(2**256 + i) for i in range(297))


@given(st.binary(min_size=32, max_size=32), st.integers(1, 30), st.data())
def test_any_threshold_of_shares_give_the_secret(secret, holders, data):
    threshold = data.draw(st.integers(1, holders))
    shares = shares_of(secret, threshold, holders)
    chosen = data.draw(st.permutations(sorted(shares)))[:threshold]
    assert combine({x: shares[x] for x in chosen}) == secret
    assert all(len(share) == SHARE_BYTES for share in shares.values())


@pytest.mark.parametrize("holders", [100, 200, 1000])
def test_many_holders(holders):
    secret = b"\xff" * 32
    shares = shares_of(secret, holders // 2 + 1, holders)
    chosen = random.Random(1).sample(sorted(shares), holders // 2 + 1)
    assert combine({x: shares[x] for x in chosen}) == secret


def test_one_share_too_few_fits_every_secret_alike():
    # With t - 1 shares, each candidate secret is given by exactly one value of the missing share.
    shares = shares_of(b"s" * 32, 3, 5)
    two = {1: shares[1], 2: shares[2]}
    found = {combine({**two, 3: value.to_bytes(SHARE_BYTES, "big")}) for value in range(50)}
    assert len(found) == 50


def test_shares_of_one_secret_are_spread_over_the_field():
    tops = Counter(split(bytes(32), 2, 2, SeededDraw(i.to_bytes(4, "big")))[0][1] >> 4 for i in range(4000))
    chi2 = sum((tops[i] - 250) ** 2 / 250 for i in range(16))
    assert chi2 < 45, "99.99th percentile of chi-square with 15 degrees is 44.3"


@pytest.mark.parametrize(("size", "threshold", "holders"), [(31, 2, 3), (33, 2, 3), (32, 0, 3), (32, 4, 3)])
def test_impossible_splits_are_refused(size, threshold, holders):
    with pytest.raises(ValueError, match="shamir"):
        split(bytes(size), threshold, holders, SeededDraw(b""))


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), PRIME.to_bytes(33, "big"), b"\xff" * 33])
def test_a_share_that_is_no_field_element_is_refused(share):
    with pytest.raises(SecureAggregationError, match="share"):
        check_share(share)


def test_the_largest_field_elements_are_shares_but_no_secrets():
    assert check_share((PRIME - 1).to_bytes(33, "big"))
    assert combine({1: (PRIME - 1).to_bytes(33, "big")}) is None


@given(st.integers(4, 9), st.data())
def test_false_shares_are_named_and_a_good_subset_comes_up(holders, data):
    threshold = data.draw(st.integers(2, holders - 2))
    shares = shares_of(b"s" * 32, threshold, holders)
    lying = data.draw(st.sets(st.sampled_from(sorted(shares)), max_size=holders - threshold))
    given_shares = {x: (1).to_bytes(33, "big") if x in lying else share for x, share in shares.items()}
    good = next(s for s in subsets(list(given_shares), threshold) if not lying & set(s))
    assert combine({x: given_shares[x] for x in good}) == b"s" * 32
    assert set(liars(given_shares, good)) == lying


def test_subsets_are_each_tried_once_and_all_of_them():
    found = list(subsets([4, 1, 9, 7, 2], 3))
    assert len(found) == len(set(found)) == 10
    assert set(found) == set(itertools.combinations([1, 2, 4, 7, 9], 3))
    assert list(subsets([1, 2], 3)) == []
