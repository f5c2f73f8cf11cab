"""`SoftmaxRegression`: the solver with the manners of scikit-learn, which is not needed for it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from aftermax.regression.solve import Fit, softmax_regression


class SoftmaxRegression:
    """Fits softmax(A x) to a distribution b over the rows of A; what is learned is x.

    One problem is one column: the n rows of A are the things among which probability is shared, d
    numbers of each, and b says how much each gets. So, unlike in scikit-learn's regressions, the
    rows are no independent samples: a prediction for a row depends on which rows stand beside it,
    and `predict(A')` shares the same mass out among the rows of A', however many they are. Cross
    validation splits rows; b is therefore divided by its sum before a fit (`normalise=True`), and a
    score compares shapes: predicted shares and true ones, both summing to 1 over the rows at hand.

    With m columns of b, (n, m), there are m problems with one A, solved at once.

    After a fit there are `coef_` (x, (d,), or (m, d) as scikit-learn has it, for m columns), `fit_`
    (the `Fit` of `softmax_regression`: loss, certificate, flags, `status`), `n_iter_` (the largest
    number of steps of any column) and `n_features_in_` (d).

    Args:
        weight: the papers' w, one number >= 0 for all rows.
        ridge: >= 0.
        method, objective, tolerance, max_iterations: as of `softmax_regression`. With `objective`
            "exp" or "cosh" `predict` gives u / <u, 1>; "sinh" is refused, as x = 0 has loss 0.
        normalise: divide b by its sum first. If False, b must sum to at most 1.

    A and b are numpy arrays, torch tensors or lists; tensors in, tensors out, arrays in, arrays
    out. float32 stays, all else (integers, lists, half precision) becomes float64.

    It has what scikit-learn asks for (parameters set by keyword and left alone, `get_params`,
    `set_params`, learned attributes with an underscore at the end), so that `clone`, pipelines and
    `GridSearchCV` work.

    >>> A = torch.randn(50, 3, dtype=torch.float64)
    >>> x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    >>> model = SoftmaxRegression().fit(A, torch.softmax(A @ x, 0))
    >>> model.coef_
    tensor([ 1.0000, -2.0000,  0.5000], dtype=torch.float64)
    >>> round(float(model.predict(A[:5]).sum()), 6)
    1.0
    """

    coef_: Any
    fit_: Fit
    n_iter_: int
    n_features_in_: int

    def __init__(
        self,
        *,
        weight: float = 0.0,
        ridge: float = 0.0,
        method: str = "auto",
        objective: str = "softmax",
        tolerance: float = 0.0,
        max_iterations: int = 300,
        normalise: bool = True,
    ):
        self.weight = weight
        self.ridge = ridge
        self.method = method
        self.objective = objective
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.normalise = normalise

    def fit(self, A: Any, b: Any) -> SoftmaxRegression:
        """Learns x of A (n, d) and b (n,) or (n, m).

        Raises:
            ValueError: shapes that do not fit, numbers that are not finite, a negative b, a column
                of b without mass (or, with normalise=False, with more than 1); "sinh".
        """
        if self.objective == "sinh":
            raise ValueError(
                'objective="sinh" has nothing to learn: x = 0 has loss 0 whatever b is. For a fit'
                ' near an x0 call minimize(Rescaled(A, b, kind="sinh"), x0)'
            )
        data, target = _tensor(A), _tensor(b)
        _need_rows(data)
        if target.ndim not in (1, 2) or len(target) != len(data):
            raise ValueError(
                f"fit takes b (n,) or (n, m) for the n = {len(data)} rows of A, got"
                f" b {tuple(target.shape)}"
            )
        columns = target.to(data.dtype).mT if target.ndim == 2 else target.to(data.dtype)
        if self.normalise:
            columns = _shares(columns)
        found = softmax_regression(
            data,
            columns,
            self.weight,
            self.ridge,
            method=self.method,  # pyright: ignore[reportArgumentType]
            objective=self.objective,  # pyright: ignore[reportArgumentType]
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )
        self.fit_, self.coef_ = found, _like(A, found.x)
        self.n_iter_, self.n_features_in_ = int(found.iterations.max()), data.shape[1]
        return self

    def predict(self, A: Any) -> Any:
        """The shares of the rows of A, (n,) or (n, m); each column sums to 1."""
        return _like(A, self._shares_of(A))

    def score(self, A: Any, b: Any) -> float:
        """1 - ||predicted - b||^2 / ||1/n - b||^2, the mean over columns; 1 is best.

        b is divided by its sum. R^2 of the shares: 0 is what equal shares get. Of a b that is
        itself equal shares it is 1 if they are predicted to rounding, else 0.
        """
        predicted = self._shares_of(A)
        target = _tensor(b).to(predicted.dtype)
        if target.shape != predicted.shape:
            raise ValueError(
                f"score takes b of the shape of the prediction {tuple(predicted.shape)}, got"
                f" {tuple(target.shape)}"
            )
        target = _shares(target.mT).mT if target.ndim == 2 else _shares(target)
        left = (predicted - target).square().sum(0)
        all_of_it = (1 / len(target) - target).square().sum(0)
        nothing = torch.finfo(target.dtype).eps ** 2 * 1e4 / len(target)
        flat = torch.where(left <= nothing, 1.0, 0.0).to(target)
        return float(torch.where(all_of_it > nothing, 1 - left / all_of_it, flat).mean())

    def _shares_of(self, A: Any) -> Tensor:
        if not hasattr(self, "coef_"):
            raise _not_fitted()(
                "this SoftmaxRegression has learned nothing yet: call fit(A, b) first"
            )
        data = _tensor(A)
        _need_rows(data)
        if not bool(data.isfinite().all()):
            raise ValueError("A must be finite")
        if data.shape[1] != self.n_features_in_:
            raise ValueError(
                f"A has {data.shape[1]} columns, X has {data.shape[1]} features, but"
                f" SoftmaxRegression is expecting {self.n_features_in_} features as input"
            )
        x = self.fit_.x.to(data.dtype)
        s = data @ (x.mT if x.ndim == 2 else x)
        if self.objective == "cosh":
            return torch.logaddexp(s, -s).softmax(0)
        return s.softmax(0)

    # ---- what scikit-learn asks for

    @classmethod
    def _parameters(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name; `deep` is of no account, since none of them has its own."""
        return {name: getattr(self, name) for name in self._parameters()}

    def set_params(self, **params: Any) -> SoftmaxRegression:
        """Sets some; a name that is none of them is a ValueError that lists them."""
        for name, value in params.items():
            if name not in self._parameters():
                raise ValueError(
                    f"SoftmaxRegression has no parameter {name!r}; it has {self._parameters()}"
                )
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self).__init__).parameters
        told = (
            f"{name}={value!r}"
            for name, value in self.get_params().items()
            if value != defaults[name].default
        )
        return f"{type(self).__name__}({', '.join(told)})"

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "coef_")

    def __sklearn_tags__(self) -> Any:
        # asked for by scikit-learn alone, which is there then
        from sklearn.utils import InputTags, RegressorTags, Tags, TargetTags

        return Tags(
            estimator_type="regressor",
            target_tags=TargetTags(required=True, positive_only=True, multi_output=True),
            regressor_tags=RegressorTags(),
            input_tags=InputTags(),
        )


