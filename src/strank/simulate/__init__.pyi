from .cohort import simulate_cohort as simulate_cohort
from .counts import CountDesign as CountDesign
from .tissue import TissueDesign as TissueDesign
