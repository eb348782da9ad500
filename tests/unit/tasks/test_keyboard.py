from __future__ import annotations

import json

import numpy as np
import pytest

from fedlearn.data.partition import make_partition
from fedlearn.errors import DataError
from fedlearn.learning.population import Population
from fedlearn.tasks.keyboard import CHARACTERS, UNKNOWN, VOCABULARY, KeyboardTask, encode

TASK = KeyboardTask(context=16)


@pytest.fixture(scope="module")
def chat():
    return KeyboardTask().load()


def test_the_real_data_has_463_users(chat):
    rows = make_partition(chat, "natural", None, 0)
    assert len(rows) == 463
    assert chat.x.shape[1] == 64
    assert max(map(len, rows.values())) <= 20_000 // 64
    assert (chat.x == UNKNOWN).mean() < 0.001
    assert np.array_equal(chat.x[:, 1:], chat.y[:, :-1])


def test_the_past_trains_the_future_tests(chat):
    task = KeyboardTask()
    rows = make_partition(chat, "natural", None, 0)
    client = Population(task, chat, rows, 0).client(next(iter(rows)))
    mine = chat.take(next(iter(rows.values())))
    n = len(client.train)
    assert np.array_equal(client.train.x, mine.x[:n])
    assert np.array_equal(client.test.x, mine.x[n:])
    assert len(client.test) == pytest.approx(len(mine) / 5, abs=1)
    assert client.train.x.dtype == np.int64
    train, test = task.split(mine, 0, 5, 2)
    assert train.max() < test.min()
    with pytest.raises(DataError, match="split by time"):
        task.split(mine, 0, 5, 4)


def test_encoding():
    assert len(set(CHARACTERS)) == len(CHARACTERS) == VOCABULARY - 1
    assert "".join(CHARACTERS[i] for i in encode("See you at 9?\n")) == "See you at 9?\n"
    assert encode("é~").tolist() == [UNKNOWN, UNKNOWN]


def test_own_text_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("hello there\nhow are you today\nfine thanks\n")
    own = TASK.load(path)
    assert own.client is None
    assert own.x.shape == (2, 16)
    assert "".join(CHARACTERS[i] for i in own.x[0]) == "hello there\nhow "


def test_own_json_lines_are_sorted_by_time_and_split_by_user(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [
        {"text": "the second message of A", "user": "A", "time": 20},
        {"text": "B speaks a single time", "user": "B", "time": 15},
        {"text": "the first message of A", "user": "A", "time": 10},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    own = TASK.load(path)
    assert own.client.tolist() == ["a", "a", "b"]
    assert "".join(CHARACTERS[i] for i in own.x[0]) == "the first messag"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "short", "no user has 17 characters"),
        ("a.csv", "a,b", "expected .txt or .jsonl"),
        ("a.jsonl", "hello", "line 1: not a JSON object"),
        ("a.jsonl", '{"text": "x"}\n{"txt": 3}', "line 2: expected an object with"),
        ("a.jsonl", '{"text": "x", "user": 3}', "is not a text"),
        ("a.jsonl", '{"text": "x", "time": 3}\n{"text": "y"}', "expected 'time' in every line"),
        ("a.jsonl", '{"text": "x", "user": "u"}\n{"text": "y"}', "expected all or none"),
    ],
)
def test_a_bad_file_is_refused_without_quoting_messages(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        TASK.load(path).whole()
    assert words in str(caught.value)
    assert "hello" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        TASK.load(tmp_path / "none.txt")


def test_metrics_known_answer():
    outputs = np.log(np.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]], dtype=np.float32))
    got = TASK.metrics(outputs, np.array([[0, 2]]))
    assert got == pytest.approx({"top1": 0.5, "perplexity": (0.5 * 0.1) ** -0.5})
    assert np.isnan(TASK.metrics(outputs[:0], np.zeros((0, 2), dtype=np.int64))["top1"])
