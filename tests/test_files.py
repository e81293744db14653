"""Files are whole or absent; whose an output folder is."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import strank
from strank.errors import InputError
from strank.files import (
    check_output,
    claim_folder,
    output_folder,
    read_json,
    read_written,
    safe_name,
    write_table,
)


def test_a_folder_that_is_a_file_and_json_that_is_none_are_said(tmp_path):
    target = tmp_path / "table.csv"
    target.write_text("old")
    with pytest.raises(InputError, match=r"table.csv: cannot write there"):
        output_folder(target)
    with pytest.raises(InputError, match="not a readable JSON"):
        read_json(target)


@pytest.mark.parametrize("name", ["HLA-A", "../../x", "a/b", "<img src=x>", ".", "", "AC0.1", "ß"])
def test_file_names_of_genes_stay_in_their_folder(tmp_path, name):
    path = tmp_path / f"{safe_name(name)}.png"
    path.touch()
    assert path.parent == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


FACTS = {"seed": 0, "recipe": {"steps": (1, 2)}, "value": float("nan")}


def claim(folder, facts=FACTS, **options):
    claim_folder(folder, facts, kind="study", **options)


@pytest.mark.parametrize("resume", [None, False])
def test_an_empty_or_new_folder_is_claimed(tmp_path, resume):
    for folder in (tmp_path, tmp_path / "new" / "er"):
        claim(folder, resume=resume)
        assert json.loads((folder / "study.json").read_text())["recipe"] == {"steps": [1, 2]}


@pytest.mark.parametrize("resume", [None, True])
def test_the_same_run_goes_on(tmp_path, resume):
    claim(tmp_path)
    (tmp_path / "done").touch()
    claim(tmp_path, resume=resume)
    assert (tmp_path / "done").exists()


def test_a_run_that_begins_anew_empties_the_folder(tmp_path):
    claim(tmp_path)
    (tmp_path / "done").touch()
    claim(tmp_path, FACTS | {"seed": 1}, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


@pytest.mark.parametrize("resume", [None, True])
@pytest.mark.parametrize(
    ("facts", "what"),
    [
        (FACTS | {"seed": 1}, "seed"),
        (FACTS | {"seed": 1, "recipe": {"steps": [1]}}, "seed, recipe"),
        (FACTS | {"finetune": {}}, "finetune"),
        ({name: FACTS[name] for name in ("seed", "recipe")}, "value"),
    ],
)
def test_another_run_is_refused_and_what_differs_is_said(tmp_path, facts, what, resume):
    claim(tmp_path)
    before = (tmp_path / "study.json").read_text()
    with pytest.raises(InputError) as error:
        claim(tmp_path, facts, resume=resume)
    told = f"{tmp_path}: study of another {what}; choose another `folder`, or remove it"
    assert str(error.value) == told
    assert (tmp_path / "study.json").read_text() == before


@pytest.mark.parametrize("resume", [None, False])
def test_a_folder_with_anything_else_is_refused(tmp_path, resume):
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(InputError, match="exists and is not a study; choose another `folder`"):
        claim(tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.doc"]


def test_only_what_is_there_is_resumed(tmp_path):
    with pytest.raises(InputError, match="no study to resume; start anew"):
        claim(tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_growing_facts_are_added_to_and_must_agree(tmp_path):
    def grow(**features):
        claim(tmp_path, growing={"version of the features": features})

    grow(uni="1")
    grow(gigapath="3")
    grow(uni="1")
    kept = json.loads((tmp_path / "study.json").read_text())["version of the features"]
    assert kept == {"uni": "1", "gigapath": "3"}
    with pytest.raises(InputError, match="study of another version of the features; choose"):
        grow(uni="2", virchow="1")


def test_what_is_said_about_a_run_is_not_compared(tmp_path):
    claim(tmp_path, about={"seconds": 1})
    claim(tmp_path, about={"seconds": 2})
    assert json.loads((tmp_path / "study.json").read_text())["seconds"] == 2


def test_an_output_is_looked_at_without_a_trace(tmp_path):
    check_output(tmp_path / "new" / "er")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: cannot write there"):
        check_output(tmp_path / "file" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


HOSTILE = ["=1+1", "+1", "-x", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'-x", "''=1", "=1,\r=2"]
PLAIN = ["A", "'A", "HLA-A", "", "''", "a=1", " -x", "µ"]


def cells(path: Path) -> list[list[str]]:
    """What a spreadsheet finds in a file."""
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("kind", ["object", "string", "category"])
@pytest.mark.parametrize("name", [*HOSTILE, *PLAIN])
def test_a_spreadsheet_runs_no_name_and_we_read_it_as_it_was(tmp_path, name, kind):
    table = pd.DataFrame({"gene": pd.Series([name, "A"], dtype=kind), name: [-1.5, np.nan]})
    before = table.copy(deep=True)
    write_table(tmp_path / "x.csv", table)
    pd.testing.assert_frame_equal(table, before)
    marked = f"'{name}" if name in HOSTILE else name
    shown = cells(tmp_path / "x.csv")
    assert shown == [["gene", marked], [marked, "-1.5"], ["A", ""]]
    assert not any(text.startswith(tuple("=+@\t\r\n")) for row in shown for text in row)
    back = read_written(tmp_path / "x.csv", keep_default_na=False, na_values={marked: [""]})
    if name:
        pd.testing.assert_frame_equal(back, table.astype({"gene": object}))


def test_names_of_rows_are_names(tmp_path):
    table = pd.DataFrame({"x": [1, -2]}, index=pd.Index(["-a", "b"], name="spot"))
    write_table(tmp_path / "x.tsv", table, index=True, sep="\t")
    assert (tmp_path / "x.tsv").read_text() == "spot\tx\n'-a\t1\nb\t-2\n"
    back = read_written(tmp_path / "x.tsv", index_col="spot", sep="\t")
    pd.testing.assert_frame_equal(back, table)


def test_numbers_and_what_is_unknown_stay(tmp_path):
    column = pd.Series([-1.5, None, "-1.5", True, pd.NA], dtype=object)
    write_table(tmp_path / "x.csv", pd.DataFrame({"mixed": column, "n": range(-2, 3)}))
    assert [row[0] for row in cells(tmp_path / "x.csv")] == [
        "mixed",
        "-1.5",
        "",
        "'-1.5",
        "True",
        "",
    ]


def test_packed_and_sealed_tables_are_marked_too(tmp_path):
    table = pd.DataFrame({"gene": ["=A1"]})
    write_table(tmp_path / "x.csv.gz", table, compression={"method": "gzip", "mtime": 0})
    assert gzip.decompress((tmp_path / "x.csv.gz").read_bytes()) == b"gene\n'=A1\n"
    write_table(tmp_path / "x.csv", table, seal=True)
    assert cells(tmp_path / "x.csv")[1] == ["'=A1"]
    for back in (
        read_written(tmp_path / "x.csv.gz"),
        read_written(tmp_path / "x.csv", sealed=True),
    ):
        pd.testing.assert_frame_equal(back, table)


NAMES = st.text(st.sampled_from("'=+-@\t\r\n ,;\"aµ"), min_size=1, max_size=6)


@given(st.lists(NAMES, min_size=1, max_size=4))
def test_any_names_come_back(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("table") / "x.csv"
    table = pd.DataFrame({"name": names, "kind": pd.Categorical(names)})
    write_table(path, table)
    assert not any(text[:1] in set("=+-@\t\r\n") for row in cells(path)[1:] for text in row)
    back = read_written(path, keep_default_na=False, dtype=str)
    assert back["name"].tolist() == back["kind"].tolist() == names


def test_every_table_of_the_package_goes_this_way():
    house = Path(strank.__file__).parent
    others = [path.name for path in house.rglob("*.py") if ".to_csv(" in path.read_text()]
    # Besides it, examples of pictures.
    assert sorted(others) == ["curves.py", "files.py", "plots.py"]
