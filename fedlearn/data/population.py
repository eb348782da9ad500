"""From a study to clients' data: everybody's in a simulation, one site's own behind its firewall."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedlearn.data.bootstrap import BootstrapRows
from fedlearn.data.partition import make_partition
from fedlearn.data.tables import MISSING
from fedlearn.errors import DataError
from fedlearn.learning.population import Population
from fedlearn.learning.task import LeftOut, Task
from fedlearn.privacy.study import protects_rows, task_for

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fedlearn.learning.rows import IntArray
    from fedlearn.learning.task import Examples
    from fedlearn.study import Study


log = logging.getLogger("fedlearn.data")


def build_population(study: Study, task: Task, source: Path | None = None) -> Population:
    """All clients of a study, from one file or from the data that ships with the task.

    Under a privacy plan for records or groups, rows are read, split and prepared so that one unit changes nothing of the others. A partition that deals
    rows to made-up clients (iid, dirichlet ...) does look at all rows; that is no breach. It plays the part of the world, which
    decides whose a row is before any site holds it, and exists in simulations alone: a real site's rows are those in its own file. A plan's
    claim is for each site, given what it holds.

    Raises:
        DataError: the data cannot be read, or cannot be split as the study asks; or a row does not say whose it is, and groups are protected.
        UnsupportedError: the task cannot protect what the plan protects.
    """
    task, examples = _read(study, task, source)
    examples.whole()
    split = study.data
    rows = make_partition(examples, split.partition, split.clients, study.seed, split.options)
    population = _population(study, task, examples, rows)
    if isinstance(rows, BootstrapRows) and split.folds > 1:
        rows = rows.set_aside(*population.split(examples, "pool"), split.folds)
        population = replace(population, rows=rows)
    return population


def site_population(
    study: Study, task: Task, client_id: str, source: Path | None, *, strict: bool = False
) -> Population:
    """One site's own data as a population of one client.

    A file that names clients (a hospital column, say) must hold rows of `client_id`, and only those are used; in a file
    that names none, every row is this client's. Without a file, the client's share of the data that ships with the task
    is used: a rehearsal.

    Under a privacy plan rows that do not fit the schema are left out, and it is no error that none are left: a failure that depends on the
    rows would tell of them. This site's log says how many fit.

    Args:
        study: may ask for privacy.
        task: reads and prepares.
        client_id: whose data it is.
        source: the site's file or folder; None for the data that ships with the task.
        strict: refuse such rows under a plan, too: for the site's own eyes.

    Raises:
        DataError: the file is missing, does not fit the schema, or holds no row of this client; or as in `build_population`.
        UnsupportedError: likewise.
    """
    if source is None:
        whole = build_population(study, task)
        if client_id not in whole.rows:
            raise DataError(
                f"client {client_id!r} is not one of this study's {len(whole.rows)} clients",
                hint=f"clients are {', '.join(whole.client_ids[:8])}" + (" ..." if len(whole.rows) > 8 else ""),
            )
        return whole.only(client_id)
    task, examples = _read(study, task, source)
    rows = np.arange(len(examples), dtype=np.int64)
    if examples.client is not None:
        rows = np.flatnonzero(examples.client == client_id).astype(np.int64)
    if study.privacy is not None and not strict:
        said = f": {examples.left_out.error.message}" if examples.left_out is not None else ""
        level = logging.WARNING if said or not len(rows) else logging.INFO
        log.log(level, "%s: %d rows of %r fit%s", source, len(rows), client_id, said)
    else:
        examples.whole()
        if examples.client is not None and not len(rows):
            named = sorted({str(c) for c in examples.client})
            raise DataError(
                f"{source}: no rows of client {client_id!r}; the file holds {', '.join(named[:8])}",
                hint="start the client with one of these names, or leave the client column out of the file",
            )
        if not len(rows):
            raise DataError(f"{source}: no rows; expected at least one example")
    return _population(study, task, examples, {client_id: rows})


def _read(study: Study, task: Task, source: Path | None) -> tuple[Task, Examples]:
    """The task as the study's plan needs it, and what it reads."""
    task = task_for(study, task)
    examples = task.load(source)
    if study.privacy is not None and study.privacy.group:
        examples = with_owners(examples, study.privacy.group, source)
    return task, examples


def _population(study: Study, task: Task, examples: Examples, rows: Mapping[str, IntArray]) -> Population:
    split = study.data
    return Population(task, examples, rows, study.seed, split.folds, split.fold, by_unit=protects_rows(study))


def with_owners(examples: Examples, name: str, source: Path | None) -> Examples:
    """Leave out rows that do not say whose they are: a row without an owner cannot be protected.

    Args:
        examples: as they were read.
        name: of the column or array, for the message.
        source: where it was read, likewise.

    Raises:
        DataError: there are no groups.
    """
    where = source or "the data"
    if examples.groups is None:
        raise DataError(
            f"{where}: no group column {name!r}, which [privacy] names",
            hint="every row must say whose it is; name the column or array that does in privacy.group",
        )
    owned = np.array([str(group).strip().lower() not in MISSING for group in examples.groups], dtype=np.bool_)
    if owned.all():
        return examples
    nobodys, before = np.flatnonzero(~owned), examples.left_out
    error = DataError(
        f"{where}: group column {name!r}: {len(nobodys)} of {len(examples)} rows have no id, the first is row {nobodys[0] + 1}",
        hint="a row without an owner cannot be protected: fill it in, or leave the row out",
    )
    left_out = LeftOut(len(nobodys), error) if before is None else LeftOut(before.rows + len(nobodys), before.error)
    return replace(examples.take(np.flatnonzero(owned)), left_out=left_out)
