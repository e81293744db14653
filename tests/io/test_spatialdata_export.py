"""The SpatialData folder, as spatialdata and squidpy read it."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import spatialdata
import spatialdata_plot  # noqa: F401
import squidpy
from anndata import AnnData
from PIL import Image
from spatialdata.transformations import get_transformation

from strank.errors import InputError
from strank.io import exports as spatial_data
from strank.io import write_spatialdata

UM = 0.5
SIZE = (3000, 2600)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Glass with a dark rectangle: x 1200 to 1800, y 400 to 2000 pixels."""
    pixels = np.full((SIZE[1], SIZE[0], 3), 250, np.uint8)
    pixels[400:2000, 1200:1800] = (120, 30, 90)
    path = tmp_path_factory.mktemp("slide") / "made.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def predictions(slide) -> AnnData:
    """Tiles of 50 µm, 25 µm apart, over the rectangle."""
    y, x = np.meshgrid(np.arange(425, 2000, 50.0), np.arange(1225, 1800, 50.0), indexing="ij")
    centres = np.column_stack([x.ravel(), y.ravel()])
    rng = np.random.default_rng(0)
    return AnnData(
        rng.normal(size=(len(centres), 3)).astype(np.float32),
        obs=pd.DataFrame(
            {"section": pd.Categorical(["made"] * len(centres))},
            index=[f"tile{i}" for i in range(len(centres))],
        ),
        var=pd.DataFrame(
            {"counts": [1.0, 2.0, 3.0], "measured": False}, index=["ERBB2", "HLA/A <b>", "µ"]
        ),
        obsm={"spatial": centres},
        uns={
            "strank": {
                **{"um_per_pixel": UM, "stride_um": 25.0, "tile_um": 50.0},
                "image": str(slide),
            },
            "strank_model": '{"method": "list"}',
        },
    )


@pytest.fixture(scope="module")
def read(predictions, tmp_path_factory) -> spatialdata.SpatialData:
    path = tmp_path_factory.mktemp("out") / "scores.zarr"
    write_spatialdata(predictions, path)
    # Once more: the folder there is replaced.
    write_spatialdata(predictions, path)
    assert [p.name for p in path.parent.iterdir()] == ["scores.zarr"]
    return spatialdata.read_zarr(path)


def test_scores_are_as_they_were(read, predictions):
    table = read["table"]
    np.testing.assert_array_equal(table.X, predictions.X)
    assert table.var_names.tolist() == predictions.var_names.tolist()
    assert table.obs_names.tolist() == predictions.obs_names.tolist()
    assert table.uns["strank_model"] == predictions.uns["strank_model"]
    assert table.uns["strank"]["stride_um"] == 25


def test_shapes_lie_where_the_table_says(read, predictions):
    tiles = spatialdata.transform(read["tiles"], to_coordinate_system="global")
    elements, table = spatialdata.join_spatialelement_table(
        sdata=read, spatial_element_names="tiles", table_name="table", how="inner"
    )
    assert list(elements) == ["tiles"]
    assert table.n_obs == predictions.n_obs
    middle = tiles.loc[read["table"].obs["tile"].to_numpy()].centroid
    np.testing.assert_allclose(
        np.column_stack([middle.x, middle.y]), predictions.obsm["spatial"], atol=1e-9
    )
    np.testing.assert_allclose(tiles.area, (25 / UM) ** 2)


def test_the_image_lies_under_the_tiles(read):
    """The dark rectangle of every level is where it is in the slide, in the global system."""
    assert len(read["he"].children) == 2
    for level in read["he"].children.values():
        image = next(iter(level.data_vars.values()))
        assert image.dims == ("c", "y", "x")
        assert image.c.to_numpy().tolist() == ["r", "g", "b"]
        to_global = get_transformation(image, "global").to_affine_matrix(("x", "y"), ("x", "y"))
        rows, columns = np.nonzero(image.to_numpy()[0] < 185)
        corners = np.array([[columns.min(), rows.min(), 1], [columns.max() + 1, rows.max() + 1, 1]])
        found = corners @ to_global.T
        np.testing.assert_allclose(found[:, :2], [[1200, 400], [1800, 2000]], atol=to_global[0, 0])
        whole = [image.sizes["x"], image.sizes["y"], 1] @ to_global.T
        np.testing.assert_allclose(whole[:2], SIZE, rtol=1e-9)


def test_squidpy_finds_the_neighbours(read):
    squidpy.gr.spatial_neighbors_grid(read["table"], n_neighs=4)
    degree = np.asarray(read["table"].obsp["spatial_connectivities"].sum(1)).ravel()
    # 12 x 32 tiles on a square grid: four neighbours inside, fewer at the rim.
    assert np.bincount(degree.astype(int)).tolist() == [0, 0, 4, 80, 300]
    # From the shapes, too, in the global system.
    where = {"elements_to_coordinate_systems": {"tiles": "global"}, "table_key": "table"}
    squidpy.gr.spatial_neighbors_knn(read, **where, n_neighs=2)
    np.testing.assert_allclose(read["table"].obsp["spatial_distances"].data, 25 / UM)


def test_the_image_is_bounded_and_may_have_moved(slide, predictions, tmp_path, monkeypatch):
    monkeypatch.setattr(spatial_data, "_MOST_PIXELS", 300)
    predictions = predictions.copy()
    predictions.uns["strank"]["image"] = "moved.png"
    with pytest.raises(InputError, match=r"moved.png: no such"):
        write_spatialdata(predictions, tmp_path / "s.zarr")
    write_spatialdata(predictions, tmp_path / "s.zarr", image=slide)
    image = spatialdata.read_zarr(tmp_path / "s.zarr")["he"]
    assert dict(image.sizes) == {"c": 3, "y": 260, "x": 300}


def test_an_interrupted_write_leaves_nothing(predictions, tmp_path, monkeypatch):
    def full(self, path, **options):
        path.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spatialdata.SpatialData, "write", full)
    with pytest.raises(OSError, match="No space"):
        write_spatialdata(predictions, tmp_path / "s.zarr")
    assert not list(tmp_path.iterdir())


def test_spatialdata_plot_draws_tiles_over_the_image(read, predictions):
    """Squares of the stride in the colours of a gene, in pixels of the full image as the H&E."""
    read.pl.render_images("he").pl.render_shapes("tiles", color="ERBB2").pl.show()
    ax = plt.gcf().axes[0]
    (marks,) = ax.collections
    corners = np.array([path.get_extents().get_points() for path in marks.get_paths()])
    np.testing.assert_allclose(corners.mean(1), predictions.obsm["spatial"], atol=1e-6)
    np.testing.assert_allclose(corners[:, 1] - corners[:, 0], 25 / UM)
    values = predictions[:, "ERBB2"].X.ravel()
    expected = plt.get_cmap("viridis")(plt.Normalize(values.min(), values.max())(values))
    np.testing.assert_allclose(marks.get_facecolor()[:, :3], expected[:, :3], atol=1e-2)
    # The dark rectangle is drawn where it is in the slide.
    (picture,) = ax.images
    dark = np.asarray(picture.get_array())[..., 0] < 0.7
    rows, columns = np.nonzero(dark)
    found = np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]])
    to_axes = picture.get_transform() - ax.transData
    shrink = np.array(SIZE) / dark.shape[::-1]
    np.testing.assert_allclose(
        to_axes.transform(found), [[1200, 400], [1800, 2000]], atol=shrink[0]
    )
    plt.close("all")
