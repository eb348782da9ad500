"""What a site does with a message: policy, gate, worker, gate again. Nothing that was computed leaves by another way."""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from flwr.app import Message, RecordDict

from client import records
from client.compute import compute
from client.guard import Guard, guard_of, is_noisy, withheld
from client.masked import MaskedReleases
from client.outbox import Job, Outbox, base_of, key_of, refusal
from fedlearn.errors import FedlearnError, PolicyRefusedError, RemoteProtocolError
from fedlearn.learning import messages
from fedlearn.learning.backend import Exchange
from fedlearn.learning.checkpoint import broadcast_digest
from fedlearn.learning.heads import put_heads, take_heads
from fedlearn.learning.strategy import ServerState
from fedlearn.release.keys import EVALUATE, TRAIN
from fedlearn.release.records import Finished, InProgress, Refused, Reserved

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from client.accounts import Accounts
    from client.crew import Crew
    from client.masking import Masking, Masks
    from client.policy import SiteRules
    from fedlearn.learning.messages import Request
    from fedlearn.release.charge import Charge
    from fedlearn.release.site import SiteGate
    from fedlearn.study import Study

log = logging.getLogger("fedlearn.client")

MOST_FAILURES: Final = 16
"""What single rows hold fails nothing. What else a study's options can make fail (a column that is not there) tells of the file, and not for ever."""


