"""What all readers end with: checks on the tissue, a cohort that is written whole, patients."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from PIL import Image
from scipy import sparse
from typer.testing import CliRunner

import strank.io
from strank.cli import app
from strank.cli.imports import imports
from strank.cohort.contract import section_info
from strank.cohort.genes import name_genes
from strank.cohort.store import read_cohort
from strank.errors import InputError
from strank.io import write_sections
from strank.io.sections import (
    build_section,
    patient_of,
    read_patients,
)
from strank.slides.placement import open_measured
from strank.slides.slide import open_slide

COUNTS = np.arange(12).reshape(4, 3)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.full((200, 400, 3), 240, np.uint8)
    pixels[20:180, 20:180] = np.random.default_rng(0).integers(60, 200, size=(160, 160, 3))
    Image.fromarray(pixels).save(tmp_path / "slide.png")
    return tmp_path / "slide.png"


def build(image: Path, *, counts=COUNTS, x=(50, 60, 70, 80), y=(90, 95, 100, 105), name="S1"):
    spots = pd.DataFrame({"x": x, "y": y, "kind": "cell"}, index=list("abcd"), dtype=object)
    return build_section(
        sparse.csr_matrix(counts),
        spots=spots.astype({"x": float, "y": float}),
        genes=name_genes(pd.Index(["G1", "G2", "G3"]), pd.Index(["E1", "E2", "E3"])),
        section=name,
        patient="P1",
        slide=open_slide(image, 5.0),
        technology="Mine",
        spot_diameter_um=10.0,
        spot_pitch_um=20.0,
        provenance={"counts_file": "counts.h5"},
    )


READERS = [name for name in dir(strank.io) if name.startswith("read_") and "task" not in name]


@pytest.mark.parametrize("name", READERS)
def test_all_readers_have_one_shape(name):
    path, *options = inspect.signature(getattr(strank.io, name)).parameters.values()
    assert (path.name, path.kind) == ("path", path.POSITIONAL_OR_KEYWORD)
    assert {option.kind for option in options} == {path.KEYWORD_ONLY}
    assert path.empty not in {option.default for option in options}
    common = ["image", "section", "patient", "patients", "um_per_pixel"]
    common += ["um_per_pixel_override", "gene_id"]
    given = [option.name for option in options]
    assert {"section", "patient", "patients", "gene_id"} <= set(given)
    assert [n for n in given if n in common] == [n for n in common if n in given]


def test_every_command_takes_what_its_reader_takes():
    """What is no argument of the reader is the path, where to write, which samples, and cells."""
    commands = typer.main.get_group(imports).commands
    assert len(commands) == len(READERS)  # HEST has two, bins and cells of Visium HD one
    for verb, command in commands.items():
        reader = getattr(strank.io, "read_" + verb.removesuffix("-bench").replace("-", "_"))
        options = {p.name for p in command.params if p.param_type_name == "option"}
        options -= {"help", "output", "as_json", "samples", "cells"}
        assert options <= set(inspect.signature(reader).parameters), verb


@pytest.mark.parametrize("verb", sorted(typer.main.get_group(imports).commands))
def test_what_files_say_is_not_overridden_by_nothing(verb, tmp_path):
    command = typer.main.get_group(imports).commands[verb]
    if not any("--mpp-override" in parameter.opts for parameter in command.params):
        assert verb == "st"
        return
    given = ["import", verb, tmp_path / "none", "-o", tmp_path / "c", "--mpp-override"]
    if verb == "anndata":
        given += ["--image", tmp_path / "none.png"]
    result = CliRunner().invoke(app, [str(part) for part in given])
    assert result.exit_code == 2
    told = "Error: --mpp-override takes --mpp in the place of what files say; give it too\n"
    assert result.stderr == told


def test_a_section_holds_what_it_was_built_from(image):
    adata = build(image)
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    np.testing.assert_array_equal(adata.obs["library_size"], COUNTS.sum(1))
    assert adata.obs["kind"].tolist() == ["cell"] * 4
    assert adata.var["gene_id"].tolist() == ["E1", "E2", "E3"]
    info = section_info(adata)
    assert (info.image, info.um_per_pixel, info.technology) == (str(image), 5.0, "Mine")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"counts": COUNTS - 1}, "counts.h5: spot a, gene G1: -1 is negative; raw counts"),
        ({"counts": COUNTS / 2}, "counts.h5: spot a, gene G2: 0.5 is not a whole number"),
        ({"x": (50, 60, 70, 400)}, "S1: spot d lies outside slide.png (400, 105; the image"),
        ({"y": (50, 60, 70, -1)}, "S1: spot d lies outside slide.png (80, -1; the image"),
        (
            {"x": (90, 95, 100, 105), "y": (250, 260, 270, 280)},
            "the image is 400 x 200); with x and y swapped all lie inside",
        ),
        ({"x": (250, 260, 270, 280)}, "S1: only 0% of the spots stand on the tissue of slide.png"),
    ],
)
def test_what_cannot_be_a_section_is_refused(image, changed, message):
    with pytest.raises(InputError) as caught:
        build(image, **changed)
    assert message in str(caught.value)


def test_a_truncated_image_is_refused(image):
    image.write_bytes(image.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"slide.png: .*(damaged|truncated|not an image)"):
        build(image)


@pytest.mark.parametrize("given", [None, 0.49, 0.51])
def test_a_scale_that_agrees_is_taken(image, given):
    assert open_measured(image, 0.5, given).um_per_pixel == (given or 0.5)


def test_a_scale_that_contradicts_is_refused(image):
    with pytest.raises(
        InputError, match=r"`um_per_pixel` says 0.25 µm .*, but the positions make it 0.5"
    ):
        open_measured(image, 0.5, 0.25)
    tiff = image.with_suffix(".tif")
    Image.open(image).save(tiff, resolution_unit=3, resolution=1e4 / 0.25)
    with pytest.raises(
        InputError, match=r"image says 0.25 µm per pixel, but .* 0.5; .*`um_per_pixel=0.5`$"
    ):
        open_measured(tiff, 0.5)
    assert open_measured(tiff, 0.5, 0.5).um_per_pixel == 0.5
    with pytest.raises(InputError, match=r"add `um_per_pixel_override=True` if yours is meant$"):
        open_measured(tiff, 0.5, 0.25)
    assert open_measured(tiff, 0.5, 0.25, override=True).um_per_pixel == 0.25
    with pytest.raises(InputError, match=r"^`um_per_pixel_override` takes `um_per_pixel` in"):
        open_measured(tiff, 0.5, override=True)


def test_nothing_is_written_unless_all_can_be_read(image, tmp_path):
    def some():
        yield build(image)
        raise InputError("the second cannot be read")

    with pytest.raises(InputError, match="the second"):
        write_sections(some(), tmp_path / "cohort")
    with pytest.raises(InputError, match="two sections are called S1"):
        write_sections([build(image), build(image)], tmp_path / "cohort")
    with pytest.raises(InputError, match="no sections"):
        write_sections([], tmp_path / "cohort")
    for name in ("../S1", ".S1", "a/b"):
        with pytest.raises(InputError, match="not the name of a file"):
            write_sections([build(image, name=name)], tmp_path / "cohort")
    assert not (tmp_path / "cohort").exists()


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 255), (40, 255, 90)])
def test_an_image_of_fluorescence_is_told(colour, image, tmp_path):
    assert not section_info(build(image)).provenance["notes"]
    light = 255 - np.asarray(Image.open(image))[..., :1].astype(float)
    light = np.where(light < 20, 0, light / 2) / 255 * np.array(colour)
    Image.fromarray(light.astype(np.uint8)).save(tmp_path / "dapi.png")
    notes = section_info(build(tmp_path / "dapi.png")).provenance["notes"]
    assert [text for text in notes if "as fluorescence (DAPI) is, and H&E is not; whether" in text]


@pytest.mark.parametrize("name", ["nan", "NA", " none", "null", ""])
def test_a_section_needs_a_name(image, name):
    with pytest.raises(InputError, match=r"`section`: .* is no name; give another"):
        build(image, name=name)


def test_the_import_points_out_what_may_be_one(image, tmp_path):
    one, other = build(image), build(image, name="s_1")
    other.obs["patient"] = "p-01"
    with pytest.warns(UserWarning, match="are taken for different ones") as caught:
        write_sections([one, other], tmp_path / "cohort")
    told = list[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of sections that were there, too; and where someone listens, no warning beside it.
        write_sections([other], tmp_path / "cohort", say=told.append)
    assert [str(warning.message) for warning in caught] == told
    assert {warning.filename for warning in caught} == {__file__}
    patients, sections = told
    assert patients.startswith("patients 'P1' and 'p-01' are taken for different ones")
    assert sections.startswith("sections 'S1' and 's_1' are taken for different ones")
    apart = build(image, name="S2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_sections([apart], tmp_path / "other")


@pytest.mark.parametrize(
    "who", ["unknown", "-", "?", "Unknown (A study)", "n.a.", "not_known", "__"]
)
def test_the_import_points_out_patients_whom_nobody_knows(who, image, tmp_path):
    section = build(image)
    section.obs["patient"] = who
    doubts = []
    write_sections([section], tmp_path / "cohort", say=doubts.append)
    (told,) = doubts
    assert told.startswith(f"patient {who!r} of section S1 is taken for one person")
    for known in ("P1", "X", "A-?", "Unknown7", "Nadia", "7", "HER2-", "Unger"):
        section.obs["patient"] = known
        write_sections([section], tmp_path / "cohort", say=doubts.append)
    assert len(doubts) == 1


@pytest.mark.parametrize("counts", [np.zeros((4, 3)), sparse.csr_matrix(COUNTS) * 0])
def test_a_section_without_any_count_is_refused(counts, image):
    with pytest.raises(InputError, match=r"counts.h5: section S1 has no counts at all"):
        build(image, counts=counts)
    build(image, counts=np.eye(4, 3))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_an_image_that_asks_to_be_turned_is_told(suffix, image):
    for orientation in (1, 2, 6, 8):
        exif = Image.Exif()
        exif[274] = orientation
        with Image.open(image) as pixels:
            pixels.save(image.with_name(f"a.{suffix}"), exif=exif)
        notes = section_info(build(image.with_name(f"a.{suffix}"))).provenance["notes"]
        told = f"a.{suffix} asks to be shown turned or mirrored (orientation {orientation} of"
        assert [note.startswith(told) for note in notes] == [True] * (orientation != 1)


def test_sections_that_some_disks_would_take_for_one_are_refused(image, tmp_path):
    both = [build(image), build(image, name="s1")]
    with pytest.raises(InputError, match="sections S1 and s1 are one file where capitals are not"):
        write_sections(both, tmp_path / "cohort")
    assert not (tmp_path / "cohort").exists()
    for _ in range(2):
        write_sections(both[:1], tmp_path / "cohort")
    with pytest.raises(InputError, match="sections S1 and s1 are one file"):
        write_sections(both[1:], tmp_path / "cohort")


def test_sections_join_a_cohort_and_replace_those_of_their_name(image, tmp_path):
    written = write_sections([build(image, name="S2"), build(image)], tmp_path / "cohort")
    assert list(written) == ["S1", "S2"]
    (tmp_path / "cohort/S1.h5ad").write_bytes(b"damaged; importing it again is the way out")
    write_sections([build(image, counts=COUNTS * 2)], tmp_path / "cohort")
    cohort = read_cohort(tmp_path / "cohort")
    assert {n: a.X.sum() for n, a in cohort.items()} == {"S1": COUNTS.sum() * 2, "S2": COUNTS.sum()}
    ids = build(image, name="S3")
    ids.var_names = [f"ENSG{i:011}" for i in range(3)]
    with pytest.raises(InputError, match=r"S1, S2 by symbols and section S3 by Ensembl ids.*id"):
        write_sections([ids], tmp_path / "cohort")
    assert list(read_cohort(tmp_path / "cohort")) == ["S1", "S2"]


def test_patients(tmp_path):
    path = tmp_path / "patients.csv"
    path.write_text("patient,section,age\nP7,007,40\nP7,S2,40\n")
    patients = read_patients(path)
    assert patients == {"007": "P7", "S2": "P7"}
    assert patient_of("007", None, patients) == patient_of("x", "P7") == "P7"
    with pytest.raises(InputError, match=r"S3: .* `patient=NAME`, or .* \(FILE has 007, S2"):
        patient_of("S3", None, patients)
    assert patient_of("S3", None, patients, "stated") == "stated"
    with pytest.raises(InputError, match="S3: the patient is not known"):
        patient_of("S3", None, patients, "nan")
    assert patient_of("007", None, path) == "P7"
    with pytest.raises(InputError, match=r"columns section,patient$"):
        patient_of("S3", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"section;patient\nS1;P1\n", "it has section;patient; columns are separated by commas"),
        (b"section\tpatient\nS1\tP1\n", "columns are separated by commas"),
        ("section,patient\nS1,Mü\n".encode("latin-1"), "save it as CSV in UTF-8, with commas"),
        ("section,patient\nS1,P1\n".encode("utf-16"), "save it as CSV in UTF-8, with commas"),
        (b"", "save it as CSV in UTF-8, with commas"),
    ],
)
def test_tables_of_other_programs_are_told_how_to_save(tmp_path, content, message):
    (tmp_path / "patients.csv").write_bytes(content)
    with pytest.raises(InputError, match=rf"patients.csv: .*{message}$"):
        read_patients(tmp_path / "patients.csv")


@pytest.mark.parametrize(
    "text",
    [
        "section, patient\nS1, P1\nS2, P1\n",
        "section,patient\nS1,P1\nS2,P1 \n",
        "\ufeffsection\t,patient \nS1\u00a0,P1\n S2,\u200bP1\nS2,P1\n,\n",
    ],
)
def test_tables_of_patients_are_stripped(tmp_path, text):
    (tmp_path / "patients.csv").write_text(text)
    assert read_patients(tmp_path / "patients.csv") == {"S1": "P1", "S2": "P1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,patient\nS1,P1\n", "lacks column section; it has name, patient"),
        ("section,patient\nS1,P1\nS1,P2\n", "section S1 has two patients"),
        ("section,patient\nS1,\n", "section S1 has no patient"),
        ("section,patient\nS1,NA\n", "section S1 has no patient"),
        ("section,patient\nS1, null \nS2,P2\n", "section S1 has no patient"),
        ("section,patient\n,P1\n", "section  has no name"),
        ("section,patient\nS1,P1\nS1 ,P2\n", "section S1 has two patients"),
        ("", "not a readable table"),
    ],
)
def test_tables_of_patients_that_cannot_be_used(tmp_path, text, message):
    (tmp_path / "patients.csv").write_text(text)
    with pytest.raises(InputError) as caught:
        read_patients(tmp_path / "patients.csv")
    assert f"patients.csv: {message}" in str(caught.value)
