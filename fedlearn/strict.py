"""How every table that a person writes is read: an unknown key or a value of the wrong kind is refused."""

from __future__ import annotations

from typing import Final

from pydantic import ConfigDict

STRICT: Final = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
"""Nothing is converted, nothing is ignored, nothing is infinite, and nothing changes."""
