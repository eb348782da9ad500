from __future__ import annotations

import subprocess
import sys

import pytest

from fedlearn.errors import StudyError
from fedlearn.learning.task import Task, TaskCard
from fedlearn.tasks import load_task, task_class, task_names

OWN_TASK = """
from dataclasses import dataclass
from typing import ClassVar
import numpy as np
from fedlearn.learning.task import Examples, Task

@dataclass(frozen=True)
class Wards(Task):
    beds: int = 4
    names: tuple[str, ...] = ()
    name: ClassVar[str] = "wards"
    def load(self, source=None): return Examples(np.zeros((self.beds, 1)), np.zeros(self.beds))
    def model(self): raise NotImplementedError
    def loss(self, outputs, y): raise NotImplementedError
    def metrics(self, outputs, y): return {}

not_a_task = 3
"""


def test_every_task_has_a_name_a_card_and_its_primary_metric():
    for name in task_names():
        cls = task_class(name)
        assert cls.name == name
        assert isinstance(cls.card, TaskCard)
        assert all(
            (cls.card.title, cls.card.data, cls.card.licence, cls.card.clients, cls.card.metric, cls.card.obtain)
        )
        assert cls.card.schema


def test_options_go_in_and_come_back():
    task = load_task("hospital/heart", {"variant": "flamby", "hidden": 16})
    assert task.options == {"variant": "flamby"}
    assert load_task("hospital/heart", task.options) == task
    assert load_task("hospital/heart").options == {}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("hospital/hart", {}, "did you mean 'hospital/heart'"),
        ("xyz", {}, "hospital/heart"),
        ("no_such_module:Task", {}, "cannot be imported"),
        ("fedlearn.tasks.heart:Hart", {}, "tasks in that module: HeartTask"),
        ("fedlearn.tasks.heart:LEVELS", {}, "got dict LEVELS"),
        ("hospital/heart", {"varaint": "full"}, "did you mean 'variant'"),
        ("hospital/heart", {"variant": "flambi"}, "did you mean 'flamby'"),
        ("hospital/heart", {"hidden": "16"}, "option 'hidden'"),
        ("hospital/heart", {"hidden": 1.5}, "option 'hidden'"),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest_that_is(name, options, words):
    with pytest.raises(StudyError) as caught:
        load_task(name, options)
    assert words in str(caught.value)


def test_a_users_own_task_from_the_app_folder(tmp_path, monkeypatch):
    (tmp_path / "my_wards.py").write_text(OWN_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    task = load_task("my_wards:Wards", {"beds": 6, "names": ["a", "b"]})
    assert isinstance(task, Task)
    assert len(task.load()) == 6
    assert task.options == {"beds": 6, "names": ("a", "b")}
    with pytest.raises(StudyError, match="expected a subclass"):
        load_task("my_wards:not_a_task")


def test_naming_a_task_does_not_import_torch():
    code = (
        "import sys, fedlearn.tasks as t\n"
        "for name in t.task_names(): t.task_class(name)\n"
        "heavy = {'torch', 'sklearn', 'matplotlib', 'pandas', 'flwr'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
