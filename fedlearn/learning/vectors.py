"""From an update to the vector that secure aggregation masks, and from the open sum to an aggregate: the same on every runtime.

A study fixes it all but the number of parameters, which the model does. What is weighted by examples is scaled by the client's share of `max_examples`
before it is rounded; what counts every client once is not; the number of examples is the last coordinate. So the server learns weighted means and
the total number of examples, and nobody's own.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedlearn.arrays import Spec, check_same
from fedlearn.errors import UnsupportedError, UpdateError
from fedlearn.learning.collect import release_specs
from fedlearn.learning.update import UNCLIPPED, Aggregate, Release, Update, Weighting
from fedlearn.privacy.study import clip_in, noise_plan
from fedlearn.secagg.plan import Plan, Profile, digest_of
from fedlearn.secagg.primitives import KEY_BYTES, Suite, derive
from fedlearn.secagg.quantize import Decoded, Encoding
from fedlearn.secure_aggregation import CLIP_L2, stated_clients

if TYPE_CHECKING:
    import numpy.typing as npt

    from fedlearn.arrays import Arrays
    from fedlearn.learning.strategy import Strategy
    from fedlearn.privacy.distributed import DistributedPlan
    from fedlearn.secagg.primitives import Draw
    from fedlearn.secagg.ring import Vector
    from fedlearn.study import Study

SUITE: Final = Suite.P256_AES256
"""The link's certificates hold P-256 keys, and they are the clients' identities."""
MOST_CLIENTS: Final = 200
"""Of a round, where neither cohort nor data say how many there are: as many as everybody can be everybody's neighbour of."""
RING_BITS: Final = 32
"""Of a masked number where the study does not say."""
_PLAN_LEAST: Final = 3
_FLOAT_SLACK: Final = 1 + 2.0**-40
"""For the roundings of a sum of squares in float64."""


def masking_plan(study: Study, length: int) -> Plan:
    """What all clients of a study agree on, for vectors of so many coordinates, the weight's not counted.

    Raises:
        StudyError: the study's numbers do not fit each other, or a sum could wrap.
        UnsupportedError: no threshold is safe for so many clients.
    """
    noise, table = noise_plan(study, length), study.secure_aggregation
    if noise is not None:
        return noise.aggregation
    encoding = Encoding(
        length,
        stated_clients(study) or MOST_CLIENTS,
        _clip_l2(study),
        ring_bits=table.ring_bits or RING_BITS,
        weight_cap=1 if study.privacy is not None else table.max_examples,
    )
    private = b"" if study.privacy is None else digest_of("privacy", study.privacy.model_dump_json())
    least = max(_PLAN_LEAST, study.cohort.minimum)
    profile = Profile.MALICIOUS if table.profile == "malicious" else Profile.SEMI_MALICIOUS
    return Plan(encoding, table.adversarial, table.dropout, least, SUITE, profile, privacy=private)


def _clip_l2(study: Study) -> float:
    """The joint bound of what is encoded. A client-level plan's updates are encoded in units of the round's clip."""
    if study.privacy is not None and study.privacy.unit == "client":
        return math.sqrt(2) if study.privacy.clipping == "adaptive" else 1.0
    return study.secure_aggregation.clip_l2 or study.update.clip_l2 or CLIP_L2


def subject_of(study: Study, model_digest: str) -> bytes:
    """What a client trains with: everything that the study says, and the broadcast."""
    return digest_of("subject", study.digest, model_digest)


@dataclass(frozen=True)
class Frame:
    """What the vectors of one round are measured in; the same for all clients and the server, and public.

    Args:
        unit: what a client-level plan's updates are divided by, the round's clip; 1 without one.
        rotation: of noise that clients add, 32 bytes; empty without it.
    """

    unit: float = 1.0
    rotation: bytes = b""


