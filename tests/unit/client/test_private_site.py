"""A site under a privacy plan: charged before it is computed, and nothing leaves beside what was charged."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array as FlowerArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from client import records
from client.process import WorkerRaisedError
from client.site import MOST_FAILURES
from fedlearn.errors import (
    DataError,
    FedlearnError,
    PolicyRefusedError,
    StateError,
    UnsupportedError,
    WorkerCrashedError,
)
from fedlearn.learning import messages
from fedlearn.learning.backend import Exchange
from fedlearn.learning.heads import take_heads
from fedlearn.learning.update import UNCLIPPED, Update
from fedlearn.link import Role, TlsBundle, create_authority, issue
from fedlearn.link.closing import closing
from fedlearn.privacy.chain import SignedHead
from fedlearn.privacy.clipping import COUNT
from fedlearn.privacy.events import Cost, Gaussian
from fedlearn.privacy.ledger_file import account_states, read_records, verify_ledger
from fedlearn.privacy.study import CLIP, plan_of
from tests.support.private_site import (
    ADAPTIVE,
    APP,
    CLIENT,
    RECORD,
    SITE,
    Worker,
    ask,
    private_site,
    small_update,
    study_of,
)

SCORED = study_of('unit = "record"\nnoise_multiplier = 2.0\ndelta = 1e-5\nevaluation_noise = 8.0\n')
RECORDS = "hospital/heart/record"
CLIENTS = "hospital/heart/client"
ONE_ROUND = plan_of(RECORD).cost(1).to_text()
SHARED = {CLIP: np.array(1.0)}


async def test_every_update_is_charged_once_and_sent_again_free(tmp_path):
    with private_site(tmp_path / "s") as one:
        first = await one.site.handle(ask(RECORD))
        again = await one.site.handle(ask(RECORD))
        assert one.worker.calls == 1
        assert one.costs(RECORDS) == [ONE_ROUND]
        take_heads(first.content)
        take_heads(again.content)
        assert records.pack(first.content) == records.pack(again.content)
        await one.site.handle(ask(RECORD, 2))
        await one.site.handle(ask(RECORD, 2, attempt=2))
        assert one.costs(RECORDS) == [ONE_ROUND] * 3  # a round that is tried again costs again
    with private_site(tmp_path / "s", Worker(lambda: pytest.fail("computed again"))) as later:
        third = await later.site.handle(ask(RECORD, 2, attempt=2))
        assert messages.decode_update(third.content).examples == 1
        assert later.costs(RECORDS) == [ONE_ROUND] * 3


async def test_failures_tell_a_server_only_so_much(tmp_path):
    """What fails depends on the data, and costs nothing: a server could ask one question after another."""

    def fail():
        raise DataError("row 7: diagnosis 'flu' is not among the classes")

    with private_site(tmp_path / "s", Worker(fail)) as one:
        for number in range(MOST_FAILURES):
            with pytest.raises(WorkerCrashedError) as caught:
                await one.site.handle(ask(RECORD, 1, run=f"run-{number}"))
            assert "flu" not in caught.value.message
        one.worker.answer = small_update
        with pytest.raises(PolicyRefusedError, match=f"{MOST_FAILURES} messages of private studies failed here"):
            await one.site.handle(ask(RECORD, 1, run="one-more"))
        assert one.costs(RECORDS) == []


async def test_a_budget_that_is_spent_refuses_with_the_numbers(tmp_path):
    policy = "[budgets.record]\nepsilon = 1.5\ndelta = 1e-5\n"
    with private_site(tmp_path / "s", policy=policy) as one:
        refused = None
        for number in range(1, 6):
            try:
                await one.site.handle(ask(RECORD, number))
            except PolicyRefusedError as error:
                refused = error
                break
        assert refused is not None
        assert 1 < number < 6
        assert one.worker.calls == number - 1
        assert refused.permanent
        words = (
            rf"budget: epsilon (\d\.\d\d) of 1\.5 is spent on '{RECORDS}', and round {number} would make it (\d\.\d\d)"
        )
        said = re.fullmatch(words, refused.message)
        assert said is not None, refused.message
        assert "policy file" in refused.hint
        with pytest.raises(PolicyRefusedError, match="budget"):  # a new run finds nothing either
            await one.site.handle(ask(RECORD, exchange=Exchange.DESCRIBE, run="run-2"))
    state = {s.account: s for s in account_states(read_records(tmp_path / "s" / "ledgers" / "hospital-heart"))}[RECORDS]
    assert (state.charges, state.refusals) == (number - 1, 2)
    assert state.epsilon is not None
    assert state.epsilon <= 1.5
    assert 0 <= float(said[1]) - state.epsilon <= 0.01
    assert float(said[2]) > 1.5


async def test_the_last_update_that_fits_says_that_it_is(tmp_path):
    with private_site(tmp_path / "s", policy="[budgets.record]\nepsilon = 1.5\ndelta = 1e-5\n") as one:
        said = [messages.is_last((await one.site.handle(ask(RECORD, number))).content) for number in (1, 2)]
        assert said == [False, True]
        with pytest.raises(PolicyRefusedError) as caught:
            await one.site.handle(ask(RECORD, 3))
        assert caught.value.permanent
    whole = study_of('unit = "record"\nnoise_multiplier = 2.0\ndelta = 1e-5\n', rounds=2)
    with private_site(tmp_path / "t", policy="[budgets.record]\nepsilon = 1.5\ndelta = 1e-5\n") as one:
        for number in (1, 2):
            reply = await one.site.handle(ask(whole, number))
            assert not messages.is_last(reply.content), "no round of the study comes after it"
    state = account_states(read_records(tmp_path / "s" / "ledgers" / "hospital-heart"))
    assert [s.refusals for s in state if s.account == RECORDS] == [1], "looking ahead asks for nothing"


async def test_what_is_refused_for_good_is_marked(tmp_path):
    """Another app, another unit, a spent budget: for all of the run. An attempt that is over: for that one."""
    with private_site(tmp_path / "s", policy="[budgets.record]\nepsilon = 50.0\ndelta = 1e-5\n") as one:
        await one.site.handle(ask(RECORD, 2))
        found = {}
        for name, message in {"stale": ask(RECORD, 1), "unit": ask(CLIENT), "round": ask(RECORD, 9)}.items():
            with pytest.raises(PolicyRefusedError) as caught:
                await one.site.handle(message)
            found[name] = caught.value.permanent
        assert found == {"stale": False, "unit": True, "round": False}


async def test_who_cannot_pay_for_an_evaluation_may_still_train(tmp_path):
    dear = study_of('unit = "record"\nnoise_multiplier = 4.0\ndelta = 1e-5\nevaluation_noise = 0.5\n')
    with private_site(tmp_path / "s", policy="[budgets.record]\nepsilon = 1.5\ndelta = 1e-5\n") as one:
        await one.site.handle(ask(dear, 1))
        with pytest.raises(PolicyRefusedError, match="an evaluation after round 1 would make it") as caught:
            await one.site.handle(ask(dear, 1, exchange=Exchange.EVALUATE))
        assert not caught.value.permanent
        await one.site.handle(ask(dear, 2))


async def test_a_client_level_run_is_charged_whole_when_the_site_says_that_it_takes_part(tmp_path):
    """Whether it is ever drawn is a secret that the guarantee rests on: the ledger says the same either way."""
    whole, retry = plan_of(CLIENT).cost().to_text(), plan_of(CLIENT).cost(1).to_text()
    with private_site(tmp_path / "s") as one:
        await one.site.handle(ask(CLIENT, exchange=Exchange.DESCRIBE))
        assert one.costs(CLIENTS) == [whole]
        for number in (1, 2, 3):
            await one.site.handle(ask(CLIENT, number))
        assert one.costs(CLIENTS) == [whole]
        await one.site.handle(ask(CLIENT, 3, attempt=2))
        assert one.costs(CLIENTS) == [whole, retry]
        with pytest.raises(PolicyRefusedError, match="round 6, and the study has 5"):
            await one.site.handle(ask(CLIENT, 6))
        assert one.costs(CLIENTS) == [whole, retry]
        await one.site.handle(ask(CLIENT, run="run-2"))
        assert one.costs(CLIENTS) == [whole, retry, whole]


async def test_a_client_level_run_that_does_not_fit_is_refused_when_it_is_described(tmp_path):
    with private_site(tmp_path / "s", policy="[budgets.client]\nepsilon = 1.0\ndelta = 1e-3\n") as one:
        for exchange in (Exchange.DESCRIBE, Exchange.TRAIN):
            with pytest.raises(PolicyRefusedError, match=r"^budget: "):
                await one.site.handle(ask(CLIENT, exchange=exchange))
        assert one.worker.calls == 0
        assert one.costs(CLIENTS) == []


async def test_correlated_noise_lets_a_client_come_only_so_often(tmp_path):
    study = study_of(
        'unit = "client"\nmechanism = "ftrl"\nmatrix = "banded"\nmin_separation = 2\nmax_participations = 2\n'
        "noise_multiplier = 5.0\ndelta = 1e-3\nunits = 10\n[cohort]\nsize = 2\n"
    )
    with private_site(tmp_path / "s") as one:
        for number, fine in ((1, True), (1, True), (2, False), (3, True), (5, False), (3, True)):
            if fine:
                await one.site.handle(ask(study, number))
                continue
            with pytest.raises(PolicyRefusedError, match=f"asks for round {number}, and this site took part"):
                await one.site.handle(ask(study, number))
        assert one.costs(CLIENTS) == [plan_of(study).cost().to_text()]


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """Certificates by name: of this site's authority, and `stranger` of another."""
    folder = tmp_path_factory.mktemp("ca")
    mine, other = create_authority(folder / "mine"), create_authority(folder / "other")
    issued = {
        "coordinator": issue(mine, "coordinator", Role.SERVER, folder / "coordinator"),
        "client": issue(mine, "hungary", Role.CLIENT, folder / "client"),
        "stranger": issue(other, "coordinator", Role.SERVER, folder / "stranger"),
    }
    return {name: TlsBundle.load(path) for name, path in issued.items()}


