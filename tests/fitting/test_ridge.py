"""The ridge that stands in every table: that of scikit-learn, found with fewer fits."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from strank.cohort.training_set import TrainingData
from strank.fitting.exact import ALPHAS, ExactOptions, solve_ridge
from strank.metrics.correlation import log1p_cp10k


@pytest.mark.parametrize("n_features", [5, 90])
def test_the_ridge_is_that_of_a_grid_search_of_scikit_learn(n_features):
    rng = np.random.default_rng(n_features)
    features = rng.normal(size=(80, n_features)) * rng.lognormal(0, 1, n_features) + 3.0
    features[:, 2] = 1.0
    rates = np.exp(1 + 0.2 * features[:, :1] * rng.normal(size=(1, 4)))
    counts = sparse.csr_matrix(rng.poisson(rates).astype(float))
    group = np.repeat(["a", "b", "c", "d"], [10, 20, 20, 30])
    depth = rng.lognormal(2, 0.3, 80)
    data = TrainingData(features, counts, depth, group, np.zeros((80, 2)), group)
    solved = solve_ridge(data, ExactOptions())
    search = GridSearchCV(
        make_pipeline(StandardScaler(), Ridge()),
        {"ridge__alpha": ALPHAS},
        cv=LeaveOneGroupOut(),
        scoring="neg_mean_squared_error",
    )
    search.fit(features, log1p_cp10k(counts, depth).toarray(), groups=group)
    assert solved.table["alpha"][0] == search.best_params_["ridge__alpha"]
    assert ALPHAS[0] < solved.table["alpha"][0] < ALPHAS[-1]
    np.testing.assert_allclose(solved.predict(features), search.predict(features), rtol=1e-12)
