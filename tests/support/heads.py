"""What a coordinator remembers of ledgers, in memory."""

from __future__ import annotations

from collections.abc import Sequence


class Heads:
    """`fedlearn.learning.heads.HeadMemory` that keeps each client's last."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    def remembered(self, client: str) -> Sequence[str]:
        return [self.kept[client]] if client in self.kept else []

    def remember(self, client: str, head: str) -> None:
        self.kept[client] = head