class Site:
    """Answers fedlearn's messages.

    An update is computed after the gate reserved it, committed with the client's new memory, and sent from the committed
    bytes; whoever asks again gets those. Evaluations change nothing and are computed anew.

    Args:
        crew: where the app runs.
        rules: the site's policy, defaults filled in.
        gate: the release path's; calls to it do not overlap.
        node_config: what the app is told of this site (`client-id`, `data`, `device`, `threads`).
        accounts: the ledger that the gate charges; None where the policy names no budget, so that no private study is admitted.
        masking: this site's keys for secure aggregation; None takes part in no study that asks for it.
    """

    def __init__(
        self,
        crew: Crew,
        rules: SiteRules,
        gate: SiteGate,
        node_config: Mapping[str, Any],
        accounts: Accounts | None = None,
        masking: Masking | None = None,
    ) -> None:
        self._crew, self._rules, self._gate, self._accounts = crew, rules, gate, accounts
        self._masking = masking
        self._node_config = dict(node_config)
        self._outbox = Outbox(gate)
        self._masked = MaskedReleases(gate, self._outbox, self._training)
        self._failed = 0

    def close(self) -> None:
        """Give up what was begun and not asked for."""
        self._masked.begun.close()

    async def handle(self, message: Message) -> Message:
        """The reply to one message.

        Raises:
            FedlearnError: refused, or failed; the link reports it to the server as an error reply.
        """
        heads = take_heads(message.content)
        request = messages.decode_facts(message.content)
        messages.check_type(request.exchange, message.metadata.message_type)
        with _for_good():
            study = self._rules.admit(request)
            masks = self._masks(study)
            if study.privacy is not None:
                await self._check_accounts(heads)
        _check_asked(request, study)
        if study.privacy is None:
            return await self._answer(message, request, masks)
        assert self._accounts is not None
        account = self._rules.account(study.privacy)
        try:
            with _for_good():
                # In a thread: the first time, a plan's noise is searched for.
                guard = await asyncio.to_thread(guard_of, request.study, account)
            reply = await self._answer(message, request, masks, guard)
        except FedlearnError:
            raise
        except Exception as error:
            raise self._withheld(request.run, error) from None
        put_heads(reply.content, [await self._outbox.at_gate(self._accounts.head)])
        return reply

    async def _check_accounts(self, heads: Sequence[str]) -> None:
        """Whether this site answers private studies at all."""
        if self._accounts is None:
            raise PolicyRefusedError(
                "policy: this site keeps no ledger, so it takes part in no study with a privacy plan"
            )
        if self._failed >= MOST_FAILURES:
            raise PolicyRefusedError(
                f"site: {self._failed} messages of private studies failed here; it answers no more of them",
                hint="its operator finds the reasons in its log, and starts it again",
            )
        await self._outbox.at_gate(self._accounts.check, heads)

    def _masks(self, study: Study) -> Masks | None:
        """How this study's updates are masked here; None where it does not ask for it."""
        if not study.secure_aggregation.enabled:
            return None
        if self._masking is None:
            raise PolicyRefusedError("policy: this site has no keys for secure aggregation, which the study asks for")
        return self._masking.of(study)

    async def _answer(
        self, message: Message, request: Request, masks: Masks | None, guard: Guard | None = None
    ) -> Message:
        if masks is None and request.exchange in messages.KEYED:
            raise RemoteProtocolError(
                f"message: the server asks for {request.exchange.value} in a study without secure aggregation"
            )
        if request.exchange in {Exchange.TRAIN, *messages.KEYED}:
            if masks is not None:
                content = await self._masked.answer(message, request, masks, guard)
            else:
                job, _ = await self._training(message, request, guard)
                content = records.unpack(await self._outbox.released(job))
            if request.exchange is Exchange.TRAIN and guard is not None:
                content = await self._outbox.at_gate(self._marked, content, request, guard)
            return Message(content, reply_to=message)
        if guard is not None:
            if request.exchange is Exchange.EVALUATE:
                return Message(records.unpack(await self._scored(message, request, guard)), reply_to=message)
            if request.exchange is Exchange.CLOSE:
                await self._outbox.at_gate(self._closed, request, guard)
                self._masked.begun.closed(request.run)
                return Message(messages.encode_description(str(self._node_config["client-id"]), {}), reply_to=message)
            return Message(await self._described(message, request, guard), reply_to=message)
        state = None
        if request.exchange is Exchange.EVALUATE:
            state = await self._outbox.at_gate(self._settled_state, request)
        reply, _ = await self._compute(message, request.run, state, None)
        return reply

    async def _described(self, message: Message, request: Request, guard: Guard) -> RecordDict:
        """Who this site is, and no more; only where the run's first charge has room.

        To say so is to take part. A plan whose sampling is accounted over all rounds is charged here: whether this site is ever drawn is
        the coordinator's secret, and no ledger's business.
        """
        if request.exchange is not Exchange.DESCRIBE:
            raise PolicyRefusedError(f"plan: {request.exchange.value} has no place in a study with a privacy plan")
        take_part = self._gate.foresee if guard.admission is None else self._gate.admit
        if (refused := await self._outbox.at_gate(take_part, request.run, guard.first())) is not None:
            raise refusal(refused)
        reply, _ = await self._compute(message, request.run, None, guard)
        return guard.description(reply.content, str(self._node_config["client-id"]))

    def _closed(self, request: Request, guard: Guard) -> None:
        """Take back what a run that was charged whole did not use. From here on nothing of it leaves."""
        assert self._accounts is not None
        if guard.admission is None:
            raise PolicyRefusedError("plan: only a run that is charged whole can be closed")
        released = len({r.key.at for r in self._gate.releases(request.run) if r.key.exchange == TRAIN})
        self._accounts.close_run(request.run, guard.admission, request.body, released=released)

    async def _scored(self, message: Message, request: Request, guard: Guard) -> bytes:
        """An evaluation under a plan: a release like an update, with a charge of its own. The worker is given no memory for it."""
        key, charge = key_of(request, EVALUATE), guard.evaluation(request)
        await asyncio.to_thread(_broadcast, message, request)
        base = base_of(request)

        async def score(_reserved: Reserved) -> tuple[RecordDict, bytes | None]:
            reply, _ = await self._compute(message, key.run, None, guard)
            return reply.content, None

        job = Job(key, lambda: self._gate.reserve(key, base=base, charge=charge), score, guard.scores)
        return await self._outbox.released(job)

    async def _training(self, message: Message, request: Request, guard: Guard | None) -> tuple[Job, Request]:
        """The release of an update, before masks, and the request with its arrays."""
        key = key_of(request, TRAIN)
        asked = await asyncio.to_thread(_broadcast, message, request)
        base = base_of(request)
        charge = None if guard is None else await self._outbox.at_gate(self._charge, request, guard)

        async def train(reserved: Reserved) -> tuple[RecordDict, bytes | None]:
            reply, state = await self._compute(message, key.run, reserved.state, guard)
            return reply.content, state

        def seal(content: RecordDict) -> RecordDict:
            return content if guard is None else guard.update(content, asked)

        def reserve() -> Reserved | Finished | InProgress | Refused:
            return self._gate.reserve(key, base=base, charge=charge, noisy=is_noisy(guard))

        return Job(key, reserve, train, seal), asked

    def _charge(self, request: Request, guard: Guard) -> Charge | None:
        """What an update costs. A run that is charged whole and was never asked who this site is, is charged now."""
        charge = guard.charge(request)
        guard.check_turn(request, {r.key.round for r in self._gate.releases(request.run) if r.key.exchange == TRAIN})
        if guard.admission is not None and (refused := self._gate.admit(request.run, guard.admission)) is not None:
            raise refusal(refused)
        return charge

    def _marked(self, content: RecordDict, request: Request, guard: Guard) -> RecordDict:
        """An update's reply; marked where the budget has no room for another one of this run: the server is told before it makes others train for one more round.

        What is left of a budget follows from what was asked, never from the data.
        """
        if request.round >= guard.plan.rounds:
            return content
        charge = guard.charge(replace(request, round=request.round + 1, attempt=1))
        if charge is None or self._gate.fits(charge):
            return content
        log.info("run %s: the budget has no room for an update after round %d's", request.run, request.round)
        return messages.with_last(content)

    async def _compute(
        self, message: Message, run: str, state: bytes | None, guard: Guard | None
    ) -> tuple[Message, bytes | None]:
        """Let the worker answer. Under a plan its errors stay here."""
        try:
            return await compute(self._crew, message, run, state, self._node_config)
        except Exception as error:
            if guard is None:
                raise
            raise self._withheld(run, error) from None

    def _withheld(self, run: str, error: Exception) -> FedlearnError:
        """What the server is told of a failure, and a count of them: each says something of the data that no budget pays for."""
        self._failed += 1
        return withheld(run, error)

    def _settled_state(self, request: Request) -> bytes | None:
        if (refused := self._gate.settle(request.run, base_of(request))) is not None:
            raise refusal(refused)
        return self._gate.state(request.run)


@contextmanager
def _for_good() -> Iterator[None]:
    """Around what depends on the study, the policy and the state of this process alone: who is refused here is refused all of the run."""
    try:
        yield
    except FedlearnError as error:
        error.permanent = True
        raise


def _check_asked(request: Request, study: Study) -> None:
    """The study that was admitted is all that is answered: its rounds, and evaluations where it has any."""
    if request.exchange is Exchange.EVALUATE and not study.evaluate.every:
        raise PolicyRefusedError("message: the server asks for an evaluation, and the study has none")
    if request.round > study.rounds:
        raise PolicyRefusedError(
            f"message: the server asks for round {request.round}, and the study has {study.rounds}"
        )


def _broadcast(message: Message, request: Request) -> Request:
    """The request with its arrays. The key of a release names the broadcast that it answers: the broadcast must be what it says."""
    whole = messages.decode_request(message.content)
    digest = broadcast_digest(ServerState(whole.model, whole.shared))
    if digest != request.model_digest:
        raise RemoteProtocolError(
            f"message: its model and shared arrays have the digest {digest[:16]}, it says {request.model_digest[:16]}"
        )
    return whole