@dataclass(frozen=True)
class Vectors:
    """Vectors of one study's updates.

    Args:
        study: with [secure_aggregation].
        releases: everything that an update holds, and its arrays.
        plan: the study's, for these arrays.
    """

    study: Study
    releases: Mapping[Release, Mapping[str, Spec]] = field(repr=False)
    plan: Plan

    @classmethod
    def of(cls, study: Study, strategy: Strategy, model: Mapping[str, Spec]) -> Vectors:
        """Of a study, for a model of these shapes.

        Raises:
            StudyError, UnsupportedError: as `masking_plan`.
            UnsupportedError: an array is not of floats.
        """
        counted = study.privacy is not None and study.privacy.unit == "client" and study.privacy.clipping == "adaptive"
        releases = release_specs(strategy, model, counted=counted)
        for specs in releases.values():
            for name, spec in specs.items():
                if np.dtype(spec.dtype).kind != "f":
                    raise UnsupportedError(f"secure aggregation: array {name!r} holds {spec.dtype}, expected floats")
        length = sum(math.prod(spec.shape) for specs in releases.values() for spec in specs.values())
        return cls(study, releases, masking_plan(study, length))

    @property
    def length(self) -> int:
        """Coordinates of an update, the weight's not counted."""
        return self.plan.encoding.length

    @property
    def clip_bound(self) -> float:
        """Under a client-level plan: what a sum is multiplied with so that nobody's rounded contribution to it exceeds the clip.

        Rounding moves each coordinate by less than 1, so a vector of norm s comes out with a norm below s + sqrt(length).
        """
        if not self._by_clip:
            return 1.0
        return self.plan.encoding.scale / (self.plan.encoding.scale + math.sqrt(self.length))

    @cached_property
    def noise(self) -> DistributedPlan | None:
        """The noise that clients add to their vectors; None where they add none."""
        return noise_plan(self.study, self.length)

    @property
    def _by_clip(self) -> bool:
        """Whether updates are encoded in units of the round's clip."""
        return self.study.privacy is not None and self.study.privacy.unit == "client" and self.noise is None

    def frame(self, round_: int, shared: Arrays) -> Frame:
        """What a round's vectors are measured in, given what was broadcast beside the model.

        A rotation spreads an update over its coordinates, so that few are cut off: it protects nothing, and no two attempts need differ in it.
        """
        if self.noise is not None:
            return Frame(rotation=digest_of("rotation", self.study.seed, round_))
        if not self._by_clip:
            return Frame()
        assert self.study.privacy is not None
        return Frame(clip_in(self.study.privacy, shared))

    def encode(self, update: Update, key: bytes, frame: Frame = Frame(), surplus_key: bytes | None = None) -> Vector:
        """An update as ring elements, clipped and rounded, and with this client's share of the noise where clients add it.

        Args:
            update: of one client.
            key: what the rounding and the noise follow from; see `rounding_key`.
            frame: of the round.
            surplus_key: `MaskingSession.surplus_key`, where surplus noise is taken off.

        Raises:
            UpdateError: it holds other arrays than it should, is not finite, or has no examples.
        """
        if sorted(update.private) != (held := sorted(release.name for release in self.releases)):
            raise UpdateError(f"update: releases {sorted(update.private)}, expected {held}")
        if update.examples < 1:
            raise UpdateError("update: expected at least one example behind it")  # how many there are is masked
        cap = self.plan.encoding.weight_cap
        weight = min(update.examples, cap)
        flat: npt.NDArray[np.floating[Any]] = np.empty(
            self.length, dtype=np.float64 if self._widened(frame.unit) else np.float32
        )
        at = 0
        for release, specs in self.releases.items():
            arrays = update.private[release.name]
            check_same(arrays, specs)
            # Everything is scaled by weight / cap when it is encoded; what counts once has to come out as it is.
            factor = cap / weight if release.weighting is Weighting.UNIFORM else 1.0
            factor /= 1.0 if release.name == UNCLIPPED else frame.unit
            for name in specs:
                part = flat[at : at + arrays[name].size]
                at += len(part)
                part[:] = arrays[name].reshape(-1)
                if factor != 1.0:
                    np.multiply(part, factor, out=part)
        if self.noise is None:
            return self.plan.encoding.encode(flat, weight, key)
        keys = (derive(key, f"noisy vector {number}".encode()) for number in itertools.count())
        return self.noise.encode(flat, frame.rotation, lambda size: next(keys)[:size], surplus_key)

    def _widened(self, unit: float) -> bool:
        plain = unit == 1.0 and all(release.weighting is Weighting.EXAMPLES for release in self.releases)
        return not plain or any(spec.dtype == "float64" for specs in self.releases.values() for spec in specs.values())

    def totals(
        self,
        sum_: Decoded,
        frame: Frame = Frame(),
        surplus_keys: Sequence[bytes] = (),
        clients: int | None = None,
    ) -> dict[str, dict[str, npt.NDArray[np.float64]]]:
        """By release the sum over clients, float64: of share times array where examples weigh, of the array where each counts once.

        Args:
            sum_: the open sum.
            frame: of the round.
            surplus_keys: that were opened with it.
            clients: how many vectors are in it; None takes its weight's word.

        Raises:
            UpdateError: it is longer than so many clipped updates can be; where clients add noise, of no possible number of them.
        """
        if self.noise is None:
            self._check_norm(sum_, min(max(sum_.weight, 0), self.plan.encoding.clients) if clients is None else clients)
        noisy = None if self.noise is None else self.noise.decode(sum_, frame.rotation, surplus_keys).values
        found: dict[str, dict[str, npt.NDArray[np.float64]]] = {}
        at = 0
        for release, specs in self.releases.items():
            step = (1.0 if release.name == UNCLIPPED else frame.unit) / self.plan.encoding.scale * self.clip_bound
            found[release.name] = {}
            for name, spec in specs.items():
                size = math.prod(spec.shape)
                part = noisy[at : at + size] if noisy is not None else np.asarray(sum_.integers[at : at + size] * step)
                found[release.name][name] = part.reshape(spec.shape)
                at += size
        return found

    def _check_norm(self, sum_: Decoded, clients: int) -> None:
        """Each client's integers are within the encoding's bound, so their sum is within as many times that."""
        bound = clients * self.plan.encoding.norm_bound
        norm = math.sqrt(float(np.square(sum_.integers, dtype=np.float64).sum()))
        if norm > bound * _FLOAT_SLACK:
            raise UpdateError(
                f"sum: its norm is {norm:.6g}, {clients} clipped updates reach {bound:.6g} at most;"
                " some client sent a vector that is no encoded update"
            )

    def aggregate(
        self,
        sum_: Decoded,
        clients: int,
        population: int,
        frame: Frame = Frame(),
        surplus_keys: Sequence[bytes] = (),
    ) -> Aggregate:
        """What the server rule sees. Where clients added noise, it is in it; who took part is public, so their number divides.

        Raises:
            UpdateError: the total weight, or the sum's norm, is not one that these clients can have.
        """
        cap = self.plan.encoding.weight_cap
        if not clients <= sum_.weight <= clients * cap:
            raise UpdateError(
                f"sum: {sum_.weight} examples of {clients} clients, expected {clients} to {clients * cap};"
                " some client sent a vector that is no encoded update"
            )
        means: dict[str, Arrays] = {}
        totals = self.totals(sum_, frame, surplus_keys, clients)
        for release in self.releases:
            weight = clients if release.weighting is Weighting.UNIFORM else sum_.weight / cap
            means[release.name] = {name: np.asarray(total / weight) for name, total in totals[release.name].items()}
        return Aggregate(means, clients, population, examples=sum_.weight)


def rounding_key(study: Study, round_: int, client: str, *, rehearsal: bool = False) -> bytes:
    """What a client's rounding and noise follow from: the operating system's chance where privacy is asked for in earnest, else the study's seed.

    As the rest of seeded chance it does not depend on the attempt.
    """
    if study.privacy is not None and not study.privacy.seeded and not rehearsal:
        return os.urandom(KEY_BYTES)
    seed = hashlib.sha256(f"{study.seed}/{round_}/{client}".encode()).digest()
    return digest_of("rounding", seed)[:KEY_BYTES]


def surplus_draw(study: Study, round_: int, client: str, *, rehearsal: bool = False) -> Draw | None:
    """What a client's key of surplus noise is drawn from; None for the operating system's chance, as its other keys are."""
    if study.privacy is None or not (study.privacy.seeded or rehearsal):
        return None
    seed = rounding_key(study, round_, client, rehearsal=rehearsal)
    return lambda size: derive(seed, b"surplus noise")[:size]
