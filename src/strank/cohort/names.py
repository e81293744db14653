"""What a name is: sections, patients and genes are told apart by name, so names are made clean."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

import numpy as np
import pandas as pd

from strank.errors import InputError, some

# What tables and their readers write where nothing is known.
_NO_NAMES = {"", "nan", "na", "n/a", "#n/a", "<na>", "nat", "null", "none"}
# Of HEST's patients the study follows.
_NOBODY = re.compile(
    r"[\W_]*((unk|unkn?own|undefined|unnamed|anonymous|missing|tbd|n\.?[ad]"
    r"|not[ _](known|given|available))[\W_]*)?( \(.*\))?"
)
# Blanks, and what is as invisible: marks of byte order, joiners of no width.
_BLANKS = r"[\s\ufeff\u200b-\u200d\u2060]+"
_AROUND = re.compile(f"^{_BLANKS}|{_BLANKS}$")
# Signs tell what they end: HER2+ and HER2-.
_TOKEN = re.compile(r"\d+|[^\W\d_]+|\+|-(?=\W|$)")
_VERSION = re.compile(r"^(ENS[A-Z]*\d{11})\.\d+")

# How two names of one thing come to differ, the likeliest first.
_DIFFERENCES: dict[str, Callable[[str], str]] = {
    "blanks around the names": lambda gene: clean_name(gene) or gene,
    "versions of Ensembl ids": lambda gene: _VERSION.sub(r"\1", clean_name(gene)),
    "capital and small letters": lambda gene: _VERSION.sub(r"\1", clean_name(gene)).casefold(),
}


def clean_name(name: object) -> str:
    """Strip a name of blanks; empty where it is none: absent, nan, NA, null, none or blank."""
    if isinstance(name, (float, np.floating)) and name.is_integer():
        name = int(name)  # tables make fractions of whole numbers where some are missing
    text = "" if name is None or name is pd.NA else _AROUND.sub("", str(name))
    text = unicodedata.normalize("NFC", text)  # macOS writes ü as u with dots
    return "" if text.casefold() in _NO_NAMES else text


def clean_names(names: Iterable[object]) -> pd.Index:
    """Clean many names, each as `clean_name` does."""
    return pd.Index([clean_name(name) for name in names], dtype=object)


def given_name(name: object, argument: str) -> str:
    """Clean a name that an argument gives, which must be one."""
    if not (clean := clean_name(name)):
        raise InputError(f"`{argument}`: {str(name)!r} is no name; give another")
    return clean


def alike(names: Iterable[str]) -> list[list[str]]:
    """Group names that a person may have meant for one: P1, p1, P-1, P01 and full-width P1."""
    groups: dict[object, list[str]] = {}
    for name in sorted(set(names)):
        plain = unicodedata.normalize("NFKC", name).casefold().removesuffix(".0")
        tokens = [token.lstrip("0") or "0" for token in _TOKEN.findall(plain)]
        groups.setdefault(tuple(tokens) or name, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def told_apart(what: str, names: Iterable[str]) -> list[str]:
    """Point out names that may have been meant for one, in sentences."""
    return [
        f"{what} {' and '.join(map(repr, group))} are taken for different ones; if they are one, "
        "give all of them one name"
        for group in alike(names)
    ]


def difference(one: pd.Index, other: pd.Index) -> str:
    """Say by what the genes of two sections differ that may be the same; empty if by nothing."""
    only_one, only_other = one.difference(other), other.difference(one)
    for what, same in _DIFFERENCES.items():
        left = {same(str(gene)): str(gene) for gene in only_one}
        right = {same(str(gene)): str(gene) for gene in only_other}
        if both := sorted(left.keys() & right.keys()):
            pairs = [f"{left[key]!r} and {right[key]!r}" for key in both]
            return f"{what} ({some(pairs, 1)})"
    return ""


def no_persons(patients: Mapping[str, str]) -> list[str]:
    """Point out patients whose names say that nobody knows them, in sentences."""
    odd = sorted({who for who in patients.values() if who and _NOBODY.fullmatch(who.casefold())})
    return [
        f"patient {who!r} of section {some(sorted(s for s, w in patients.items() if w == who))} is "
        "taken for one person; if nobody is meant, name patients that are surely apart"
        for who in odd
    ]


def look_alikes(patients: Mapping[str, str], genes: Mapping[str, pd.Index]) -> list[str]:
    """Point out patients, sections and genes of a cohort that may be the same, in sentences."""
    people = filter(None, patients.values())
    told = no_persons(patients)
    told += [
        f"{text} and import again"
        for what, names in {"patients": people, "sections": patients}.items()
        for text in told_apart(what, names)
    ]
    for (one, those), (other, these) in pairwise(genes.items()):
        if how := difference(those, these):
            told.append(
                f"sections {one} and {other}: genes that differ only by {how} are taken for "
                "different ones; name genes in one way and import again"
            )
            break  # in a cohort of many sections the others are as this one
    return told


def no_common_genes(genes: Mapping[str, pd.Index]) -> InputError:
    """Make the error of sections that share no gene: where it begins, and why."""
    told = f"no gene is measured in all of the sections {some(genes)}"
    shared: pd.Index | None = None
    for name, those in genes.items():
        before, shared = shared, those if shared is None else shared.intersection(those)
        if shared.empty and before is not None:
            if how := difference(before, those):
                told += f": they differ only by {how}; name genes in one way and import again"
            else:
                told += f": {name} has {some(those, 3) or 'none'}, before it {some(before, 3)}"
            break
    return InputError(told)
