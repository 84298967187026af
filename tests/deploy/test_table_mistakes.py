"""Mistakes with a table of rows, each with what `check` says."""

from pathlib import Path

import pytest

from tests.deploy.conftest import Cli

ROWS = "kind = 'rows'\ngroup_by = 'school'\nx = 'x'\ny = 'y'"
MIXED = "school,x,y\n" + "".join(f"{'abc'[n % 3]} school,{n},{n}\n" for n in range(12))
TEXTS = MIXED.replace(",1,", ",tall,").replace(",2,", ",small,")

MISTAKES: dict[str, tuple[str, str, str]] = {
    # name: (the file, the source, what is said)
    "interleaved rows cut where the key changes": (
        MIXED,
        "kind = 'samples'\nkey = 'school'\nx = 'x'\ny = 'y'",
        (
            "its task source-11 would be refused: empty_query: the task of the row at 11 has one row: a task ends "
            "where the column 'school' changes. If the rows of a key do not lie next to each other, read them with "
            'kind = "rows" and group_by = "school"'
        ),
    ),
    "a text that is not declared": (
        "school,x,y\na,tall,1\na,small,1\n",
        ROWS,
        (
            "column 'x': 'tall' is not a number: write it in the digits 0 to 9, such as 15, -0.5 or 1e3. [[source]] "
            'kind = "rows" takes texts and dates, too: write [source.columns.x] kind = "category" or "date"'
        ),
    ),
    "a missing value that is not declared": (
        "school,x,y\na,NA,1\na,,1\n",
        ROWS,
        'takes missing values, too: write [source.columns.x] kind = "number"',
    ),
    "a key that is no column": (
        "class,x,y\na,1,1\n",
        ROWS,
        "has no columns 'school'; it has class, x, y",
    ),
    "a shape that the declared columns do not fill": (
        MIXED,
        ROWS + "\ncolumns.x = { kind = 'category', values = ['p', 'q'] }",
        "[[source]] source: x has 3 numbers (x 3): write [task] x_shape = [3]",
    ),
    "a misspelt option of a column": (
        MIXED,
        ROWS + "\ncolumns.x = { kind = 'number', missng = 'mean' }",
        "[source 1.columns.x] has no key 'missng': did you mean 'missing'?",
    ),
    "a kind of column that does not exist": (
        MIXED,
        ROWS + "\ncolumns.x = { kind = 'words' }",
        "[source 1.columns.x] kind = 'words': must be 'number', 'category', 'date' or 'text'",
    ),
    "an option of another kind of column": (
        MIXED,
        ROWS + "\ncolumns.x = { kind = 'number', size = 3 }",
        "[source 1.columns.x] values and size are for categories; the kind is 'number'",
    ),
    "a window without a time": (
        MIXED,
        ROWS + "\nwindow = '7d'",
        "[source 1] window = '7d' needs time = \"...\", the col",
    ),
    "a column that is not read": (
        MIXED,
        ROWS + "\ncolumns.z = { kind = 'number' }",
        "columns.z is declared, but 'z' is in neither x nor y",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_with_a_table_is_explained(cli: Cli, config: Path, mistake: str) -> None:
    text, source, message = MISTAKES[mistake]
    table = config.parent / "table.csv"
    table.write_text(text)
    config.write_text(f"{config.read_text()}\n[[source]]\nname = 'source'\npath = '{table}'\n{source}\n")
    ended = cli("check", config)
    assert ended.code == 78
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_some_refused_rows_are_shown_beneath_the_first_tasks(cli: Cli, config: Path) -> None:
    table = config.parent / "table.csv"
    table.write_text(TEXTS)
    config.write_text(f"{config.read_text()}\n[[source]]\nname = 'source'\npath = '{table}'\n{ROWS}\n")
    ended = cli("check", config)
    assert ended.code == 0, ended.err
    assert "first    source..a_20school..11: 'a school', 2 support and 2 query samples\n" in ended.out
    assert ended.out.count("\nfirst    source..") == 3
    assert (
        "refused  source: 2 of the first 5 that it offers would be refused:\n           source..b_20school..24: "
        in ended.out
    )