def over(bundle: TlsBundle, rounds: int, run: str = "run-1", named: str = "run-1") -> Message:
    """A coordinator's word that `named` is over, sent for `run`."""
    encoder = messages.RequestEncoder(run, CLIENT.to_json(), APP)
    return Message(encoder.close(closing(bundle, named, rounds)), 5, "query.close")


async def test_a_run_that_ends_early_gives_back_what_did_not_take_place(tmp_path, authority):
    ca_pem = authority["coordinator"].ca_pem
    with private_site(tmp_path / "s", ca_pem=ca_pem) as one:
        for number in (1, 2):
            await one.site.handle(ask(CLIENT, number))
        for message, word in (
            (over(authority["client"], 2), "role client"),
            (over(authority["stranger"], 2), "cannot be taken"),
            (over(authority["coordinator"], 2, named="run-2"), "not signed by the coordinator"),
            (over(authority["coordinator"], 1), "released something in 2"),
            (over(authority["coordinator"], 6), "do not fit the charge"),
        ):
            with pytest.raises(FedlearnError, match=word):
                await one.site.handle(message)
        assert one.costs(CLIENTS) == [plan_of(CLIENT).cost().to_text()]
        for _ in range(2):
            reply = await one.site.handle(over(authority["coordinator"], 3))
            assert messages.decode_description(reply.content) == SITE
        assert one.costs(CLIENTS) == [plan_of(CLIENT).cost(3).to_text()]
        with pytest.raises(PolicyRefusedError, match="closed"):
            await one.site.handle(ask(CLIENT, 3))
        await one.site.handle(over(authority["coordinator"], 3, run="run-9", named="run-9"))  # never charged here
    with private_site(tmp_path / "s", ca_pem=ca_pem) as later:
        assert later.costs(CLIENTS) == [plan_of(CLIENT).cost(3).to_text()]


