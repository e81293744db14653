# Every public name, written once, in the order of the work; `strank.__init__` imports it when used.
from . import encoders as encoders
from . import functional as functional
from . import io as io
from . import losses as losses
from . import metrics as metrics
from . import report as report
from .cohort.store import read_cohort as read_cohort
from .encoders.embedding import embed as embed
from .evaluation.fold_change import contrast as contrast
from .evaluation.held_out import cross_validate as cross_validate
from .evaluation.held_out import evaluate as evaluate
from .fitting.method import fit as fit
from .linear.regressor import STRankRegressor as STRankRegressor
from .linear.regressor import STRankRegressorCV as STRankRegressorCV
from .model.rank_model import RankModel as RankModel
from .prediction import predict as predict
from .version import __version__ as __version__
