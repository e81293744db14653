from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from strank.cohort.contract import section_info
from strank.cohort.store import read_section, write_h5ad
from strank.errors import InputError
from strank.io import find_st, read_st


def read_all(folder: Path, **options) -> list[anndata.AnnData]:
    return [read_st(folder, section=name, **options) for name in find_st(folder)]


def edit_counts(folder: Path, change: Callable[[pd.DataFrame], pd.DataFrame], name="A1") -> None:
    path = folder / "counts" / f"{name}.tsv.gz"
    change(pd.read_csv(path, sep="\t", index_col=0)).to_csv(path, sep="\t")


def edit_spots(folder: Path, change: Callable[[pd.DataFrame], pd.DataFrame], name="A1") -> None:
    path = folder / "spots" / f"{name}_selection.tsv"
    change(pd.read_csv(path, sep="\t")).to_csv(path, sep="\t", index=False)


def test_a_section_holds_what_its_files_say(st_folder):
    adata = read_all(st_folder)[0]
    counts = pd.read_csv(st_folder / "counts/A1.tsv.gz", sep="\t", index_col=0)
    pd.testing.assert_frame_equal(
        adata.to_df().astype(int),
        counts.loc[adata.obs_names],
        check_names=False,
        check_column_type=False,
    )
    assert adata.obs["patient"].unique().tolist() == ["A"]
    np.testing.assert_array_equal(adata.obs["library_size"], counts.loc[adata.obs_names].sum(1))
    x, y = adata.obsm["spatial"][list(adata.obs_names).index("4x3")]
    assert (x, y) == (85.0, 60.0)
    info = section_info(adata)
    assert info.um_per_pixel == pytest.approx(200 / 45)
    assert info.image == str((st_folder / "images/A1.jpg").resolve())


def test_spots_in_one_table_only_are_dropped_and_counted(st_folder):
    edit_counts(st_folder, lambda table: table.drop(index="4x3"))
    edit_spots(st_folder, lambda table: table[(table["x"] != 5) | (table["y"] != 4)])
    edit_spots(st_folder, lambda t: t.assign(selected=((t["x"] != 6) | (t["y"] != 2)).astype(int)))
    adata = read_all(st_folder)[0]
    assert adata.n_obs == 22
    assert section_info(adata).provenance["dropped_spots"] == {
        "in counts only": 1,
        "in selection only": 1,
        "not selected": 1,
    }


def test_patient_pattern(st_folder):
    assert [a.obs["patient"].iloc[0] for a in read_all(st_folder, patient_pattern=r"\d+")] == [
        "1"
    ] * 2
    grouped = read_all(st_folder, patient_pattern=r"([A-Z])(\d)")
    assert [a.obs["patient"].iloc[0] for a in grouped] == ["A", "B"]


def test_a_patient_that_is_given_comes_before_the_pattern(st_folder):
    assert read_all(st_folder, patient="P")[0].obs["patient"].iloc[0] == "P"
    table = {"A1": "P1", "B1": "P2"}
    cohort = read_all(st_folder, patients=table, patient_pattern="Z")
    assert [a.obs["patient"].iloc[0] for a in cohort] == ["P1", "P2"]


def test_one_of_several_sections_is_chosen_by_name(st_folder):
    assert find_st(st_folder) == ["A1", "B1"]
    assert read_st(st_folder, section="B1").obs["section"].iloc[0] == "B1"
    with pytest.raises(InputError, match=r"st: holds several sections; .* `section`: A1, B1$"):
        read_st(st_folder)
    with pytest.raises(InputError, match=r"st: no section C1; there are A1, B1$"):
        read_st(st_folder, section="C1")
    for path in st_folder.glob("*/B1*"):
        path.unlink()
    assert read_st(st_folder).obs["section"].iloc[0] == "A1"


