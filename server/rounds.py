"""A round's messages over any Flower `Grid`: our link, or stock Flower."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from flwr.app import Message, RecordDict

from fedlearn.clock import Clock, SystemClock
from fedlearn.errors import FedlearnError, RemoteProtocolError
from fedlearn.learning import messages
from fedlearn.learning.backend import Exchange, Failed, Fitted, Said, Scored, Work
from fedlearn.learning.heads import put_heads, take_heads
from fedlearn.link import flower
from server.refusals import Refusals, reason_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from flwr.serverapp import Grid

    from fedlearn.events import Emit
    from fedlearn.learning.heads import HeadMemory

log = logging.getLogger("fedlearn.server")

CLOSE_S: Final = 15.0
"""Sites that do not answer by then have not heard that the run is over, and stay charged for all of it."""
DESCRIBE_S: Final = 120.0
"""A client answers its first message only when its worker has loaded torch and the data."""
REASK_S: Final = 30.0
"""A client that would not, or could not, say who it is, is asked again after this long."""
STOCK_POLL_S: Final = 0.5
"""Flower's own grid cannot be waited on, only asked. Ours is never polled."""


class _Nothing(NamedTuple):
    """In place of a reply: why there is none, and whether the client will give none any more."""

    reason: str
    permanent: bool = False

    def of(self, client: str) -> Failed:
        return Failed(client, self.reason, permanent=self.permanent)


