from .base import Encoder as Encoder
from .base import Field as Field
from .catalogue import encoder_table as encoder_table
from .catalogue import get_encoder as get_encoder
from .morphology.encoder import Morphology as Morphology
