"""Settings that all tests share."""

import hypothesis
import pytest
import torch

from aftermax import kernels

pytest.register_assert_rewrite(
    "tests.attention_cases",
    "tests.contract",
    "tests.label_cases",
    "tests.linear_cases",
    "tests.linear_layer",
    "tests.row_cases",
    "tests.weight_laws",
)

# the same examples on every run: a red test is red for everyone, and timing is no verdict
hypothesis.settings.register_profile("aftermax", derandomize=True, deadline=None, max_examples=20)
hypothesis.settings.load_profile("aftermax")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=kernels.ISAS)
def body(request):
    """Every body of the kernels that runs here."""
    from .native import running

    with running(request.param):
        yield request.param


@pytest.fixture(params=["reference", "cpu"])
def impl(request):
    if request.param == "cpu" and kernels.absent() is not None:
        pytest.skip(kernels.absent())
    return request.param


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def comparison(tmp_path_factory):
    """A finished `aftermax compare`, for tests that only read it: its folder, what it printed."""
    from .lab_work import compared  # here, so that the library's own tests do without the lab

    return compared(tmp_path_factory.mktemp("comparison"))


@pytest.fixture(scope="session")
def image_comparison(tmp_path_factory):
    """A finished `aftermax compare --task vision`: its folder, what it printed."""
    from .lab_work import compared_images

    return compared_images(tmp_path_factory.mktemp("image_comparison"))


@pytest.fixture(scope="session")
def outlier_comparison(tmp_path_factory):
    """A finished `aftermax compare --task outliers`: its folder, what it printed."""
    from .lab_work import compared_outliers

    return compared_outliers(tmp_path_factory.mktemp("outlier_comparison"))


@pytest.fixture(scope="session")
def hashhop_comparison(tmp_path_factory):
    """A finished `aftermax compare --task hashhop`: its folder, what it printed."""
    from .lab_work import compared_hashhop

    return compared_hashhop(tmp_path_factory.mktemp("hashhop_comparison"))


@pytest.fixture(scope="session")
def rates_comparison(tmp_path_factory):
    """A finished `aftermax compare --task rates`: its folder, what it printed."""
    from .lab_work import compared_rates

    return compared_rates(tmp_path_factory.mktemp("rates_comparison"))


@pytest.fixture(scope="session", params=["labels", "words"])
def output_comparison(request, tmp_path_factory):
    """The same of a task whose systems are output layers."""
    from .lab_work import compared_labels, compared_words

    compared = {"labels": compared_labels, "words": compared_words}[request.param]
    return compared(tmp_path_factory.mktemp(f"{request.param}_comparison"))
