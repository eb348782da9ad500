"""What an epsilon rests on beyond its formula: a study, which a server writes, cannot take the noise or the secrets away."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedlearn.arrays import Spec
from fedlearn.errors import DataError, StudyError, UnsupportedError
from fedlearn.learning import local
from fedlearn.learning.collect import SumCollector
from fedlearn.learning.postprocess import joint_l2_norm
from fedlearn.learning.task import Batch, ClientData
from fedlearn.learning.update import DELTA, Update
from fedlearn.privacy.central import CentralPlan
from fedlearn.privacy.clipping import next_clip
from fedlearn.privacy.dpsgd import DpSgd
from fedlearn.privacy.ghost import GhostGradients
from fedlearn.privacy.mechanisms import secret_chance, seeded_chance
from fedlearn.privacy.plan import CLIPS, AdaptiveClip, FixedClip, PoissonSampling, PrivacyPlan, Unit
from fedlearn.privacy.site import SitePlan, site_plan
from fedlearn.release.journal import DictJournal
from fedlearn.release.keys import AttemptId
from fedlearn.study import TrainTable
from strategies import create
from tests.support.tiny_task import TinyTask, tiny_study

PLAN = PrivacyPlan(Unit.RECORD, PoissonSampling(1.0), FixedClip(1.0), 1.0, 1e-4, units=8, rounds=1, steps=40)


@pytest.mark.parametrize("clip_l2", [1e-25, 9e-10, 1.1e9, 1e25, float("inf"), float("nan")])
def test_no_study_asks_for_a_clip_whose_noise_float32_cannot_hold(clip_l2):
    # At 1e-25 every number of the noise was 0, and the clipped gradient was there, for a learning rate of 1e25 to show.
    for clipping in (FixedClip, AdaptiveClip):
        with pytest.raises(StudyError, match="clip_l2"):
            clipping(clip_l2)


def test_no_adaptive_clip_runs_to_where_there_is_no_noise():
    clipping = AdaptiveClip(1.0, quantile=1e-6, rate=10.0)
    clip = 1.0
    for _ in range(100):
        clip = next_clip(replace(PLAN, clipping=clipping), clipping, clip, 8, 8, seeded_chance(1))
    assert clip == CLIPS[0]
    model = nn.Linear(3, 2)
    x = torch.randn(8, 3)
    dp = DpSgd(
        model, lambda rows: model(x[rows]).square().sum(1), 8, replace(PLAN, clipping=clipping), seeded_chance(2)
    )
    for _ in range(PLAN.steps):
        found = dp.gradient()
    assert all(bool((value != 0).all()) for value in found.values())


@pytest.mark.parametrize("std", [1e-25, 1e-16, 1e19, float("inf"), float("nan"), 0.0])
def test_noise_that_float32_cannot_hold_is_refused(std):
    with pytest.raises(ValueError, match="noise"):
        secret_chance().normal(4, std, np.float32)


@pytest.mark.parametrize("std", [1e-15, 1e18])
def test_noise_at_the_ends_of_float32_is_what_was_asked_for(std):
    found = seeded_chance(1, "ends").normal(20_000, std, np.float32).astype(np.float64) / std
    assert abs(found.std() - 1) < 0.03


class Seen(nn.Dropout):
    """Dropout that tells what it drew."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self.masks: list[torch.Tensor] = []

    def forward(self, x):
        kept = super().forward(torch.ones_like(x))
        self.masks.append(kept.detach().clone())
        return x * kept


def train(model: nn.Module, chance, rows: int) -> None:
    """One round of one step on all rows."""
    x = np.random.default_rng(0).normal(size=(rows, 6)).astype(np.float32)
    batch = Batch(x, np.zeros(rows, dtype=np.int64))
    start = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    local.fit(
        TinyTask(),
        model,
        create("fedavg"),
        TrainTable(),
        ClientData(batch, batch.between(0, 0)),
        place=local.Place(7, 1, "site"),
        global_model=start,
        shared={},
        state={},
        private=SitePlan(replace(PLAN, steps=1), chance),
    )


def masks(chance, rows: int) -> list[torch.Tensor]:
    """What dropout draws in one step."""
    layer = Seen()
    train(nn.Sequential(nn.Flatten(), layer, nn.Linear(6, 3)), chance, rows)
    return layer.masks[7:]  # the first seven are of rows of nobody


def test_what_layers_draw_is_secret_where_batches_are():
    # Known masks go by the place in a batch: one row more moves every later row to another one, and the sum by far more than a clip.
    assert not torch.equal(masks(secret_chance(), 8)[0], masks(secret_chance(), 8)[0])
    assert torch.equal(masks(seeded_chance(1), 8)[0], masks(seeded_chance(1), 8)[0])
    first, second = masks(secret_chance(), 1024)
    assert not torch.equal(first, second)


