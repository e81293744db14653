"""Files are whole or absent; whose an output folder is."""

import json

import pytest

from strank.errors import InputError
from strank.files import (
    check_output,
    claim_folder,
    output_folder,
    read_json,
    safe_name,
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
