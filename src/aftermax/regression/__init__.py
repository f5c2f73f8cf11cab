"""Softmax regression: fitting softmax(A x) to a distribution b over the rows of A."""

from aftermax.regression.objective import (
    Expansion,
    MatrixForm,
    Normalised,
    Objective,
    Rescaled,
    softmax_gauss_newton,
    softmax_gradient,
    softmax_hessian,
    softmax_loss,
)
from aftermax.regression.solve import Fit, minimize, softmax_regression

__all__ = [
    "Expansion",
    "Fit",
    "MatrixForm",
    "Normalised",
    "Objective",
    "Rescaled",
    "minimize",
    "softmax_gauss_newton",
    "softmax_gradient",
    "softmax_hessian",
    "softmax_loss",
    "softmax_regression",
]
