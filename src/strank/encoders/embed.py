"""From sections and their images to features beside the counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from strank.cohort.contract import section_info, spots_checksum
from strank.cohort.store import features_path, read_h5ad, section_names
from strank.encoders.base import Encoder, encoder_facts
from strank.encoders.sections import Dtype, Run, features_of
from strank.encoders.tiles import Batch, Say, encode_batches
from strank.errors import InputError
from strank.files import sha256
from strank.slides.image import Slide, slide_of

__all__ = ["BATCH", "Embedded", "check_scale", "embed_cohort", "embed_section", "embed_spots"]

Advance = Callable[[int], object]

#: Spots that are read and encoded at a time.
BATCH = 64
