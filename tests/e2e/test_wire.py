"""What leaves a site over the link under a record-level plan: every byte is accounted for, and none tells of the data.

The coordinator runs in this process and everything is taken down as it comes out of TLS. Two runs on neighbouring data sets (one patient more), with the
same seeded chance, must then differ in the noisy arrays and nowhere else.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

import fedlearn
from fedlearn import events
from fedlearn.learning import messages
from fedlearn.learning.heads import LEDGER
from fedlearn.learning.runtime import RunRuntime
from fedlearn.link import LinkLimits, frames, framing
from fedlearn.link.states import Received
from fedlearn.privacy.chain import SignedHead
from fedlearn.privacy.plan import FixedClip, PoissonSampling
from fedlearn.privacy.study import plan_of
from fedlearn.release.journal import DictJournal
from server.app import app as server_app
from tests.support.heads import Heads
from tests.support.link_net import link_net
from tests.support.processes import Family, family
from tests.support.runs import Run, to_toml
from tests.support.wire_tap import Tap, tapped

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "simulations" / "heart.toml"
OVERRIDES = (
    "rounds=2",
    "privacy.unit=record",
    "privacy.noise_multiplier=2.0",
    "privacy.delta=1e-5",
    "privacy.steps=3",
    "privacy.seeded=true",
    "train.batch_size=32",
    "train.epochs=1",
    "cohort.wait_for=1",
    "cohort.minimum=1",
    "evaluate.every=1",
)
CHARGED = (*OVERRIDES, "privacy.evaluation_noise=4.0")
POLICY = "seeded = true\n[budgets.record]\nepsilon = 100.0\ndelta = 1e-5\n"
PATIENTS = 97
"""A number that stands nowhere in a message by chance."""

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(200)]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Family]:
    with family(tmp_path, {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) as members:
        yield members


def patients(path: Path, count: int) -> Path:
    """The first patients of Cleveland, in a file that does not say where they are from."""
    lines = Path(str(files("fedlearn.data") / "files" / "heart_disease_uci.csv")).read_text().splitlines()
    column = lines[0].split(",").index("dataset")
    kept = [",".join(cell for at, cell in enumerate(line.split(",")) if at != column) for line in lines[: count + 1]]
    path.write_text("\n".join(kept) + "\n")
    return path


def overheard(processes: Family, folder: Path, data: Path, overrides: tuple[str, ...]) -> tuple[Tap, Run]:
    """A run with one site on a data file, and all that it sent."""
    folder.mkdir()
    (folder / "policy.toml").write_text(POLICY)
    with tapped() as tap, link_net(folder) as link:
        tls = link.issue("cleveland")
        agent = processes.start(
            *(sys.executable, "-m", "fedlearn.cli", "client", "--server", link.server.address, "--tls", str(tls)),
            *("--state", str(folder / "state"), "--policy", str(folder / "policy.toml"), "--data", str(data)),
            *("--device", "cpu", "--task", "hospital/heart"),
        )
        agent.wait_for("connected to", timeout_s=60)
        run, grid, study = Run(), link.grid(1), fedlearn.load_study(STUDY, overrides)
        grid.runtime = RunRuntime(
            *("run-1", to_toml(study), (), run.finished, run.events.append, DictJournal(), lambda: False),
            *(link.name_of, Heads()),
        )
        server_app(grid, Context(1, 1, {}, RecordDict(), {}))
        agent.stop()
    return tap, run


def skeleton(one: Received, message: Message) -> str:
    """All that a message says but its arrays' values, and what is random or a time by design: ids, clocks, hashes and signatures."""
    told: dict[str, object] = {"error": message.error.reason if message.has_error() else ""}
    for name in ("run_id", "src_node_id", "dst_node_id", "group_id", "message_type"):
        told[name] = getattr(message.metadata, name)
    for name, record in message.content.items() if message.has_content() else ():
        match record:
            case ArrayRecord():
                told[name] = [(key, a.dtype, list(a.shape), a.stype, len(a.data)) for key, a in record.items()]
            case ConfigRecord() if name == LEDGER:
                heads = [SignedHead.from_text(str(text)) for text in record["heads"]]  # type: ignore[union-attr]
                told[name] = [(head.site, head.data_set, head.seq) for head in heads]
            case ConfigRecord() | MetricRecord():
                told[name] = dict(record)
    told["metadata bytes"] = len(one.metadata) - sum(len(str(t)) for t in _varying(message))
    return json.dumps(told, sort_keys=True, default=str)


def _varying(message: Message) -> list[str]:
    """Texts whose length may differ from run to run: an ECDSA signature has 70 to 72 bytes."""
    if not message.has_content() or LEDGER not in message.content:
        return []
    return [str(text) for text in message.content.config_records[LEDGER]["heads"]]  # type: ignore[union-attr]


def noisy(message: Message) -> list[np.ndarray]:
    """The arrays of an update."""
    found = []
    for key in message.content if message.has_content() else ():
        if key.startswith(messages.PRIVATE) or key == "cells":
            found += list(messages.from_record(message.content, key).values())
    return found


