"""Encoders by name: what is listed, and what a user's own module may give."""

from __future__ import annotations

import re

import numpy as np
import pytest

import strank
from strank.encoders.base import Field, encoder_facts
from strank.encoders.catalogue import CATALOGUE
from strank.encoders.registry import ENCODERS, encoder_table, get_encoder
from strank.errors import InputError

MODULE = """
from strank.encoders.base import Field
class Grey:
    name, version, fields, feature_names = "grey", "1", (Field(50.0, 8),), ("mean",)
    def encode(self, patches):
        return patches[0].mean((1, 2, 3), dtype="float32")[:, None]
class Half:
    name, version = "half", "1"
number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_encoders_of_a_test.py").write_text(MODULE)
    (tmp_path / "needy_of_a_test.py").write_text("import no_such_library_of_a_test")
    monkeypatch.syspath_prepend(tmp_path)
    return "my_encoders_of_a_test"


def test_a_callable_of_the_user_is_an_encoder(module):
    encoder = get_encoder(f"{module}:Grey")
    assert encoder.fields == (Field(50.0, 8),)
    patches = np.full((2, 8, 8, 3), 7, np.uint8)
    np.testing.assert_array_equal(encoder.encode([patches]), [[7], [7]])
    facts = encoder_facts(encoder)
    assert (facts["name"], facts["n_features"]) == ("grey", 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_of_a_test:make", "no module 'absent_of_a_test'; install it, or put its folder"),
        ("{}:Absent", "no 'Absent' in"),
        ("{}:", "no '' in"),
        ("{}:number", "cannot be called"),
        ("{}:Half", "gives no encoder: Half has no fields, feature_names, encode; see"),
    ],
)
def test_anything_else_is_refused(module, name, message):
    name = name.format(module)
    with pytest.raises(InputError, match=re.escape(f"{name}: {message}")):
        get_encoder(name)


def test_code_that_a_file_names_is_not_run(module):
    with pytest.raises(InputError, match=f"^{module}:Grey: code that a file names is not run"):
        get_encoder(f"{module}:Grey", own=False)


def test_what_the_users_module_lacks_passes_through(module):
    with pytest.raises(ModuleNotFoundError, match="no_such_library_of_a_test"):
        get_encoder("needy_of_a_test:make")


def test_an_unknown_name_lists_all_and_suggests_the_nearest():
    with pytest.raises(
        InputError, match=r"did you mean 'uni2-h'\? choose one of morphology, "
    ) as e:
        get_encoder("UNI2h")
    assert all(name in str(e.value) for name in (*ENCODERS, *CATALOGUE))


def test_weights_are_for_networks_of_the_catalogue(tmp_path, module):
    for name in ("morphology", f"{module}:Grey"):
        with pytest.raises(InputError, match="`weights` is for image networks, which"):
            get_encoder(name, weights=tmp_path / "x.safetensors")
        with pytest.raises(InputError, match="`um` is for image networks, which"):
            get_encoder(name, um=50.0)
    with pytest.raises(InputError, match=r"timm:resnet18: `weights` .* as timm:FOLDER"):
        get_encoder("timm:resnet18", weights=tmp_path / "x.safetensors")


def test_the_namespace_has_what_a_user_needs_and_no_more():
    assert sorted(strank.encoders.__all__) == sorted(dir(strank.encoders))
    assert set(strank.encoders.__all__) == {
        *("Encoder", "Field", "Morphology", "encoder_table", "get_encoder"),
    }
    assert strank.encoders.get_encoder is get_encoder


def test_the_table_has_every_encoder_and_what_it_may_be_used_for():
    rows = {row["name"]: row for row in encoder_table()}
    assert list(rows) == [*ENCODERS, *CATALOGUE]
    assert rows["morphology"]["width"] == len(get_encoder("morphology").feature_names)
    for row in rows.values():
        assert row["licence"]
        assert row["citation"]
        assert 0.1 < row["um_per_pixel"] <= 1
    # A width, scale and window by hand from the model's card.
    assert rows["virchow2"]["width"] == 2 * 1280
    assert CATALOGUE["conch_v1.5"].field == Field(256.0, 448)
    assert CATALOGUE["uni"].field == Field(112.0, 224)
