"""Softmax regression: fitting softmax(A x) to a distribution b over the rows of A."""

from aftermax.regression.bounds import convex_weight, hessian_lipschitz, safe_step
from aftermax.regression.closeness import ClosenessReport, closeness_report
from aftermax.regression.construct import (
    equivalent_update,
    gradient_step_logits,
    linear_attention_update,
    softmax_attention_update,
    softmax_head_logits,
)
from aftermax.regression.estimator import SoftmaxRegression
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
    "ClosenessReport",
    "Expansion",
    "Fit",
    "MatrixForm",
    "Normalised",
    "Objective",
    "Rescaled",
    "SoftmaxRegression",
    "closeness_report",
    "convex_weight",
    "equivalent_update",
    "gradient_step_logits",
    "hessian_lipschitz",
    "linear_attention_update",
    "minimize",
    "safe_step",
    "softmax_attention_update",
    "softmax_gauss_newton",
    "softmax_gradient",
    "softmax_head_logits",
    "softmax_hessian",
    "softmax_loss",
    "softmax_regression",
]