async def test_a_rehearsal_is_charged_to_an_account_of_its_own(tmp_path):
    study = study_of('unit = "record"\nnoise_multiplier = 2.0\ndelta = 1e-5\nseeded = true\n')
    policy = "seeded = true\n[budgets.record]\nepsilon = 50.0\ndelta = 1e-5\n"
    with private_site(tmp_path / "s", policy=policy) as one:
        await one.site.handle(ask(study))
        assert one.costs(RECORDS) == []
        assert one.costs(f"{RECORDS}/seeded") == [ONE_ROUND]


def changed(change: Callable[[RecordDict], object]) -> Callable[[], RecordDict]:
    def answer() -> RecordDict:
        content = small_update()
        change(content)
        return content

    return answer


def arrays(**values: np.ndarray) -> Callable[[], RecordDict]:
    good = {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2, np.float32)}
    return lambda: messages.encode_update(Update({"delta": {**good, **values}}, examples=1))


BREACHES = {
    "examples": (changed(lambda c: c["fedlearn"].update(examples=303)), "examples"),
    "another fact": (changed(lambda c: c["fedlearn"].update(rows=303)), "examples"),
    "facts": (changed(lambda c: c.update(facts=MetricRecord({"loss": 0.303}))), "facts"),
    "no facts record": (changed(lambda c: c.pop("facts")), "other records"),
    "another record": (changed(lambda c: c.update(log=ConfigRecord({"n": 303}))), "other records"),
    "another release": (changed(lambda c: c.update({"private.raw": ArrayRecord()})), "other records"),
    "no release": (changed(lambda c: c.pop("private.delta")), "other records"),
    "another array": (arrays(rows=np.zeros(303, np.float32)), "shaped"),
    "another shape": (arrays(b=np.zeros(303, np.float32)), "shaped"),
    "another type": (arrays(b=np.zeros(2, np.float64)), "shaped"),
    "a count in words": (changed(lambda c: c["fedlearn"].update(examples="303")), "cannot be read"),
    "another format": (
        changed(lambda c: c["private.delta"].update(b=FlowerArray("303", (2,), "303", b"303"))),
        "cannot be read",
    ),
    "nan": (arrays(b=np.array([0, np.nan], np.float32)), "finite"),
    "infinite": (arrays(b=np.array([0, np.inf], np.float32)), "finite"),
}


