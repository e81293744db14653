from .base import Encoder as Encoder
from .base import Field as Field
from .load import encoder_table as encoder_table
from .load import get_encoder as get_encoder
from .morphology.encoder import Morphology as Morphology
