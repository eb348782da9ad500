"""The command line. `main` is all that is public; everything heavy is imported by the command that needs it."""

from __future__ import annotations

from fedlearn.cli.entry import main

__all__ = ["main"]
