"""The tiny task, made to fail in another process than the one that made the study: what a worker that dies looks like."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tests.support.tiny_task import TinyTask, tiny_study

NAME = "tests.support.fatal_task:FatalTask"


@dataclass(frozen=True)
class FatalTask(TinyTask):
    """Ends the process that trains, or raises in it.

    Args:
        spare: this process lives.
        fuse: a file; the process that finds and removes it dies. Without a file every one dies.
        raises: raise in place of dying.
    """

    spare: int = 0
    fuse: str = ""
    raises: bool = False

    name: ClassVar[str] = NAME

    def loss(self, outputs, y):
        if os.getpid() != self.spare:
            if self.raises:
                raise ValueError("these rows cannot be learnt")
            if not self.fuse:
                os._exit(3)
            try:
                Path(self.fuse).unlink()
            except FileNotFoundError:
                pass
            else:
                os._exit(3)
        return super().loss(outputs, y)


def crowd(*overrides: str):
    """The tiny study with eighteen clients of three rows, in blocks of their own."""
    return tiny_study("data.partition=iid", "data.clients=18", "data.folds=1", "evaluate.every=0", *overrides)
