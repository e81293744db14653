"""What the features are called, field by field; listed without the libraries that measure them."""

from __future__ import annotations

from collections.abc import Iterator

from strank.encoders.base import Field

# What the fields are called in the names of the features.
FIELD_NAMES = ("spot", "nearby", "surroundings")
# Fibres and local patterns are fine structures: they are sought in the smallest scales only.
N_FIBRE_SCALES, N_PATTERN_SCALES = 3, 1
_STAINS = ("hematoxylin", "eosin")
_QUANTILES = ("q05", "q25", "q50", "q75", "q95")
_PATTERNS = (*(f"{n}_of_8" for n in range(9)), "mixed")
_KINDS = ("spindle", "large", "small_round", "dark", "large_pale", "small_dark")
_MEASURED = (
    *("log_area_um2", "elongation", "hematoxylin", "chromatin_sd", "green_to_red", "blue_to_red"),
    "log_nearest_um",
)


def feature_names(fields: tuple[Field, ...]) -> tuple[str, ...]:
    """One unique name a feature, as ``<field>.<part>.<what>``."""
    named = zip(FIELD_NAMES, fields, strict=True)
    return tuple(f"{name}.{feature}" for name, field in named for feature in patch_names(field))


def patch_names(field: Field) -> Iterator[str]:
    """Names of the features of one patch, in the order in which `describe_patch` gives them."""
    scales = dyadic_scales(field.um, field.um / field.pixels)
    for stain in _STAINS:
        yield from (f"{stain}.{what}" for what in ("mean", "sd", *_QUANTILES))
    yield from ("hue.green_to_red", "hue.blue_to_red", "tissue.share")
    yield from (f"holes.sqrt_share_{um}um_deep" for um in (5, 15))
    for scale in scales:
        for stain in _STAINS:
            yield from (f"bands.{stain}.{what}_{scale}um" for what in ("log_contrast", "skewness"))
        yield f"bands.stains.correlation_{scale}um"
    for scale in scales[:N_FIBRE_SCALES]:
        of_fibres = ("alignment", "coherence", "even_coherence")
        yield from (f"fibres.{what}_{scale}um" for what in of_fibres)
    for scale in scales[:N_PATTERN_SCALES]:
        yield from (f"patterns.{what}_{scale}um" for what in _PATTERNS)
    yield from (f"nuclei.{what}" for what in _of_nuclei())


def _of_nuclei() -> Iterator[str]:
    yield from ("sqrt_density_per_mm2", "area_share", "log_per_clump")
    yield from (f"{kind}.sqrt_density_per_mm2" for kind in _KINDS)
    yield from (f"{name}.{what}" for name in _MEASURED for what in ("mean", "sd"))
    yield "between.share"
    yield from (
        f"between.{stain}.{w}" for stain in ("hematoxylin", "eosin") for w in ("mean", "sd")
    )


def dyadic_scales(um: float, um_per_pixel: float) -> tuple[int, ...]:
    """Powers of two, in µm, from 1.5 pixels to a seventh of the field: what it can show.

    >>> dyadic_scales(150, 150 / 224)
    (1, 2, 4, 8, 16)
    """
    powers = (2**power for power in range(16))
    # A hundredth of slack, so that 1 µm counts as 1.5 pixels of 150/224 µm.
    return tuple(scale for scale in powers if 1.49 * um_per_pixel <= scale <= um / 7)
