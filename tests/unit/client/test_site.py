"""A site with a real worker process and a real journal: refusals, resends, crashes, and a sandbox that holds."""

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from client import records
from client.crew import Crew
from client.foreign import ForeignSite
from client.policy import SiteRules
from client.process import WorkerRaisedError
from client.site import Site
from fedlearn.app import load_app
from fedlearn.errors import PolicyRefusedError, RemoteProtocolError, WorkerCrashedError
from fedlearn.learning import messages
from fedlearn.learning.backend import Exchange, Work
from fedlearn.learning.checkpoint import broadcast_digest
from fedlearn.learning.local import initial_weights
from fedlearn.learning.strategy import ServerState
from fedlearn.link import flower
from fedlearn.release.charge import CostCharger
from fedlearn.release.site import SiteGate
from fedlearn.release.sqlite import SqliteJournal
from fedlearn.study import load_study
from fedlearn.tasks import load_task

ROOT = Path(__file__).resolve().parents[3]
STUDY = load_study(ROOT / "simulations" / "heart.toml", ("strategy.name=scaffold", "rounds=3"))

FOREIGN = """
import errno, os, signal, socket
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.query()
def query(message, context):
    what = message.content["ask"]["what"]
    if what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "raise":
        raise ValueError("patient 4711")
    if what == "socket":
        answers = []
        for family, kind in ((socket.AF_INET, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_DGRAM)):
            try:
                socket.socket(family, kind)
                answers.append("opened")
            except OSError as error:
                answers.append(errno.errorcode[error.errno])
        context.state["n"] = ConfigRecord({"n": 1})
        return Message(RecordDict({"a": ConfigRecord({"a": answers})}), reply_to=message)
    if what == "native socket":
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.socket(2, 1, 0)
        return Message(RecordDict({"a": ConfigRecord({"a": [errno.errorcode.get(ctypes.get_errno(), "") if fd < 0 else "opened"]})}), reply_to=message)
    if what == "environment":
        return Message(RecordDict({"a": ConfigRecord({"a": sorted(os.environ)})}), reply_to=message)
    n = context.state["n"]["n"] if "n" in context.state else 0
    return Message(RecordDict({"a": ConfigRecord({"a": [str(n)]})}), reply_to=message)
"""


def request(round_=1, attempt=1, base=None, exchange=Exchange.TRAIN, app=None, shift=0.0, digest=None):
    flower.ensure_identity(7)
    task = load_task(STUDY.task.name, STUDY.task.options)
    model = {name: a + np.float32(shift) for name, a in initial_weights(task, STUDY).items()}
    shared = {name: np.zeros_like(a) for name, a in model.items()}
    said = digest or broadcast_digest(ServerState(model, shared))
    work = Work(round_, attempt, ("cleveland",), model, shared, said, {"cleveland": base} if base else {}, 60.0)
    encoder = messages.RequestEncoder("run-1", STUDY.to_json(), app or load_app().digest)
    kinds = {Exchange.TRAIN: "train", Exchange.EVALUATE: "evaluate"}
    return Message(encoder.encode(exchange, work)["cleveland"], 5, kinds[exchange])


@pytest.fixture
async def crew():
    made = Crew(ROOT, None, "cleveland")
    yield made
    await made.close()


def site(crew, folder):
    journal = SqliteJournal(folder)
    rules = SiteRules().with_defaults("hospital/heart", load_app().digest)
    return Site(crew, rules, SiteGate(journal, CostCharger({})), {"client-id": "cleveland", "device": "cpu"}), journal


async def test_an_update_is_computed_once_and_resent_byte_for_byte_also_after_a_restart(crew, tmp_path):
    first, journal = site(crew, tmp_path)
    together = await asyncio.gather(first.handle(request()), first.handle(request()))
    payloads = {records.pack(reply.content) for reply in together}
    assert len(payloads) == 1
    journal.close()
    nobody = Crew(tmp_path / "no app is here", None, "nobody")
    again, journal = site(nobody, tmp_path)
    assert records.pack((await again.handle(request())).content) in payloads
    journal.close()


