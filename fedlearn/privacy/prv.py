"""Opacus' PRV accountant (Gopi, Lee and Wutschitz 2021), loaded without the rest of Opacus and torch: milliseconds instead of seconds."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from fedlearn.privacy.events import Gaussian, Leaf, PoissonSampled

EPSILON_ERRORS: Final = (0.01, 0.1)
"""Half the width of the interval that is asked for: the second where the first takes more than `MAX_POINTS`."""
MAX_POINTS: Final = 2**21
"""The most points of its grid: some hundred megabytes, and about a second."""
LEAST_DELTA: Final = 1e-9
"""Its Fourier transform is rounded in double precision: at 1e-12 that already moves whole epsilons, at 1e-11 nothing that is seen."""
_PACKAGE: Final = "_fedlearn_opacus_accountants"


class _History:
    """What its accountants need of their base class, whose own file imports Opacus' optimisers and with them torch."""

    def __init__(self) -> None:
        self.history: list[tuple[float, float, int]] = []


def interval(counts: Mapping[Leaf, int], delta: float) -> tuple[float, float, float] | None:
    """Lower bound, estimate and upper bound of epsilon.

    Args:
        counts: plain or Poisson-sampled Gaussian releases under adding or removing one unit, and how many of each; at least one.
        delta: of the guarantee.

    Returns:
        None where it has no answer: Opacus is not installed, delta or the grid is beyond what it computes rightly and quickly, or it refuses by itself.
    """
    if delta < LEAST_DELTA or (accountant := _accountant()) is None:
        return None
    accountant.history = [
        (leaf.noise_multiplier, 1.0, count)
        if isinstance(leaf, Gaussian)
        else (leaf.event.noise_multiplier, leaf.rate, count)
        for leaf, count in counts.items()
        if isinstance(leaf, Gaussian | PoissonSampled)
    ]
    delta_error = delta / 1000
    prvs = sys.modules[f"{_PACKAGE}.analysis.prv"]
    variables = [prvs.PoissonSubsampledGaussianPRV(rate, noise) for noise, rate, _ in accountant.history]
    times = [count for _, _, count in accountant.history]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of its own choice of domain
        for epsilon_error in EPSILON_ERRORS:
            # Private names, for the public one gives the upper end alone, and takes whatever memory its grid needs.
            domain = accountant._get_domain(variables, times, epsilon_error, delta_error)  # noqa: SLF001
            if domain.size <= MAX_POINTS:
                try:
                    whole = accountant._get_dprv(epsilon_error, delta_error)  # noqa: SLF001
                    found = whole.compute_epsilon(delta, delta_error, epsilon_error)
                except (RuntimeError, ValueError):  # next to no noise: its grid would be wrong, and it says so
                    return None
                lower, estimate, upper = (max(0.0, float(x)) for x in found)
                return lower, estimate, upper
    return None


def _accountant() -> Any | None:
    """A new PRV accountant; None without Opacus."""
    if _PACKAGE not in sys.modules:
        found = importlib.util.find_spec("opacus")
        if found is None or not found.submodule_search_locations:
            return None
        package, base = ModuleType(_PACKAGE), ModuleType(f"{_PACKAGE}.accountant")
        package.__path__ = [str(Path(found.submodule_search_locations[0]) / "accountants")]
        base.IAccountant = _History  # type: ignore[attr-defined]
        sys.modules |= {_PACKAGE: package, base.__name__: base}
    return importlib.import_module(f"{_PACKAGE}.prv").PRVAccountant()
