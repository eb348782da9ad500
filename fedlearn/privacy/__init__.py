"""Differential privacy: plans, events, accounting, mechanisms and the site's ledger.

plan.py        one frozen value that couples unit, sampler, clipping, noise and event
claims.py      what it promises, and against whom
events.py      what a mechanism did, as a tree that an accountant reads and a ledger keeps
rdp.py         our own Rényi accounting; what a ledger stops by
accounting.py  every plan under two accountants, and calibration
mechanisms.py, clipping.py, steps.py, dpsgd.py, ghost.py   what is done to updates and gradients
ftrl.py, ftrl_fit.py, ftrl_run.py   noise that is correlated over the rounds: plan, matrix, one run
distributed.py, shares.py   noise that clients add together under secure aggregation: plan, encoding, price
model_check.py whether a model can train under record-level privacy
rewriting.py, layers.py   models that cannot, rewritten: `fedlearn.privacy.rewrite(model)`
budget.py      a site's budgets, and the rule that stops a run
ledger.py      the append-only record of what was spent
audit.py, canaries.py, whitening.py, membership.py   attacks on the code that trains, and what they prove: `fedlearn audit`

Import a name from its module: this package imports nothing, so that naming it loads neither scipy nor torch. `rewrite`, which people write into their
tasks, is loaded when it is named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlearn.privacy.rewriting import rewrite as rewrite


def __getattr__(name: str) -> Any:
    if name == "rewrite":
        from fedlearn.privacy.rewriting import rewrite

        return rewrite
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
