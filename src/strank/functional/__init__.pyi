from .listwise import list_loss as list_loss
from .listwise import pearson_loss as pearson_loss
from .pairwise import margin_ranking_loss as margin_ranking_loss
from .pairwise import pair_loss as pair_loss
from .pointwise import mse_loss as mse_loss
from .pointwise import negative_binomial_loss as negative_binomial_loss
from .pointwise import poisson_loss as poisson_loss