class GridBackend:
    """Does clients' work by messages. Whoever says that it will answer nothing more of this run is asked nothing more.

    Args:
        grid: a Flower grid.
        encoder: makes the requests of this run.
        client_name: node id to the name in that client's certificate; None where the runtime knows no such name.
        clock: deadlines come from it.
        heads: of the sites' ledgers; each site is shown its own with every request. Used where names are certified.
        emit: is told who refuses, and while clients are waited for.
    """

    def __init__(
        self,
        grid: Grid,
        encoder: messages.RequestEncoder,
        client_name: Callable[[int], str] | None = None,
        clock: Clock | None = None,
        heads: HeadMemory | None = None,
        emit: Emit | None = None,
    ) -> None:
        self._grid, self._encoder, self._client_name = grid, encoder, client_name
        self._heads = heads if client_name is not None else None
        self._clock = clock if clock is not None else SystemClock()
        self._node_of: dict[str, int] = {}
        self._refusals = Refusals(encoder.run, emit)
        self._asked_s: dict[int, float] = {}
        self._silent: set[int] = set()

    def clients(self, at_least: int = 0, timeout_s: float = 0.0) -> Sequence[str]:
        """Connected clients that take part in this study; asks newcomers who they are. Called before each attempt."""
        deadline = self._clock.monotonic() + timeout_s
        self._refusals.settle()
        while True:
            nodes = set(self._grid.get_node_ids())
            self._forget(nodes)
            self._describe(self._to_ask(nodes, patient=len(self._here) < at_least))
            here = sorted(self._here)
            left_s = deadline - self._clock.monotonic()
            if len(here) >= at_least or left_s <= 0:
                return here
            waits_s = min(left_s, self._refusals.waits(len(here), at_least, left_s, self._clock.monotonic()))
            self._wait_for_nodes(len(nodes) + 1, min(waits_s, REASK_S) if self._refusals.nodes else waits_s)

    @property
    def _here(self) -> Collection[str]:
        """Clients that are connected and take part. Who has left the run is connected too, to be told of its end."""
        return self._node_of.keys() - self._refusals.gone.keys()

    @property
    def refusals(self) -> Sequence[Failed]:
        """Who does not take part, and why."""
        return self._refusals.all

    @property
    def could_come(self) -> int | None:
        """How many of those who took part may again, here or away; None while none has refused for good."""
        return self._refusals.could_come

    def fit(self, work: Work) -> Iterator[Fitted | Failed]:
        for client, reply in self._exchange(Exchange.TRAIN, work):
            try:
                yield reply.of(client) if isinstance(reply, _Nothing) else Fitted(client, messages.decode_update(reply))
            except FedlearnError as error:
                yield Failed(client, error.message)

    def evaluate(self, work: Work) -> Iterator[Scored | Failed]:
        for client, reply in self._exchange(Exchange.EVALUATE, work):
            try:
                yield reply.of(client) if isinstance(reply, _Nothing) else messages.decode_scores(client, reply)
            except FedlearnError as error:
                yield Failed(client, error.message)

    def secure(
        self, exchange: Exchange, work: Work, bodies: Mapping[str, bytes], length: int
    ) -> Iterator[Said | Failed]:
        for client, reply in self._exchange(exchange, work, bodies, length):
            try:
                yield reply.of(client) if isinstance(reply, _Nothing) else messages.decode_said(client, reply)
            except FedlearnError as error:
                yield Failed(client, error.message)

    def tell_end(self, word: bytes) -> None:
        """Tell every site that is here that the run is over; see `fedlearn.link.closing`."""
        client_of = {node: client for client, node in self._node_of.items()}
        kind = messages.MESSAGE_TYPES[Exchange.CLOSE]
        outgoing = {node: Message(self._encoder.close(word), node, kind, ttl=CLOSE_S) for node in client_of}
        for node, reply in self._send(outgoing, CLOSE_S):
            self._remember(client_of[node], reply)
            if isinstance(reply, _Nothing):
                log.warning("%s stays charged for the whole run: %s", client_of[node], reply.reason)

    def close(self) -> None:
        self._node_of.clear()

    def _exchange(
        self, exchange: Exchange, work: Work, bodies: Mapping[str, bytes] | None = None, length: int = 0
    ) -> Iterator[tuple[str, RecordDict | _Nothing]]:
        """Each client of the cohort once, with its reply's content or the reason why there is none."""
        requests = self._encoder.encode(exchange, work, bodies, length)
        here = self._here
        present = {client: request for client, request in requests.items() if client in here}
        for client, request in present.items():
            self._remind(client, request)
        for client in sorted(requests.keys() - present.keys()):
            gone = self._refusals.gone.get(client)
            yield client, _Nothing("not connected") if gone is None else _Nothing(gone.reason, permanent=True)
        outgoing = {
            self._node_of[client]: Message(
                request,
                self._node_of[client],
                messages.MESSAGE_TYPES[exchange],
                ttl=work.deadline_s,
                group_id=str(work.round),
            )
            for client, request in present.items()
        }
        client_of = {node: client for client, node in self._node_of.items()}
        del requests, present
        for node, reply in self._send(outgoing, work.deadline_s):
            self._remember(client_of[node], reply)
            self._note(client_of[node], work, reply)
            yield client_of[node], reply

    def _send(self, outgoing: dict[int, Message], deadline_s: float) -> Iterator[tuple[int, RecordDict | _Nothing]]:
        """Each node once, with its reply's content or the reason why there is none."""
        deadline = self._clock.monotonic() + deadline_s
        nodes = list(outgoing)
        ids = list(self._grid.push_messages(outgoing.values()))
        outgoing.clear()
        waiting = dict(zip(ids, nodes, strict=True))
        try:
            while waiting and (left_s := deadline - self._clock.monotonic()) > 0:
                for reply in self._wait(list(waiting), left_s):
                    node = waiting.pop(reply.metadata.reply_to_message_id, None)
                    if node is not None:
                        yield node, _content_or_nothing(reply)
            for node in waiting.values():
                yield node, _Nothing(f"no reply within {deadline_s:g} s")
        finally:
            self._drop(list(waiting))

    def _forget(self, nodes: set[int]) -> None:
        """Drop what is known of nodes that are gone: their place and name are free for others."""
        self._node_of = {client: node for client, node in self._node_of.items() if node in nodes}
        self._refusals.nodes = {node: failed for node, failed in self._refusals.nodes.items() if node in nodes}
        self._asked_s = {node: at for node, at in self._asked_s.items() if node in nodes}
        self._silent &= nodes

    def _to_ask(self, nodes: set[int], *, patient: bool) -> Sequence[int]:
        """Newcomers, and now and then those that refused.

        Whoever did not answer at all, or refused the whole run, is asked again only while others are missing: an operator may have changed a
        policy meanwhile.
        """
        due_s = self._clock.monotonic() - REASK_S
        asked, unknown = self._asked_s, nodes - set(self._node_of.values())
        final = {node for node, failed in self._refusals.nodes.items() if failed.permanent} | self._silent
        return sorted(n for n in unknown if n not in asked or (asked[n] <= due_s and (patient or n not in final)))

    def _name_of(self, node: int) -> str:
        """The name in a node's certificate; one of its number where there is none."""
        return self._client_name(node) if self._client_name is not None else f"node {node}"

    def _describe(self, nodes: Sequence[int]) -> None:
        if not nodes:
            return
        questions = {n: self._encoder.describe() for n in nodes}
        for node, question in questions.items():
            if self._heads is not None:
                self._remind(self._name_of(node), question)
        kind = messages.MESSAGE_TYPES[Exchange.DESCRIBE]
        outgoing = {n: Message(question, n, kind, ttl=DESCRIBE_S) for n, question in questions.items()}
        started_s = self._clock.monotonic()
        answers: dict[int, RecordDict | _Nothing] = {}
        for node, reply in self._send(outgoing, DESCRIBE_S):
            answers[node] = reply
            if isinstance(reply, _Nothing):  # said at once: others may take their time
                self._refusals.refuse(node, reply.of(self._name_of(node)))
        late = self._clock.monotonic() - started_s >= DESCRIBE_S
        for node in nodes:  # not in order of arrival: of two that claim one name the smaller id has it
            self._asked_s[node] = self._clock.monotonic()
            self._silent.discard(node)
            answer = answers[node]
            if isinstance(answer, _Nothing):
                if late:
                    self._silent.add(node)
            elif reason := self._enrol(node, answer):
                self._refusals.refuse(node, Failed(self._name_of(node), reason))

    def _enrol(self, node: int, answer: RecordDict) -> str:
        """Why a node that described itself cannot take part; empty when it does."""
        try:
            client = messages.decode_description(answer)
        except FedlearnError as error:
            return error.message
        name = self._name_of(node) if self._client_name is not None else client
        if name != client:
            return f"calls itself {client!r}, its certificate says {name!r}"
        if client in self._node_of:
            return f"calls itself {client!r}, and so does another client that is connected"
        self._refusals.nodes.pop(node, None)
        self._refusals.part.add(client)
        self._node_of[client] = node
        self._remember(client, answer)
        return ""

    def _note(self, client: str, work: Work, reply: RecordDict | _Nothing) -> None:
        """Who refuses for good, or has no room for another update, is asked for none: nobody else trains for a round that needs it."""
        if isinstance(reply, _Nothing):
            if reply.permanent:
                self._refusals.leave(reply.of(client))
        elif messages.is_last(reply):
            reason = f"budget: it has no room for an update after that of round {work.round}"
            self._refusals.leave_after(Failed(client, reason, permanent=True))

    def _remind(self, client: str, request: RecordDict) -> None:
        """Show a site how far its ledger had come when it last answered."""
        if self._heads is not None:
            put_heads(request, self._heads.remembered(client))

    def _remember(self, client: str, reply: RecordDict | _Nothing) -> None:
        """Keep the heads beside a reply; one that cannot be read costs nothing but itself."""
        if self._heads is None or isinstance(reply, _Nothing):
            return
        try:
            for head in take_heads(reply):
                self._heads.remember(client, head)
        except RemoteProtocolError as error:
            log.warning("%s: %s", client, error.message)

    def _wait(self, ids: Sequence[str], timeout_s: float) -> Iterable[Message]:
        wait_messages: Any = getattr(self._grid, "wait_messages", None)
        if wait_messages is not None:
            replies: Iterable[Message] = wait_messages(ids, timeout_s)
            return replies
        found = list(self._grid.pull_messages(ids))
        if not found:
            time.sleep(min(STOCK_POLL_S, timeout_s))
        return found

    def _drop(self, ids: Sequence[str]) -> None:
        """Nobody waits for these any more; a grid that can forget them does."""
        drop: Any = getattr(self._grid, "drop", None)
        if drop is not None and ids:
            drop(ids)

    def _wait_for_nodes(self, count: int, timeout_s: float) -> None:
        wait_nodes: Any = getattr(self._grid, "wait_nodes", None)
        if wait_nodes is not None:
            wait_nodes(count, timeout_s)
        else:
            time.sleep(min(STOCK_POLL_S, timeout_s))


def _content_or_nothing(reply: Message) -> RecordDict | _Nothing:
    if reply.has_error():
        return _Nothing(reason_of(reply.error.reason), permanent=reply.error.code == flower.ERROR_REFUSED)
    return reply.content