@pytest.mark.parametrize("name", BREACHES)
async def test_a_worker_that_breaks_the_plan_is_refused_by_name(tmp_path, name):
    answer, word = BREACHES[name]
    with private_site(tmp_path / "s", Worker(answer)) as one:
        with pytest.raises(PolicyRefusedError, match=word) as caught:
            await one.site.handle(ask(RECORD))
        assert "303" not in str(caught.value)
        assert list(one.gate.releases()) == []
        assert one.costs(RECORDS) == []
        one.worker.answer = small_update  # and the attempt may be computed again
        assert (await one.site.handle(ask(RECORD))).has_content()


async def test_an_update_beyond_the_clip_is_refused(tmp_path):
    with private_site(tmp_path / "s", Worker(arrays(b=np.array([0.8, 0.61], np.float32)))) as one:
        with pytest.raises(PolicyRefusedError, match="clip"):
            await one.site.handle(ask(CLIENT))
        one.worker.answer = arrays(b=np.array([0.8, 0.59], np.float32))
        assert (await one.site.handle(ask(CLIENT))).has_content()


@pytest.mark.parametrize(("bit", "norm", "fine"), [(1, 0.5, True), (0, 1.0, True), (0.5, 0.5, False), (1, 1.1, False)])
async def test_an_adaptive_clip_adds_one_bit_and_no_more(tmp_path, bit, norm, fine):
    delta = {"w": np.zeros((3, 2), np.float32), "b": np.array([norm, 0], np.float32)}
    unclipped = {COUNT: np.array([bit], np.float32)}
    answer = messages.encode_update(Update({"delta": delta, UNCLIPPED: unclipped}, examples=1))
    with private_site(tmp_path / "s", Worker(lambda: answer)) as one:
        if fine:
            assert (await one.site.handle(ask(ADAPTIVE, shared=SHARED))).has_content()
            return
        with pytest.raises(PolicyRefusedError, match="plan"):
            await one.site.handle(ask(ADAPTIVE, shared=SHARED))


