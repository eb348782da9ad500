from __future__ import annotations

import numpy as np
import pytest

from fedlearn.data.tables import read_table
from fedlearn.errors import DataError


def write(tmp_path, text):
    path = tmp_path / "site.csv"
    path.write_text(text, encoding="utf-8")
    return path


def whole(table, y=None):
    """The table's rows, refused where one does not fit."""
    y = np.zeros(len(table)) if y is None else y
    return table.examples(np.zeros((len(table), 1)), y).whole()


def test_numbers_and_codes(tmp_path):
    table = read_table(write(tmp_path, "\ufeffa, kind ,c\n1,Red,x\n?,BLUE,y\n\n,,z\n"), ("a", "kind"))
    assert "c" not in table
    assert np.array_equal(table.numbers("a"), [1, np.nan, np.nan], equal_nan=True)
    assert np.array_equal(table.codes("kind", ("blue", "red")), [1, 0, np.nan], equal_nan=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("age,chol\n1,2\n", ["missing column 'sex'", "'age', 'chol'"]),
        ("age,Sex\n1,2\n", ["'sex' may be 'Sex' here"]),
        ("age,sex\n", ["a header and no rows"]),
        ("", ["got an empty file"]),
        ("age,sex,age\n1,2,3\n", ["'age' appears more than once"]),
        ("age,sex\n1\n", ["line 2: got 1 cells, expected 2"]),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path, text, words):
    with pytest.raises(DataError) as caught:
        whole(read_table(write(tmp_path, text), ("age", "sex")))
    assert all(word in str(caught.value) for word in ["site.csv", *words])


@pytest.mark.parametrize("cell", ["old", "-1", "121", "inf"])
def test_a_bad_cell_is_named_by_column_and_line(tmp_path, cell):
    table = read_table(write(tmp_path, f"age\n5\n{cell}\n"), ("age",))
    with pytest.raises(DataError, match=rf"column 'age', line 3: got '{cell}', expected a number from 0 to 120"):
        whole(table, table.numbers("age", low=0, high=120))


def test_required_cells(tmp_path):
    path = write(tmp_path, "age,name\n?,\n")
    for read, words in (
        (lambda table: table.numbers("age", required=True), "never missing"),
        (lambda table: table.codes("name", ("a",), required=True), "an empty cell, expected one of 'a'"),
        (lambda table: table.text("name"), "an empty cell, expected some text"),
    ):
        table = read_table(path, ("age", "name"))
        read(table)
        with pytest.raises(DataError, match=words):
            whole(table)


def test_rows_that_do_not_fit_are_left_out_and_the_first_is_named(tmp_path):
    table = read_table(write(tmp_path, "age,kind\n5,a\nold,a\n6,b\n7\n8,a\nolder,c\n"), ("age", "kind"))
    age, kind = table.numbers("age"), table.codes("kind", ("a",), required=True)
    assert table.fits.tolist() == [0, 3]
    found = table.examples(age[:, None], kind)
    assert found.x[:, 0].tolist() == [5, 8]
    assert found.left_out.rows == 4
    with pytest.raises(DataError, match="line 5: got 1 cells"):
        found.whole()
    assert "old" not in repr(found)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "none.csv", ())
    with pytest.raises(DataError, match="cannot be read as a CSV file"):
        read_table(tmp_path, ())
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_table(tmp_path / "binary.csv", ())
