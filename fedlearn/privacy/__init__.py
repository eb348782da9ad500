"""Differential privacy: plans, events, accounting, mechanisms and the site's ledger.

plan.py        one frozen value that couples unit, sampler, clipping, noise and event
events.py      what a mechanism did, as a tree that an accountant reads and a ledger keeps
rdp.py         our own Rényi accounting; what a ledger stops by
accounting.py  every plan under two accountants, and calibration
mechanisms.py, clipping.py, steps.py, dpsgd.py, ghost.py, ftrl.py   what is done to updates and gradients
distributed.py noise that clients add together under secure aggregation: plan, encoding, price
model_check.py whether a model can train under record-level privacy
budget.py      a site's budgets, and the rule that stops a run
ledger.py      the append-only record of what was spent

Import a name from its module: this package imports nothing, so that naming it loads neither scipy nor torch.
"""