async def test_nothing_travels_in_the_margins(tmp_path):
    """Metadata, padding and the order of things are the agent's own."""
    small, large = small_update(), small_update()
    padded = large["private.delta"]["b"]
    head, values = padded.data[:128], padded.data[128:]
    assert head.endswith(b"\n")
    padded.data = head[:8] + (192 - 10).to_bytes(2, "little") + head[10:-1] + b" " * 64 + b"\n" + values
    sent = []
    for place, answer in (("s", small), ("t", large)):
        with private_site(tmp_path / place, Worker(lambda answer=answer: answer)) as one:
            reply = await one.site.handle(ask(RECORD))
            take_heads(reply.content)
            sent.append(records.pack(reply.content))
    assert records.pack(small) != records.pack(large)
    assert sent[0] == sent[1]


async def test_a_description_says_who_and_nothing_else(tmp_path):
    told = Worker(lambda: messages.encode_description(SITE, {"rows": 303}))
    with private_site(tmp_path / "s", told) as one:
        reply = await one.site.handle(ask(RECORD, exchange=Exchange.DESCRIBE))
        take_heads(reply.content)
        assert records.pack(reply.content) == records.pack(messages.encode_description(SITE, {}))
        told.answer = lambda: messages.encode_description("patient-303", {})
        with pytest.raises(PolicyRefusedError, match="another client"):
            await one.site.handle(ask(RECORD, exchange=Exchange.DESCRIBE))


@pytest.mark.parametrize("study", [RECORD, CLIENT])
async def test_no_metric_leaves_where_the_plan_does_not_cover_it(tmp_path, study):
    with private_site(tmp_path / "s") as one:
        with pytest.raises(PolicyRefusedError, match="not covered"):
            await one.site.handle(ask(study, exchange=Exchange.EVALUATE))
        assert one.worker.calls == 0


def sums(*cells: float, metrics: dict[str, float] | None = None, examples: int = 0) -> Callable[[], RecordDict]:
    return lambda: messages.encode_scores(metrics or {}, examples, cells)


async def test_an_evaluation_is_charged_like_an_update_and_sent_again_free(tmp_path):
    one_answer = Cost(Gaussian(8.0)).to_text()
    with private_site(tmp_path / "s") as one:
        await one.site.handle(ask(SCORED))
        one.worker.answer = sums(1.5, -0.5)
        replies = [await one.site.handle(ask(SCORED, exchange=Exchange.EVALUATE)) for _ in range(2)]
        assert one.costs(RECORDS) == [ONE_ROUND, one_answer]
        assert one.worker.calls == 2
        assert {messages.decode_scores(SITE, reply.content).cells for reply in replies} == {(1.5, -0.5)}
        one.worker.answer = small_update
        await one.site.handle(ask(SCORED, 2))
        with pytest.raises(PolicyRefusedError, match="gone"):
            await one.site.handle(ask(SCORED, exchange=Exchange.EVALUATE))
        with pytest.raises(PolicyRefusedError, match="round 6"):
            await one.site.handle(ask(SCORED, 6, exchange=Exchange.EVALUATE))


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (sums(1.0, metrics={"auc": 0.9}), "more than noisy sums"),
        (sums(1.0, examples=303), "more than noisy sums"),
        (sums(np.nan), "finite"),
        (sums(), "other records"),
        (small_update, "other records"),
    ],
)
async def test_an_evaluation_that_says_more_is_refused(tmp_path, answer, word):
    with private_site(tmp_path / "s", Worker(answer)) as one:
        with pytest.raises(PolicyRefusedError, match=word):
            await one.site.handle(ask(SCORED, exchange=Exchange.EVALUATE))
        assert one.costs(RECORDS) == []


