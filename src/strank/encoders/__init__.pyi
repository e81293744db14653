from .base import Encoder as Encoder
from .base import Field as Field
from .morphology.encoder import Morphology as Morphology
from .registry import encoder_table as encoder_table
from .registry import get_encoder as get_encoder