def _tensor(a: Any) -> Tensor:
    """In float32 or float64, and of numbers alone; whatever is no tensor is numpy's to read."""
    if isinstance(a, Tensor):
        if a.is_complex():
            raise ValueError(f"SoftmaxRegression takes real numbers, got {a.dtype}")
        return a.detach() if a.dtype == torch.float32 else a.detach().double()
    import numpy as np

    array = np.asarray(a)
    if array.dtype.kind == "c":
        raise ValueError(f"SoftmaxRegression takes real numbers, got {array.dtype}")
    dtype = np.float32 if array.dtype == np.float32 else np.float64
    # a copy, as torch takes no negative strides and warns of what is not writable
    return torch.from_numpy(np.array(array, dtype=dtype, order="C"))


def _like(a: Any, t: Tensor) -> Any:
    return t if isinstance(a, Tensor) else t.numpy()


def _need_rows(data: Tensor) -> None:
    if data.ndim != 2:
        raise ValueError(f"A must be (n, d), got {tuple(data.shape)}")


def _shares(b: Tensor) -> Tensor:
    """b over its sum, along the last dimension."""
    mass = b.sum(-1, keepdim=True)
    if not bool((mass > 0).all() & mass.isfinite().all()):
        raise ValueError(
            "SoftmaxRegression needs columns of b that are finite with a sum above 0, got sums"
            f" from {mass.min().item():g} to {mass.max().item():g}"
        )
    return b / mass


def _not_fitted() -> type[Exception]:
    """scikit-learn's own, where it is there, since its tools look for it."""
    try:
        from sklearn.exceptions import NotFittedError
    except ImportError:
        return AttributeError
    return NotFittedError
