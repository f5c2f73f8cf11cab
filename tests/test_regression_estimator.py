"""The estimator of softmax regression, alone and in scikit-learn's hands."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from aftermax.regression import SoftmaxRegression, softmax_regression


@pytest.fixture
def data():
    A = torch.randn(60, 4, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    return A, (A @ x.T).softmax(0), x


def test_columns_are_problems(data):
    A, b, x = data
    many = SoftmaxRegression().fit(A, b)
    torch.testing.assert_close(many.coef_, x, rtol=0, atol=1e-8)
    torch.testing.assert_close(many.predict(A), b)
    assert many.score(A, b) > 1 - 1e-12
    one = SoftmaxRegression().fit(A, b[:, 1])
    torch.testing.assert_close(one.coef_, x[1], rtol=0, atol=1e-8)
    assert one.predict(A).shape == (60,)
    assert one.fit_.status == "converged"
    assert many.n_features_in_ == 4
    assert many.n_iter_ == many.fit_.iterations.max()


def test_arrays_in_arrays_out(data):
    A, b, x = data
    model = SoftmaxRegression().fit(A.numpy(), b.numpy())
    assert isinstance(model.coef_, np.ndarray)
    assert isinstance(model.predict(A.numpy()), np.ndarray)
    np.testing.assert_allclose(model.coef_, x.numpy(), atol=1e-8)
    assert model.score(A.numpy(), b.numpy()) > 1 - 1e-12
    # lists and counts
    counts = SoftmaxRegression().fit([[1, 0], [0, 1], [0, 0]], [4, 2, 2])
    np.testing.assert_allclose(counts.coef_, [np.log(2), 0], atol=1e-9)
    assert SoftmaxRegression().fit(A.float(), b.float()).coef_.dtype == torch.float32


def test_the_parameters_are_the_solvers(data):
    A, b, _ = data
    model = SoftmaxRegression(weight=0.1, ridge=0.01, method="newton", tolerance=1e-6)
    right = softmax_regression(A, b.T, 0.1, 0.01, method="newton", tolerance=1e-6)
    assert torch.equal(model.fit(A, b).coef_, right.x)
    told = "weight=0.1, ridge=0.01, method='newton', tolerance=1e-06"
    assert repr(model) == f"SoftmaxRegression({told})"
    rescaled = SoftmaxRegression(objective="cosh", ridge=0.01).fit(A, b)
    torch.testing.assert_close(rescaled.predict(A).sum(0), torch.ones(3, dtype=torch.float64))


def test_scores_are_shares_of_what_equal_shares_leave(data):
    A, b, _ = data
    model = SoftmaxRegression().fit(A, b[:, 0])
    model.fit_.x.zero_()
    assert abs(model.score(A, b[:, 0])) < 1e-12
    assert model.score(A, torch.ones(60)) == 1
    assert model.score(A, 7 * b[:, 0]) == model.score(A, b[:, 0])


def test_any_array_that_numpy_can_read(data):
    A, b = (t.numpy() for t in data[:2])
    want = SoftmaxRegression().fit(A, b).coef_
    fixed = A.copy()
    fixed.setflags(write=False)  # as joblib's memory maps are
    for array in (fixed, A[::-1][::-1], A.astype(">f8"), A.astype(object), A.tolist()):
        found = SoftmaxRegression().fit(array, b).coef_
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-9)

    class Frame:
        """As of pandas."""

        def __array__(self, dtype=None, copy=None):
            return A.astype(dtype or A.dtype)

    np.testing.assert_array_equal(SoftmaxRegression().fit(Frame(), b).coef_, want)
    assert SoftmaxRegression().fit(A.astype(np.float32), b).coef_.dtype == np.float32
    assert SoftmaxRegression().fit(A.astype(np.float16), b).coef_.dtype == np.float64
    assert SoftmaxRegression().fit(torch.tensor(A).half(), b).coef_.dtype == torch.float64
    with pytest.raises(ValueError, match="real numbers, got complex128"):
        SoftmaxRegression().fit(A + 1j, b)
    with pytest.raises(ValueError, match="finite"):
        SoftmaxRegression().fit(A, b).predict(A * np.nan)


def test_sinh_has_nothing_to_learn(data):
    A, b, _ = data
    with pytest.raises(ValueError, match="x = 0 has loss 0"):
        SoftmaxRegression(objective="sinh").fit(A, b)


def test_errors_say_what_came(data):
    A, b, _ = data
    with pytest.raises(ValueError, match=r"b \(n,\) or \(n, m\) for the n = 60 rows"):
        SoftmaxRegression().fit(A, b[:5])
    with pytest.raises(ValueError, match=r"A must be \(n, d\), got \(60,\)"):
        SoftmaxRegression().fit(A[:, 0], b)
    with pytest.raises(ValueError, match=r"sum above 0, got sums from 0 to 0"):
        SoftmaxRegression().fit(A, 0 * b)
    with pytest.raises(ValueError, match=r"largest sum of 2"):
        SoftmaxRegression(normalise=False).fit(A, 2 * b)
    with pytest.raises(ValueError, match=r"no parameter 'alpha'; it has \['weight'"):
        SoftmaxRegression().set_params(alpha=1)
    model = SoftmaxRegression().fit(A, b)
    with pytest.raises(ValueError, match=r"A has 3 columns"):
        model.predict(A[:, :3])
    with pytest.raises(ValueError, match=r"prediction \(60, 3\), got \(60,\)"):
        model.score(A, b[:, 0])


def test_in_the_hands_of_scikit_learn(data):
    base = pytest.importorskip("sklearn.base")
    from sklearn.exceptions import NotFittedError
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.utils.validation import check_is_fitted

    A, b, _ = (t.numpy() for t in data)
    model = SoftmaxRegression(ridge=0.5)
    copy = base.clone(model)
    assert copy is not model
    assert copy.get_params() == model.get_params()
    assert base.is_regressor(model)
    with pytest.raises(NotFittedError, match="learned nothing yet"):
        model.predict(A)
    with pytest.raises(NotFittedError):
        check_is_fitted(model)
    check_is_fitted(copy.fit(A, b))
    assert not hasattr(model, "coef_")

    search = GridSearchCV(SoftmaxRegression(), {"ridge": [0.0, 1e-3, 10.0]}, cv=3).fit(A, b)
    assert search.best_params_ == {"ridge": 0.0}
    assert search.best_score_ > 1 - 1e-9
    scores = search.cv_results_["mean_test_score"]
    assert (np.diff(scores) < 0).all()

    pipe = make_pipeline(StandardScaler(), SoftmaxRegression()).fit(A, b)
    np.testing.assert_allclose(pipe.predict(A), b, atol=1e-9)


def test_scikit_learn_is_not_needed():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import torch; from aftermax.regression import SoftmaxRegression\n"
        "m = SoftmaxRegression()\n"
        "try: m.predict(torch.eye(3))\n"
        "except AttributeError as error: assert 'learned nothing' in str(error)\n"
        "else: raise SystemExit('no error')\n"
        "m.fit(torch.eye(3), torch.ones(3)); print(float(m.predict(torch.eye(3)).sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1.0"
