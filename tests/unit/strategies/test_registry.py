"""Studies name strategies and options; every mistake is answered with what would be right."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import ClassVar

import pytest

import strategies
from fedlearn.errors import StudyError
from strategies.fedavg import FedAvg
from strategies.options import option_of, shown


def test_names_and_classes_agree() -> None:
    assert strategies.names()[0] == "fedavg"
    assert len(set(strategies.names())) == len(strategies.names()) == 12
    for name in strategies.names():
        made = strategies.create(name)
        assert made.name == name
        assert type(made) is strategies.REGISTRY[name]


def test_defaults_are_valid_and_json() -> None:
    for name in strategies.names():
        made = strategies.create(name)
        assert strategies.create(name, json.loads(json.dumps(dict(made.options)))) == made


@pytest.mark.parametrize(
    ("name", "options", "message", "hint"),
    [
        ("fedprx", {}, "got 'fedprx', expected one of fedavg, fedprox", "did you mean 'fedprox'?"),
        ("FedAvg", {}, "got 'FedAvg'", "did you mean 'fedavg'?"),
        ("multi-krum", {}, "got 'multi-krum'", "did you mean 'multi_krum'?"),
        ("zzz", {}, "got 'zzz'", ""),
        ("fedprox", {"nu": 1}, "got option 'nu', expected one of mu", "did you mean 'mu'?"),
        ("fedadam", {"beta_1": 0.9}, "got option 'beta_1', expected one of server_lr, beta1", "did you mean 'beta1'?"),
        ("fedavg", {"mu": 1}, "got option 'mu', expected none: it has no options", ""),
        ("fedprox", {"mu": -1}, "option mu is -1, expected a finite number, at least 0", "the default is 0.01"),
        ("fedprox", {"mu": "0.1"}, "option mu is '0.1', expected a finite number", ""),
        ("fedprox", {"mu": True}, "option mu is True", ""),
        ("fedprox", {"mu": None}, "option mu is None", ""),
        ("fedprox", {"mu": float("nan")}, "option mu is nan", ""),
        ("ditto", {"lam": float("inf")}, "option lam is inf", ""),
        ("fedavgm", {"momentum": 1}, "option momentum is 1, expected a finite number, at least 0 and less than 1", ""),
        ("scaffold", {"server_lr": 0}, "option server_lr is 0, expected a finite number, greater than 0", ""),
        ("fedyogi", {"v0": -0.1}, "option v0 is -0.1, expected a finite number, at least 0, or none", ""),
        (
            "trimmed_mean",
            {"beta": 0.5},
            "option beta is 0.5, expected a finite number, at least 0 and less than 0.5",
            "",
        ),
        ("krum", {"byzantine": 1.0}, "option byzantine is 1.0, expected an integer, at least 0", ""),
        ("krum", {"byzantine": True}, "option byzantine is True", ""),
        ("multi_krum", {"select": 0}, "option select is 0, expected an integer, at least 1, or none", ""),
    ],
)
def test_a_mistake_names_what_is_valid(name, options, message, hint) -> None:
    with pytest.raises(StudyError) as caught:
        strategies.create(name, options)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.exit_code == StudyError.exit_code


def test_whole_numbers_are_numbers() -> None:
    made = strategies.create("fedprox", {"mu": 1})
    assert made == strategies.create("fedprox", {"mu": 1.0})
    assert isinstance(made.options["mu"], float)


def test_options_given_are_not_kept_or_changed() -> None:
    options = {"mu": 1}
    made = strategies.create("fedprox", options)
    options["mu"] = 2
    assert made.options == {"mu": 1.0}


def test_the_registry_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        strategies.REGISTRY["fedavg"] = FedAvg  # type: ignore[index]


@pytest.mark.parametrize("name", strategies.names())
def test_a_description_says_what_a_listing_shows(name) -> None:
    card = strategies.describe(name)
    kind = strategies.REGISTRY[name]
    assert (card.name, card.paper, card.linear, card.stateful) == (name, kind.paper, kind.linear, kind.stateful)
    assert card.releases == tuple(release.name for release in kind.releases)
    assert card.summary.endswith(".")
    assert [o.name for o in card.options] == list(strategies.create(name).options)
    assert all(o.text and o.expected for o in card.options)
    for option in card.options:  # a default is among the valid values
        strategies.create(name, {option.name: option.default})


def test_describing_an_unknown_strategy_is_a_study_error() -> None:
    with pytest.raises(StudyError, match="fedprox"):
        strategies.describe("fedprx")


def test_an_option_without_a_declaration_is_a_defect() -> None:
    @dataclass(frozen=True)
    class Careless(FedAvg):
        name: ClassVar[str] = "careless"
        rate: float = 0.1

    with pytest.raises(TypeError, match="declare it"):
        Careless()
    with pytest.raises(TypeError, match="declare it"):
        option_of(fields(Careless)[0])


def test_defaults_as_they_stand_in_a_study() -> None:
    assert [shown(value) for value in (None, 0.001, 1.0, 2)] == ["none", "0.001", "1", "2"]


def test_the_registry_is_read_without_torch_or_flower() -> None:
    code = "import strategies, sys; sys.exit(bool({'torch', 'flwr'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