class Centred(nn.Module):
    """Takes the batch's mean away, in one of several places."""

    def __init__(self, *, recurrent: bool, detached: bool) -> None:
        super().__init__()
        self.body = nn.Linear(6, 4)
        self.tail = nn.GRUCell(4, 3) if recurrent else nn.Linear(4, 3)
        self.detached = detached

    def forward(self, x):
        centre = x.mean(0)
        return self.tail(self.body(x - (centre.detach() if self.detached else centre)))


@pytest.mark.parametrize("rows", [2, 30])
@pytest.mark.parametrize(("recurrent", "detached"), [(False, True), (False, False), (True, True), (True, False)])
def test_a_model_that_mixes_rows_never_trains(recurrent, detached, rows):
    # One row more would move every other row's gradient: by its clip, and not by nothing.
    torch.manual_seed(rows)
    with pytest.raises(UnsupportedError, match="beside it"):
        train(Centred(recurrent=recurrent, detached=detached), secret_chance(), rows)


def test_how_many_rows_a_site_has_refuses_nothing_over_the_link():
    # A refusal at delta >= 1 / n, free of charge, tells the number of rows to whoever asks for one delta after another.
    for unit in ("record", "group"):
        more = ("privacy.group=who",) if unit == "group" else ()
        study = tiny_study(f"privacy.unit={unit}", "privacy.noise_multiplier=1.0", "privacy.delta=0.009", *more)
        for rows in (0, 1, 111, 112):
            batch = Batch(np.zeros((rows, 3)), np.zeros(rows), np.arange(rows).astype(str))
            assert site_plan(study, 1, "ada", batch, rehearsal=False) is not None
            with pytest.raises(DataError, match=r"rows|delta") if rows in {0, 112} else contextlib.nullcontext():
                site_plan(study, 1, "ada", batch, rehearsal=True)


def test_a_site_whose_rows_all_test_sends_noise():
    model = nn.Linear(6, 3)
    train(model, secret_chance(), 0)


@pytest.mark.parametrize("mechanism", ["gaussian", "ftrl"])
def test_noise_covers_what_rounding_to_the_sums_quantum_adds(mechanism):
    """A sum is of integers of 2^-32. 1e-9 spread over 10,000 numbers is 1e-11 each and comes out as nothing; 1.2e-8 comes out as 2.3e-8."""
    clip, size = 1.2e-8, 10_000
    more = ("privacy.mechanism=ftrl", "privacy.min_separation=1") if mechanism == "ftrl" else ()
    study = tiny_study(
        "privacy.unit=client",
        "privacy.noise_multiplier=3.0",
        "privacy.delta=1e-3",
        "privacy.units=4",
        f"privacy.clip_l2={clip}",
        *more,
    )
    total = SumCollector(create("fedavg"), {"w": Spec((size,), "float32")})
    update = Update({DELTA: {"w": np.full(size, clip / 100, dtype=np.float32)}}, examples=1)
    assert joint_l2_norm(update) == pytest.approx(clip)
    total.add("ada", update)
    moved = float(np.linalg.norm(total.totals()[DELTA]["w"]))
    assert moved > 1.9 * clip
    central = CentralPlan.of(study, DictJournal(), "run", rehearsal=True)
    assert central is not None
    central.opening()
    found, _ = central.release(AttemptId(1, 1), total, {})
    noise = found.means[DELTA]["w"] * 4 - total.totals()[DELTA]["w"]
    assert noise.std() >= 0.97 * central.plan.sum_noise_multiplier * moved


@pytest.mark.parametrize("places", [0, 2])
@pytest.mark.parametrize("small", [1e-23, 1e-20])
def test_no_weights_that_a_server_chooses_get_a_gradient_past_its_clip(places, small):
    """Inputs whose squares float32 has not, and gradients that make up for it: their norm came out as 0, and nothing was clipped."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 40, bias=False), nn.Linear(40, 40, bias=False), nn.Linear(40, 2, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(small)
        model[1].weight.zero_()  # so that only its own gradient is there: 26,000 clips long
        model[2].weight.mul_(1e-5 / small)
    x = torch.randn(1, *([places] if places else []), 4)
    found = GhostGradients(model)(lambda: model(x).flatten(1)[:, :2].sum(1), 1e-9)
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in found.gradients.values()))
    assert 0 < norm <= 1e-9 * (1 + 1e-5)
