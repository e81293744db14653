"""What µm per pixel a file states, and if none, why: OME-XML, resolution tags, scanners."""

from __future__ import annotations

import html
import math
import re
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from xml.etree import ElementTree

# Outside, a TIFF's resolution is that of a printer or a default of the program that wrote it.
_PLAUSIBLE_UM = (0.05, 10.0)
# Scanners' steps along and across differ by less.
_SQUARE = 0.01
# Scanners and grids agree to a percent; a wrong image or objective is off by far more.
_TOLERANCE = 0.05
_SPELLED = {
    1e-4: "å angstrom",
    1e-3: "nm nanometer nanometers nanometre nanometres",
    1.0: "μm um μ micron microns micrometer micrometers micrometre micrometres",
    1e3: "mm millimeter millimeters millimetre millimetres",
    1e4: "cm centimeter centimeters centimetre centimetres",
    1e6: "m meter metre",
    25400.0: "in inch inches",
}
_UNIT_UM = {name: um for um, names in _SPELLED.items() for name in names.split()}


@dataclass(frozen=True)
class Stated:
    """µm per pixel across and down, NaN for what the file does not say; then ``why`` tells it."""

    x: float = math.nan
    y: float = math.nan
    why: str = ""

    @classmethod
    def by(cls, who: str, x: float, y: float) -> Stated:
        """Take what ``who`` (a tag, a scanner) says, if it can be the size of a slide's pixels."""
        low, high = _PLAUSIBLE_UM
        if all(low <= side <= high for side in (x, y)):
            return cls(x, y)
        if math.isfinite(x) != math.isfinite(y):
            return cls(why=f"{who}: one of two is absent")
        if math.isfinite(x):
            return cls(why=f"{who} makes it {x:.4g} x {y:.4g}: no slide has such pixels")
        return cls(why=f"{who} is absent")

    def or_else(self, other: Stated) -> Stated:
        """Take another where this one knows nothing; if neither does, both say why."""
        if math.isfinite(self.x) or math.isfinite(other.x):
            return self if math.isfinite(self.x) else other
        return Stated(why="; ".join(filter(None, (self.why, other.why))))

    @property
    def um_per_pixel(self) -> float | None:
        """One size of a pixel, if both sides agree."""
        return (self.x * self.y) ** 0.5 if abs(self.x - self.y) <= _SQUARE * self.x else None

    def contradicts(self, um_per_pixel: float) -> bool:
        """Whether it is another scale than that; what is not known contradicts nothing."""
        return any(abs(um_per_pixel / side - 1) > _TOLERANCE for side in (self.x, self.y))

    def __str__(self) -> str:
        if self.um_per_pixel is not None:
            return f"the file says {self.um_per_pixel:.4g} µm per pixel"
        if math.isfinite(self.x):
            return (
                f"the file says {self.x:.4g} µm per pixel across and {self.y:.4g} down, but pixels "
                "must be square; resample the image, or if one of the two is wrong,"
            )
        because = f" ({self.why})" if self.why else ""
        return (
            f"the file does not say its µm per pixel{because}; look it up (scanner, objective) and"
        )


@dataclass(frozen=True)
class OmeImage:
    """One image of an OME-TIFF's metadata."""

    name: str
    size: tuple[int, int]
    stated: Stated
    other_than_rgb: str  # what its grey planes are; empty where three are the colours of a picture


