"""A Flower `Grid` over the link, for the thread of a ServerApp."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlearn.errors import LinkError

if TYPE_CHECKING:
    from flwr.supercore.run import Run


class GridCancelledError(LinkError):
    """The run was stopped while its ServerApp waited for messages."""

    kind = "cancelled"


class LinkGrid(Grid):
    """Thread-safe, blocking and event-driven; made by `LinkServer.grid(run_id)`.

    `push_messages` returns at once. Each message is answered exactly once, by its reply or by a message with a Flower
    `Error` (client unknown, gone, or its deadline passed); the answer is handed over once and then freed here.
    """

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        """Connected clients, in ascending order."""
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answers that are here by now; never blocks."""
        raise NotImplementedError

    def wait_messages(self, message_ids: Iterable[str], timeout_s: float | None = None) -> list[Message]:
        """Block until at least one answer is here, and hand over all that are; empty after `timeout_s` seconds.

        Raises:
            GridCancelledError: `cancel` was called.
        """
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError

    def wait_nodes(self, count: int, timeout_s: float | None = None) -> Sequence[int]:
        """Block until `count` clients are connected or `timeout_s` seconds passed; the connected ones, ascending."""
        raise NotImplementedError

    def drop(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for these any more: tell the clients, free what came."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Stop: pending and later calls raise `GridCancelledError`, clients are told to drop the run's messages."""
        raise NotImplementedError
