from .changes import volcano as volcano
from .curves import calibration as calibration
from .curves import learning as learning
from .methods import depth as depth
from .methods import scores as scores
from .tissue import map as map
from .tissue import novelty as novelty
from .tissue import uncertainty as uncertainty