def ome_images(text: str) -> list[OmeImage]:
    """Read what OME-XML says of its images; of damaged XML nothing.

    >>> pixels = '<Pixels SizeX="9" SizeY="9" PhysicalSizeX="250" PhysicalSizeXUnit="nm" '
    >>> pixels += 'PhysicalSizeY="0.25" PhysicalSizeYUnit="&#xB5;m"/>'
    >>> ome_images(f"<OME><Image>{pixels}</Image></OME>")[0].stated.um_per_pixel
    0.25
    """
    # Names as &micro; are HTML's, which XML does not know.
    text = re.sub(
        r"&(?!(?:amp|lt|gt|quot|apos);)#?\w+;", lambda found: html.unescape(found[0]), text
    )
    try:
        root = ElementTree.fromstring(text.strip("\0\ufeff \r\n\t"))
    except (ElementTree.ParseError, ValueError):
        return []
    found = []
    for number, image in enumerate(root.iterfind("{*}Image")):
        pixels = image.find("{*}Pixels")
        if pixels is not None and all(pixels.get(f"Size{a}", "").isdecimal() for a in "XY"):
            size = int(pixels.get("SizeX", "")), int(pixels.get("SizeY", ""))
            name = image.get("Name") or f"image {number}"
            stated = _ome_stated(dict(pixels.attrib))
            found.append(OmeImage(name, size, stated, _other_than_rgb(pixels)))
    return found


def _other_than_rgb(pixels: ElementTree.Element) -> str:
    """Say what grey planes are that are no colours: Bio-Formats leaves those without a name."""
    stack = " x ".join(
        f"{n} {what}"
        for axis, what in {"SizeZ": "focal planes", "SizeT": "times"}.items()
        if (n := pixels.get(axis, "1")) != "1"
    )
    channels = pixels.findall("{*}Channel")
    names = [channel.get("Fluor") or channel.get("Name") or "" for channel in channels]
    lit = [c for c in channels if any("Wavelength" in key or key == "Fluor" for key in c.attrib)]
    plain = len(set(names)) < 2 or "".join(name[:1] for name in names).casefold() == "rgb"
    plain = plain or all(re.fullmatch(r"(?i)(ch|channel|c)?\W*\d*", name) for name in names)
    n_channels = pixels.get("SizeC", "3")
    if n_channels == "1" or (n_channels == "3" and plain and not lit):
        return stack
    told = f"{n_channels} channels" + f": {', '.join(names)}" * any(names)
    return f"{stack} of {told}" if stack else told


def _ome_stated(pixels: dict[str, str]) -> Stated:
    sides = []
    for axis in (f"PhysicalSize{a}" for a in "XY"):
        unit, size = pixels.get(f"{axis}Unit", "µm"), pixels.get(axis)
        if size is not None and math.isnan(unit_um(unit)):
            return Stated(why=f"{axis}Unit is {unit!r}, no known unit of length")
        if size is not None and not math.isfinite(_number(size)):
            return Stated(why=f"{axis} is {size!r}, no number")
        sides.append(_number(size) * unit_um(unit))
    return Stated.by("PhysicalSizeX and PhysicalSizeY of its OME-XML", *sides)


def unit_um(text: str) -> float:
    """Measure a unit of length in µm, however it is spelled; NaN for what is none."""
    text = html.unescape(text)
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), text)
    with suppress(UnicodeError):  # UTF-8 that was taken for Latin-1: "Âµm"
        text = text.encode("latin-1").decode()
    # One letter of the two that look like µ.
    name = unicodedata.normalize("NFKC", text).strip().strip(".").casefold()
    return _UNIT_UM.get(name, math.nan)


def stated_by_tags(per_mm: tuple[float, float], unit: bool, description: str) -> Stated:
    """Read the resolution of a TIFF: pixels per mm, or per nothing where there is no ``unit``."""
    if not unit and description.startswith("ImageJ="):
        named = re.search(r"^unit=(.*)$", description, re.MULTILINE)
        um = unit_um(named[1]) if named else math.nan
        return Stated.by("ImageJ's unit", *(_share(um, n) for n in per_mm))
    if not unit:
        return Stated(why="its resolution has no unit" if set(per_mm) != {1.0} else "no resolution")
    return Stated.by("its resolution", *(_share(1e3, n) for n in per_mm))


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _share(um: float, number: float) -> float:
    return um / number if number else math.nan


def stated_by_scanner(vendor: str, x: str | None, y: str | None) -> Stated:
    """Take what openslide found in a scanner's file."""
    return Stated.by(f"µm per pixel of the scanner ({vendor})", _number(x), _number(y))
