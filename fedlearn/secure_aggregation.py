"""The table [secure_aggregation] in a study: whether updates are masked, and what is assumed of the clients. docs/secure-aggregation.md explains it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BaseModel, Field, model_validator

from fedlearn.strict import STRICT

if TYPE_CHECKING:
    from fedlearn.study import Study

CLIP_L2: Final = 10.0
"""The bound of an update's norm where the study names none: far above what training from a global model gives."""


class SecureAggregationTable(BaseModel):
    """[secure_aggregation]: the coordinator sees sums of updates alone."""

    model_config = STRICT

    enabled: bool = False
    """Mask every update. For strategies whose aggregate is a weighted sum, and three clients or more."""
    adversarial: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of the clients that may work with the coordinator; at least one is always counted."""
    profile: Literal["semi-malicious", "malicious"] = "semi-malicious"
    """What a coordinator that lies about dropouts learns: sums over fewer clients, two at the least; malicious: nothing, for one exchange more."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of a round's clients that may vanish in it; the round opens nothing where it cannot survive so many."""
    clip_l2: Annotated[float, Field(gt=0)] | None = None
    """Masked updates are scaled down to this L2 norm, each times its share of `max_examples`; absent means update.clip_l2, or 10."""
    max_examples: Annotated[int, Field(ge=1, le=2**24)] = 10_000
    """A client with more training examples weighs as if it had so many: weights travel masked and have a bound."""
    max_clients: Annotated[int, Field(ge=3, le=10_000)] | None = None
    """The most clients of a round, which fixes how fine integers are; absent means cohort.size, else data.clients, else 200."""
    ring_bits: Literal[16, 24, 32] | None = None
    """Bits of each masked number: fewer are sent faster and are coarser. Absent means 32, and with noise that clients add the fewest that suffice."""
    mode: Literal["auto", "exact", "equivalent"] = "auto"
    """In a simulation. exact: every key and mask; equivalent: the same integers are summed without them, to the same bits; auto: exact up to 20 clients."""

    @model_validator(mode="after")
    def _consistent(self) -> SecureAggregationTable:
        if self.adversarial + 2 * self.dropout >= 1:
            raise ValueError(
                f"adversarial, dropout: {self.adversarial:g} + 2 * {self.dropout:g} is not below 1; no threshold keeps "
                "out the one and survives the other"
            )
        return self


def stated_clients(study: Study) -> int | None:
    """The most clients of a round, as far as a study says; None where the data alone knows."""
    if study.secure_aggregation.max_clients is not None:
        return study.secure_aggregation.max_clients
    if study.cohort.size is None:
        return study.data.clients
    over = 1.0 if study.environment is None else study.environment.over_selection
    return math.ceil(study.cohort.size * over)
