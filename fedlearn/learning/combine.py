"""What a study combines, checked when it is read and not when a round fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlearn.errors import UnsupportedError

if TYPE_CHECKING:
    from fedlearn.learning.strategy import Strategy
    from fedlearn.study import Study


def check_combination(study: Study, strategy: Strategy) -> None:
    """Refuse what cannot be combined, when the study is read.

    Raises:
        UnsupportedError: says what excludes what, and why.
    """
    if strategy.stateful and study.train.precision == "bfloat16":
        raise UnsupportedError(
            f"strategy {strategy.name!r} with train.precision = 'bfloat16': its client state is made from weight "
            "differences that bfloat16 rounds away",
            hint="use float32",
        )
    if study.cohort.size is not None and study.cohort.size < strategy.min_clients:
        raise UnsupportedError(
            f"strategy {strategy.name!r} needs at least {strategy.min_clients} clients a round, cohort.size is "
            f"{study.cohort.size}",
            hint="raise cohort.size, or choose options of the strategy that tolerate fewer faults",
        )
    if strategy.plain_sgd and (study.train.optimizer != "sgd" or study.train.momentum):
        raise UnsupportedError(
            f"strategy {strategy.name!r} with train.optimizer = {study.train.optimizer!r} and momentum = "
            f"{study.train.momentum:g}: its client rule holds for plain SGD only ({strategy.paper})",
            hint='set train.optimizer = "sgd" and train.momentum = 0',
        )
    if study.privacy is not None:
        from fedlearn.privacy.study import plan_of

        plan = plan_of(study)
        assert plan is not None
        plan.check_strategy(strategy)
        if study.train.precision == "bfloat16":
            raise UnsupportedError(
                "privacy with train.precision = 'bfloat16': what is clipped and noised must be exact",
                hint="use float32",
            )
    if study.secure_aggregation.enabled:
        _check_masks(study, strategy)


def _check_masks(study: Study, strategy: Strategy) -> None:
    from fedlearn.learning.vectors import masking_plan

    if not strategy.linear:
        raise UnsupportedError(
            f"strategy {strategy.name!r} with secure aggregation: it looks at each client's update, and there is only their sum",
            hint="take a strategy whose aggregate is a weighted mean, such as fedavg, or leave secure aggregation out",
        )
    if study.cohort.rate is not None:
        raise UnsupportedError(
            "secure aggregation with cohort.rate: a cohort that is drawn by coins may be smaller than what may be opened, and "
            "trying again would say so",
            hint="take cohort.size, or everybody",
        )
    clip_l2 = study.secure_aggregation.clip_l2
    if study.privacy is not None and study.privacy.unit == "client" and clip_l2 is not None:
        raise UnsupportedError(
            "secure_aggregation.clip_l2: the client-level privacy plan clips already, with its own clip_l2; remove it"
        )
    if clip_l2 is not None and study.update.clip_l2 is not None and study.update.clip_l2 > clip_l2:
        raise UnsupportedError(
            f"update.clip_l2 = {study.update.clip_l2:g} with secure_aggregation.clip_l2 = {clip_l2:g}: masked updates are "
            "clipped to the smaller one in any case",
            hint="leave secure_aggregation.clip_l2 out; it is then update.clip_l2",
        )
    masking_plan(study, 1)  # raises where the numbers of clients, bits and rates do not fit each other