def said(tap: Tap) -> dict[str, list[frames.Frame]]:
    """The site's frames by kind."""
    by_kind: dict[str, list[frames.Frame]] = {}
    for data in tap.frames:
        frame = framing.unpack(data, LinkLimits())
        by_kind.setdefault(type(frame).__name__, []).append(frame)
    return by_kind


@pytest.mark.parametrize("overrides", [OVERRIDES, CHARGED], ids=["no evaluation", "charged evaluation"])
def test_two_runs_on_neighbouring_data_differ_in_the_noisy_arrays_alone(
    processes: Family, tmp_path: Path, overrides: tuple[str, ...]
):
    taps = []
    for name, count in (("more", PATIENTS), ("less", PATIENTS - 1)):
        tap, run = overheard(processes, tmp_path / name, patients(tmp_path / f"{name}.csv", count), overrides)
        assert not run.of(events.ClientDropped)
        assert len(run.of(events.RoundFinished)) == 2
        taps.append(tap)
    skeletons = [[skeleton(*pair) for pair in zip(tap.received, tap.messages, strict=True)] for tap in taps]
    assert skeletons[0] == skeletons[1]
    pairs = list(zip(*(tap.messages for tap in taps), strict=True))
    carrying = [(noisy(a), noisy(b)) for a, b in pairs if noisy(a)]
    assert len(carrying) == (4 if overrides is CHARGED else 2)
    assert all(
        any((x != y).any() for x, y in zip(a, b, strict=True)) for a, b in carrying
    )  # or there is nothing to see
    kinds = [said(tap) for tap in taps]
    for one in kinds:
        assert set(one) <= {"Hello", "Heartbeat", "Start", "Chunk", "End", "Ack", "Goodbye"}
        assert [dict(f.facts) for f in one["Hello"]] == [{"task": "hospital/heart", "device": "cpu"}]  # type: ignore[union-attr]
    assert [len(kinds[0][kind]) for kind in ("Start", "Ack")] == [len(kinds[1][kind]) for kind in ("Start", "Ack")]
    assert [sum(len(f.data) for f in one["Chunk"]) for one in kinds] == [  # type: ignore[union-attr]
        sum(len(b) for r in tap.received for b in r.buffers) for tap in taps
    ]


def test_no_count_loss_metric_or_number_of_steps_leaves(processes: Family, tmp_path: Path):
    tap, run = overheard(processes, tmp_path / "s", patients(tmp_path / "data.csv", PATIENTS), OVERRIDES)
    kinds = []
    for message in tap.messages:
        assert not message.has_error()
        content = message.content
        told = dict(content.config_records[messages.RECORD])
        ledger = content.config_records.pop(LEDGER)
        assert list(ledger) == ["heads"]
        if "client" in told:
            kinds.append("description")
            assert list(content) == [messages.RECORD]
            assert told == {"format": messages.FORMAT, "client": "cleveland"}
        else:
            kinds.append("update")
            assert sorted(content) == ["facts", messages.RECORD, "private.delta"]
            assert told == {"format": messages.FORMAT, "examples": 1}
            assert not content.metric_records["facts"]
            arrays = messages.from_record(content, "private.delta")
            assert {name: (a.shape, a.dtype) for name, a in arrays.items()} == {
                name: (a.shape, a.dtype) for name, a in run.model.items()
            }
    assert kinds == ["description", "update", "update"]
    assert not run.of(events.Evaluated)
    outside = b"".join(one.metadata for one in tap.received)
    for word in (b"loss", b"auc", b"steps", b"rows", b"accuracy"):
        assert word not in outside


def test_what_crosses_the_wire_has_the_plans_noise(processes: Family, tmp_path: Path):
    """With far more noise than gradient, each coordinate is the sum of the steps' noise, and no two rounds share any."""
    secret = tuple(o for o in OVERRIDES if "seeded" not in o and "noise_multiplier" not in o)
    overrides = (*secret, "privacy.noise_multiplier=100.0", "rounds=4")
    tap, _ = overheard(processes, tmp_path / "s", patients(tmp_path / "data.csv", PATIENTS), overrides)
    study = fedlearn.load_study(STUDY, overrides)
    plan = plan_of(study)
    assert plan is not None
    assert isinstance(plan.sampling, PoissonSampling)
    assert isinstance(plan.clipping, FixedClip)
    of_one_step = plan.noise_multiplier * plan.clipping.clip_l2 / (plan.sampling.rate * plan.units)
    expected = study.train.lr * of_one_step * math.sqrt(plan.steps)
    rounds = [np.concatenate([a.ravel() for a in arrays]) for m in tap.messages if (arrays := noisy(m))]
    sent = np.stack(rounds)
    assert sent.shape[0] == 4
    assert sent.std() == pytest.approx(expected, rel=5 / math.sqrt(2 * sent.size))  # five standard errors
    assert abs(np.corrcoef(sent) - np.eye(4)).max() < 5 / math.sqrt(sent.shape[1])