def test_the_command_says_how_many_genes_all_sections_measure(st_folder, tmp_path, command):
    edit_counts(st_folder, lambda table: table.drop(columns="GENE7"), name="B1")
    told = command("import", "st", st_folder, "-o", tmp_path / "cohort").stdout
    assert "7 of 8 genes are measured in all of these sections" in told
    edit_counts(st_folder, lambda table: table.drop(columns="GENE7"))
    told = command("import", "st", st_folder, "-o", tmp_path / "cohort").stdout
    assert "are measured in all" not in told
    wrong = command("import", "st", st_folder, "--patient-pattern", "Z", "-o", tmp_path, code=2)
    assert "section A1: --patient-pattern Z finds no patient in its name" in wrong.stderr


def test_a_section_survives_the_disk(st_folder, tmp_path):
    adata = read_all(st_folder)[0]
    write_h5ad(adata, tmp_path / "cohort/A1.h5ad")
    back = read_section(tmp_path / "cohort/A1.h5ad")
    assert (back.X != adata.X).nnz == 0
    assert section_info(back) == section_info(adata)


def truncate(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def set_count(value):
    def change(table):
        table = table.astype(object)
        table.loc["5x4", "GENE3"] = value
        return table

    return lambda folder: edit_counts(folder, change)


def duplicate_gene(folder):
    path = folder / "counts/A1.tsv.gz"
    text = gzip.decompress(path.read_bytes()).decode().replace("GENE5", "GENE2", 1)
    path.write_bytes(gzip.compress(text.encode()))


def write_text(name, text):
    return lambda folder: (folder / name).write_text(text)


BAD = {
    "no counts": (
        lambda f: (f / "counts/A1.tsv.gz").unlink(),
        r"section A1 has images/A1.jpg but nothing in counts/",
    ),
    "no image": (
        lambda f: (f / "images/A1.jpg").unlink(),
        r"section A1 has counts/A1.tsv.gz but nothing in images/",
    ),
    "no spots": (lambda f: (f / "spots/A1_selection.tsv").unlink(), r"A1 .* nothing in spots/"),
    "truncated image": (lambda f: truncate(f / "images/A1.jpg"), r"A1.jpg: damaged or truncated"),
    "not an image": (write_text("images/A1.jpg", "hello"), r"A1.jpg: not an image"),
    "truncated counts": (lambda f: truncate(f / "counts/A1.tsv.gz"), r"A1.tsv.gz: .* table"),
    "negative": (set_count(-2), r"A1.tsv.gz: spot 5x4, gene GENE3: -2 is negative"),
    "fraction": (set_count(1.5), r"A1.tsv.gz: spot 5x4, gene GENE3: 1.5 is not a whole number"),
    "text": (set_count("many"), r"A1.tsv.gz: spot 5x4, gene GENE3: 'many' is not a number"),
    "nothing": (set_count(None), r"A1.tsv.gz: spot 5x4, gene GENE3: no value"),
    "infinite": (set_count("inf"), r"A1.tsv.gz: spot 5x4, gene GENE3: inf is not a finite number"),
    "duplicate gene": (duplicate_gene, r"A1.tsv.gz: gene GENE2 stands twice"),
    "duplicate spot": (
        lambda f: edit_counts(f, lambda t: pd.concat([t, t.loc[["5x4"]]])),
        r"A1.tsv.gz: spot 5x4 stands twice",
    ),
    "duplicate selection": (
        lambda f: edit_spots(f, lambda t: pd.concat([t, t.iloc[:1]])),
        r"A1_selection.tsv: spot 3x2 stands twice",
    ),
    "outside": (
        lambda f: edit_spots(f, lambda t: t.assign(pixel_x=t["pixel_x"] + 150)),
        r"section A1: spot .* lies outside A1.jpg \(.*; the image is 300 x 280\)",
    ),
    "no overlap": (
        lambda f: edit_counts(f, lambda t: t.set_index("9" + t.index)),
        r"section A1: no spot stands in both A1.tsv.gz and A1_selection.tsv",
    ),
    "none selected": (
        lambda f: edit_spots(f, lambda t: t.assign(selected=0)),
        r"section A1: no spot of A1_selection.tsv is selected",
    ),
    "not a number": (
        lambda f: edit_spots(
            f, lambda t: t.astype({"pixel_x": object}).replace({"pixel_x": {40.0: "?"}})
        ),
        r"A1_selection.tsv: row 2, column pixel_x: '\?' is not a number",
    ),
    "no column": (
        lambda f: edit_spots(f, lambda t: t.drop(columns="pixel_y")),
        r"A1_selection.tsv: lacks column pixel_y",
    ),
    "one row of spots": (
        lambda f: edit_spots(f, lambda t: t[t["y"] == 3]),
        r"A1_selection.tsv: the spots do not span a grid",
    ),
    "empty table": (write_text("spots/A1_selection.tsv", ""), r"A1_selection.tsv: not a readable"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named(st_folder, kind):
    break_it, message = BAD[kind]
    break_it(st_folder)
    with pytest.raises(InputError, match=message):
        read_all(st_folder)


ODD = {
    "as it is": ("", ""),
    "float": ("\t3\t", "\t3.0\t"),
    "exponent": ("\t3\t", "\t3e0\t"),
    "spaces": ("\t3\t", "\t 3 \t"),
    "quoted number": ("\t3\t", '\t"3"\t'),
    "quoted name": ("5x4\t", '"5x4"\t'),
    "name of a number": ("5x4\t", "54\t"),
    "no name": ("5x4\t", "\t"),
    "gap": ("\t3\t", "\t\t"),
    "word for a gap": ("\t3\t", "\tNA\t"),
    "nan": ("\t3\t", "\tnan\t"),
    "word": ("\t3\t", "\ttrue\t"),
    "digits in groups": ("\t3\t", "\t3_000\t"),
    "hexadecimal": ("\t3\t", "\t0x3\t"),
    "comment": ("\t3\t", "\t3#\t"),
    "a column more": ("5x4\t", "5x4\t1\t"),
    "a column more in each row": ("\tGENE7", ""),
    "a column less": ("5x4\t", "5x4"),
    "blank line": ("5x4\t", "\n5x4\t"),
    "blank end": ("7x6\t", "\n\n\n7x6\t"),
    "returns": ("\n", "\r\n"),
    "two headers": ("\n", "\nGENE0\tGENE1\n"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_table_is_read_in_one_way_or_refused(st_folder, kind, monkeypatch):
    """Whatever is in it: by NumPy where all are numbers, as pandas alone would read it."""
    path = st_folder / "counts/A1.tsv.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    assert ODD[kind][0] in text
    path.write_bytes(gzip.compress(text.replace(*ODD[kind]).encode()))

    def found() -> tuple | str:
        try:
            adata = read_st(st_folder, section="A1")
        except InputError as error:
            return str(error)
        return adata.to_df().to_dict(), adata.uns["strank"]

    first = found()
    monkeypatch.setattr("strank.io.st.np.loadtxt", refuse)
    assert found() == first


def refuse(*_: object, **__: object) -> None:
    raise ValueError


def test_bad_folders_and_patterns(st_folder, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_st(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no sections; it needs images/"):
        find_st(tmp_path / "empty")
    with pytest.raises(InputError, match="`patient_pattern=Z` finds no patient"):
        read_all(st_folder, patient_pattern="Z")
    with pytest.raises(InputError, match="not a regular expression"):
        read_all(st_folder, patient_pattern="(")


def test_real_sections(her2st):
    adata = read_st(her2st, section="C3")
    assert (adata.n_obs, adata.obs["patient"].iloc[0]) == (180, "C")
    info = section_info(adata)
    assert info.provenance["dropped_spots"]["in selection only"] == 2
    # 200 µm are about 291 px on both axes; tissue area and spot count agree with it.
    assert info.um_per_pixel == pytest.approx(0.686, abs=0.003)