@pytest.mark.parametrize(
    "error",
    [
        DataError("line 303: patient 4711 has age -1", hint="303 rows"),
        WorkerRaisedError("the app raised ValueError, in app.py:1", detail="4711", where=()),
        ValueError("4711"),
        UnsupportedError("4711"),
    ],
)
@pytest.mark.parametrize("exchange", [Exchange.TRAIN, Exchange.DESCRIBE])
async def test_an_error_tells_nothing_of_the_data(tmp_path, error, exchange, caplog):
    def fail() -> RecordDict:
        raise error

    with (
        private_site(tmp_path / "s", Worker(fail)) as one,
        caplog.at_level(logging.ERROR),
        pytest.raises(WorkerCrashedError, match="the site's work failed") as caught,
    ):
        await one.site.handle(ask(RECORD, exchange=exchange))
    assert not {"4711", "303"} & set(str(caught.value).replace(":", " ").split())
    assert caught.value.__cause__ is None
    assert str(error) in caplog.text


async def test_a_strategy_that_cannot_carry_the_plan_is_refused(tmp_path):
    text = 'unit = "client"\nnoise_multiplier = 5.0\ndelta = 1e-3\nunits = 10\n[strategy]\nname = "median"\n'
    with private_site(tmp_path / "s") as one:
        with pytest.raises(UnsupportedError, match="not linear"):
            await one.site.handle(ask(study_of(text)))
        assert one.worker.calls == 0


async def test_the_head_goes_with_every_answer(tmp_path):
    with private_site(tmp_path / "s") as one:
        seqs = []
        for number in (1, 2):
            (text,) = take_heads((await one.site.handle(ask(RECORD, number))).content)
            seqs.append(SignedHead.from_text(text).seq)
        folder = tmp_path / "s" / "ledgers" / "hospital-heart"
        assert verify_ledger(folder, SignedHead.from_text(text)).problems == ()
    assert seqs[1] == seqs[0] + 1


@pytest.mark.parametrize("loss", ["an old copy", "the ledger deleted", "everything deleted"])
async def test_an_agent_with_an_older_ledger_trains_no_more(tmp_path, loss):
    state = tmp_path / "s"
    with private_site(state) as one:
        await one.site.handle(ask(RECORD, 1))
    shutil.copytree(state, tmp_path / "copy")
    with private_site(state) as one:
        heads = take_heads((await one.site.handle(ask(RECORD, 2))).content)
        await one.site.handle(ask(RECORD, 3, heads=heads))  # what it remembers itself is fine
    shutil.rmtree(state / "ledgers" if loss == "the ledger deleted" else state)
    if loss == "an old copy":
        shutil.copytree(tmp_path / "copy", state)
    with private_site(state) as one:
        for exchange in (Exchange.DESCRIBE, Exchange.TRAIN):
            with pytest.raises(StateError, match="an old copy was put back") as caught:
                await one.site.handle(ask(RECORD, 4, exchange=exchange, heads=heads))
            assert "newest copy" in caught.value.hint
        with pytest.raises(StateError, match="old copy"):  # also for a server that remembers nothing
            await one.site.handle(ask(RECORD, 4))
        assert one.worker.calls == 0


async def test_a_head_that_the_site_did_not_sign_locks_nobody_out(tmp_path):
    with private_site(tmp_path / "s") as one:
        (mine,) = take_heads((await one.site.handle(ask(RECORD, 1))).content)
        forged = SignedHead(**{**SignedHead.from_text(mine).__dict__, "seq": 900}).to_text()
        reply = await one.site.handle(ask(RECORD, 2, heads=(forged, "nonsense", "{}")))
        assert reply.has_content()
