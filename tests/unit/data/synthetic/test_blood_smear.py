from __future__ import annotations

import hashlib

import numpy as np
import pytest

from fedlearn.data.synthetic.blood_smear import CLASSES, blood_smear_synthetic, cells, scan, scanner_of

GOLDEN = "a5501da4cc927e1633b4af412fb32e706a838f2c50282873d413341d126ae0ff"


def test_a_small_sample_is_the_golden_one():
    x, y, hospital = blood_smear_synthetic(2, 5, 7, size=16)
    assert (x.dtype, x.shape, y.dtype, hospital.tolist()) == (np.uint8, (10, 3, 16, 16), np.int64, [0] * 5 + [1] * 5)
    assert hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest() == GOLDEN


def test_a_hospital_does_not_depend_on_how_many_there_are():
    two, three = blood_smear_synthetic(2, 6, 1, size=16), blood_smear_synthetic(3, 6, 1, size=16)
    assert np.array_equal(two[0], three[0][:12])


def test_no_shift_makes_all_scanners_alike_and_shift_makes_them_differ():
    assert scanner_of(0, 1, 0.0) == scanner_of(1, 1, 0.0)
    light = cells(np.arange(4), np.random.default_rng(0))
    one, other = (scan(light, scanner_of(h, 1), np.random.default_rng(0)).astype(float) for h in (4, 5))
    assert np.abs(one - other).mean() > 10


def test_class_mix_follows_alpha():
    _, y, _ = blood_smear_synthetic(1, 2_000, 3, size=16, alpha=1e6)
    assert np.bincount(y, minlength=len(CLASSES)) == pytest.approx([500] * 4, abs=80)


def test_classes_can_be_told_apart_by_eye_and_by_area():
    y = np.repeat(np.arange(4), 50)
    dark = (cells(y, np.random.default_rng(0))[:, 0] < 0.55).mean(axis=(1, 2))
    area = [dark[y == label].mean() for label in range(4)]
    assert area[1] > area[2]
    assert area[0] > area[3]
