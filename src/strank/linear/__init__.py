"""The exact fit of a linear head.

The path of one fit: `regressor` (or `regressor_cv`) takes arrays, `data` checks them, `geometry`
measures how features vary, `design` cuts the genes into blocks that fit into memory, here or on
workers, and states the `Problem` of each,
`objective` is what is minimised, `solver` minimises it, `exact` says how every gene ended. Beside
it, `penalty` and `prior` do the same with groups of sections left out, to choose.
"""
