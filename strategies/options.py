"""Options of a strategy: declared once with their range, checked in one place, listed from the same declaration."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Final, Literal

from fedlearn.errors import StudyError
from fedlearn.learning.strategy import Strategy

_KEY: Final = "option"


@dataclass(frozen=True)
class Option:
    """What is known of one hyper-parameter.

    Args:
        kind: "number" (a finite float) or "integer".
        low: the smallest value.
        below: all values are less than this.
        above: all values are greater than this.
        optional: None is a value too.
        text: what it does, in a few words.
    """

    kind: Literal["number", "integer"]
    low: float | None = None
    below: float | None = None
    above: float | None = None
    optional: bool = False
    text: str = ""

    @property
    def expected(self) -> str:
        """The valid values, in words."""
        noun = "an integer" if self.kind == "integer" else "a finite number"
        bounds = [
            f"{word} {bound:g}"
            for word, bound in (("at least", self.low), ("greater than", self.above), ("less than", self.below))
            if bound is not None
        ]
        return ", ".join(filter(None, [noun, " and ".join(bounds), "or none" if self.optional else ""]))

    def accepts(self, value: object) -> bool:
        """Whether a value is of the right kind and in range. Truth values are no numbers."""
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "integer" else int | float):
            return False
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def number(
    default: float | None,
    text: str,
    *,
    low: float | None = None,
    below: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field that holds a float; optional where its default is None."""
    known = Option("number", low=low, below=below, above=above, optional=default is None, text=text)
    return field(default=default, metadata={_KEY: known})


def integer(default: int | None, text: str, *, low: int | None = None) -> Any:
    """A dataclass field that holds an integer; optional where its default is None."""
    return field(default=default, metadata={_KEY: Option("integer", low=low, optional=default is None, text=text)})


@dataclass(frozen=True)
class Configured(Strategy):
    """A strategy whose fields are declared with `number` and `integer`, and checked when it is made.

    Raises:
        StudyError: a value of another kind or out of range; the message names the option and the valid range.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            known, value = option_of(one), getattr(self, one.name)
            if not known.accepts(value):
                raise StudyError(
                    f"strategy {self.name!r}: option {one.name} is {value!r}, expected {known.expected}",
                    hint=f"{one.name}: {known.text}; the default is {shown(one.default)}",
                )
            if known.kind == "number" and value is not None:
                # 1 and 1.0 are one value in a study, so they are one value here.
                object.__setattr__(self, one.name, float(value))


def option_of(one: Field[Any]) -> Option:
    """The declaration behind a field.

    Raises:
        TypeError: the field was declared without `number` or `integer`, or without a default.
    """
    known = one.metadata.get(_KEY)
    if not isinstance(known, Option) or one.default is MISSING:
        raise TypeError(f"option {one.name}: declare it with strategies.options.number or integer")
    return known


def shown(value: object) -> str:
    """A default as it stands in a study."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