async def test_memory_follows_what_the_server_committed(crew, tmp_path):
    one, journal = site(crew, tmp_path)

    def memory(data):
        return {k: np.array(a) for k, a in messages.from_record(records.unpack(data), "memory.candidate").items()}

    await one.handle(request(1, 1))
    await one.handle(request(1, 2))
    # The second attempt was committed: the third message continues from its state, whatever the first one left.
    await one.handle(request(2, 1, base=(1, 2)))
    assert one._gate.state("run-1") is not None
    after_second = memory(one._gate.state("run-1"))
    scores = await one.handle(request(2, 1, base=(1, 2), exchange=Exchange.EVALUATE))
    assert messages.decode_scores("cleveland", scores.content).examples == 61
    assert after_second.keys() == initial_weights(load_task("hospital/heart", {}), STUDY).keys()
    journal.close()


async def test_the_same_attempt_for_another_model_is_refused(crew, tmp_path):
    one, journal = site(crew, tmp_path)
    await one.handle(request())
    with pytest.raises(PolicyRefusedError, match="other-model"):
        await one.handle(request(shift=1.0))
    journal.close()


async def test_a_broadcast_that_is_not_what_its_digest_says_is_refused(tmp_path):
    one, journal = site(Crew(tmp_path / "no app is here", None, "nobody"), tmp_path)
    with pytest.raises(RemoteProtocolError, match="digest"):
        await one.handle(request(digest="0" * 64))
    assert list(one._gate.releases()) == []
    journal.close()


async def test_another_app_is_refused_before_anything_is_computed(tmp_path):
    one, journal = site(Crew(tmp_path / "no app is here", None, "nobody"), tmp_path)
    with pytest.raises(PolicyRefusedError, match="apps"):
        await one.handle(request(app="0" * 64))
    assert list(one._gate.releases()) == []
    journal.close()


async def test_a_cancelled_call_leaves_its_worker_to_the_next(crew, tmp_path):
    """A site whose deadline passed keeps the process: starting another takes longer than many a deadline."""
    one, journal = site(crew, tmp_path)
    pid = (await crew.warm_up()).pid
    running = asyncio.create_task(one.handle(request()))
    await asyncio.sleep(0.05)  # within the call or before it: both must hold
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert (await one.handle(request(1, 2))).has_content()
    os.kill(pid, 0)
    journal.close()


async def test_a_worker_that_is_killed_costs_one_message(crew, tmp_path):
    one, journal = site(crew, tmp_path)
    pid = (await crew.warm_up()).pid
    running = asyncio.create_task(one.handle(request()))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerCrashedError, match=r"SIGKILL|exit|ended"):
        await running
    # Nothing was committed: the same attempt may be computed, by a new process.
    assert (await one.handle(request())).has_content()
    journal.close()


@pytest.fixture
async def foreign(tmp_path):
    (tmp_path / "their").mkdir()
    (tmp_path / "their" / "__init__.py").write_text("")
    (tmp_path / "their" / "app.py").write_text(FOREIGN)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.flwr.app.components]\nserverapp = "their.app:app"\nclientapp = "their.app:app"\n'
    )
    made = Crew(ROOT, tmp_path, "theirs")
    yield ForeignSite(made, {})
    await made.close()


def ask(what):
    flower.ensure_identity(7)
    return Message(RecordDict({"ask": ConfigRecord({"what": what})}), 5, "query")


def answer(reply):
    return reply.content["a"]["a"]


async def test_a_worker_opens_no_sockets_not_even_in_native_code(foreign):
    assert answer(await foreign.handle(ask("socket"))) == ["EPERM", "EPERM"]
    assert answer(await foreign.handle(ask("native socket"))) == ["EPERM"]
    # A foreign app's memory lasts between messages.
    assert answer(await foreign.handle(ask("count"))) == ["1"]


async def test_a_worker_sees_none_of_the_agents_secrets(foreign, monkeypatch):
    monkeypatch.setenv("FEDLEARN_TLS", "/keys")
    monkeypatch.setenv("DATABASE_PASSWORD", "secret")
    seen = answer(await foreign.handle(ask("environment")))
    assert "PATH" in seen
    assert not {"FEDLEARN_TLS", "DATABASE_PASSWORD"} & set(seen)


async def test_an_exception_reports_where_and_keeps_what_at_the_site(foreign):
    with pytest.raises(WorkerRaisedError, match=r"ValueError, in app\.py") as caught:
        await foreign.handle(ask("raise"))
    assert "4711" not in str(caught.value)
    assert "4711" in caught.value.detail
    assert answer(await foreign.handle(ask("count"))) == ["0"]


async def test_a_worker_that_crashes_is_named_and_replaced(foreign):
    with pytest.raises(WorkerCrashedError, match="SIGSEGV"):
        await foreign.handle(ask("die"))
    assert answer(await foreign.handle(ask("count"))) == ["0"]
