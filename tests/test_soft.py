"""SOFT: what is special about it. The facts of its papers, as far as they hold."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from aftermax import SOFT, SOFTAttention, Visible, find
from aftermax.lowrank import soft_attention
from aftermax.scores import gaussian

from .cases import EXACT, F64, Case, gradients, plain_views
from .naive import soft as naive
from .soft_cases import kernel_of, normal, relative


def case_of(tokens: int, kv_heads: int = 4, seed: int = 0) -> Case:
    return Case(
        normal(2, 4, tokens, 8, seed=seed),
        normal(2, kv_heads, tokens, 8, seed=seed + 1),
        normal(2, kv_heads, tokens, 5, seed=seed + 2),
        {},
    )


def attend(system: SOFT, case: Case, visible: Visible = Visible(), **options):  # noqa: B008, frozen
    return system.attend(*case[:3], visible, **options)


def matrix_of(tokens: torch.Tensor, landmarks: torch.Tensor, **options) -> torch.Tensor:
    """(T, T): what stands in place of the kernel, with Q = K."""
    one_hot = torch.eye(len(tokens), dtype=F64)
    return soft_attention(tokens, tokens, one_hot, landmarks, **options)


# the kernel, and what stands in its place


def test_the_kernel_is_symmetric_positive_and_one_on_the_diagonal_but_no_row_map():
    kernel = kernel_of(64, 8, 1.0)
    assert_close(kernel, kernel.T, rtol=0, atol=1e-15)
    assert_close(kernel.diagonal(), torch.ones(64, dtype=F64), rtol=0, atol=1e-14)
    assert kernel.min() > 0
    assert kernel.max() <= 1
    assert torch.linalg.eigvalsh(kernel).min() > 0
    assert kernel.sum(-1).min() > 1.5
    assert kernel.sum(-1).std() > 1


@pytest.mark.parametrize("normalised", [False, True])
def test_with_keys_as_queries_the_whole_is_symmetric_and_positive_semidefinite(normalised):
    x = normal(1, 1, 60, 8)
    system = SOFT(landmarks=12, normalised=normalised)
    whole = system.attend(x, x, torch.eye(60, dtype=F64)[None, None], Visible())[0, 0]
    assert_close(whole, whole.T, **EXACT)
    eigenvalues = torch.linalg.eigvalsh(whole)
    assert eigenvalues.min() > -1e-12
    assert (eigenvalues > 1e-6).sum() == 12
    assert whole.sum(-1).std() > 0.05


def test_with_all_tokens_as_landmarks_the_kernel_itself_is_left():
    x = normal(48, 8)
    kernel = gaussian(x, x, 8**-0.5)
    assert relative(matrix_of(x, x, ridge=0.0, newton=40), kernel) < 1e-12
    # a direction of eigenvalue s keeps the share s / (s + ridge)
    shrunk = kernel @ torch.linalg.solve(kernel + 0.01 * torch.eye(48, dtype=F64), kernel)
    assert relative(matrix_of(x, x, newton=40), shrunk) < 1e-12
    assert 1e-4 < relative(shrunk, kernel) < 1e-2


def test_the_error_falls_with_every_landmark_more():
    x = normal(256, 8)
    kernel, order = gaussian(x, x, 8**-0.5), torch.randperm(256)
    sizes = (8, 16, 32, 49, 64, 128, 256)
    for options, last in (({"ridge": 0.0}, 3e-3), ({}, 5e-3)):
        errors = [relative(matrix_of(x, x[order[:m]], **options), kernel) for m in sizes]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 0.5
        assert errors[-1] < last


def test_means_of_neighbours_are_good_landmarks_where_neighbours_are_alike():
    x = (normal(256, 8).cumsum(0) / 8)[None, None]
    kernel, one_hot = gaussian(x, x, 8**-0.5), torch.eye(256, dtype=F64)[None, None]
    errors = [
        relative(SOFT(landmarks=m).attend(x, x, one_hot, Visible()), kernel)
        for m in (4, 8, 16, 32, 49, 64, 128, 256)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[4] < 0.01


def test_the_normalised_form_has_the_smaller_norm_and_it_falls_with_the_landmarks():
    # 2207.03341 wants the spectral norm bounded; for SOFT it goes to that of the kernel
    x = normal(256, 8)
    order = torch.randperm(256)

    def norms(**options):
        return [
            float(torch.linalg.matrix_norm(matrix_of(x, x[order[:m]], **options), 2))
            for m in (8, 32, 128, 256)
        ]

    plain, normalised = norms(), norms(normalised=True)
    assert plain == sorted(plain)
    assert normalised == sorted(normalised, reverse=True)
    assert plain[-1] > 30
    assert normalised[-1] < 2


# landmarks


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("landmarks", [1, 4, 7, 10])
def test_fewer_landmarks_than_keys_equal_the_naive_equation(landmarks, normalised):
    system, equation = SOFT(landmarks, normalised=normalised), naive(normalised, landmarks)
    for kv_heads in (4, 2):
        case = case_of(11, kv_heads)
        for name, view in plain_views(2, 4, 11).items():
            if not view.visible.causal:
                out = attend(system, case, view.visible, enable_gqa=True)
                expected = equation(*case[:3], view.seen, distance=None, learned={})
                assert_close(out, expected, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def test_masks_of_their_own_for_heads_that_share_keys():
    case, seen = case_of(11, kv_heads=2), torch.ones(2, 4, 1, 11, dtype=torch.bool)
    seen[0, 1, 0, :6] = seen[1, 2, 0, 3:] = seen[1, 3] = False
    out = attend(SOFT(4), case, Visible(mask=seen), enable_gqa=True)
    assert torch.equal(out[1, 3], torch.zeros_like(out[1, 3]))
    for b, h in ((0, 0), (0, 1), (1, 2)):
        sees = seen[b, h, 0]
        alone = SOFT(4).attend(
            case.query[b : b + 1, h : h + 1],
            case.key[b : b + 1, h // 2 : h // 2 + 1, sees],
            case.value[b : b + 1, h // 2 : h // 2 + 1, sees],
            Visible(),
        )
        assert_close(out[b : b + 1, h : h + 1], alone, **EXACT)


def test_hidden_keys_move_no_landmark_whatever_they_hold():
    case, seen = case_of(30), torch.rand(30) < 0.6
    alone = case._replace(key=case.key[:, :, seen], value=case.value[:, :, seen])
    for flaw in (0.0, torch.nan, torch.inf):
        case.key[:, :, ~seen] = case.value[:, :, ~seen] = flaw
        hidden = attend(SOFT(6), case, Visible(mask=seen))
        assert_close(hidden, attend(SOFT(6), alone), **EXACT)


def test_a_mask_that_queries_share_is_taken_however_it_is_spelt():
    case, seen = case_of(12), torch.rand(2, 1, 1, 12) < 0.6
    expected = attend(SOFT(4), case, Visible(mask=seen))
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen.expand(2, 4, 12, 12), additive, additive.expand(2, 4, 12, 12)):
        assert torch.equal(attend(SOFT(4), case, Visible(mask=mask)), expected)
    one = seen[0, 0, 0]
    assert_close(
        attend(SOFT(4), case, Visible(mask=one)),
        attend(SOFT(4), case, Visible(mask=one[None, None, None])),
    )


def test_a_flawed_token_poisons_whole_rows_of_its_head_and_nothing_else():
    clean = case_of(20).wanting_gradients()
    for flaw in (torch.nan, torch.inf):
        flawed = clean.map(lambda x: x.detach().clone())
        flawed.key[0, 1, 7, 2] = flawed.value[1, 2, 19, 0] = flawed.query[1, 0, 3, 1] = flaw
        flawed = flawed.wanting_gradients()
        out, expected = attend(SOFT(6), flawed), attend(SOFT(6), clean)
        poisoned = torch.zeros(2, 4, 20, 1, dtype=torch.bool)
        poisoned[0, 1] = poisoned[1, 2] = poisoned[1, 0, 3] = True
        assert_close(out, expected.masked_fill(poisoned, torch.nan), equal_nan=True, **EXACT)
        sound = ~poisoned.expand_as(out)
        assert_close(gradients(out[sound], flawed), gradients(expected[sound], clean), **EXACT)


def test_landmarks_that_coincide_do_no_harm():
    # a picture with one colour: every key, hence every landmark, the same
    key = normal(1, 1, 1, 8).expand(1, 1, 60, 8)
    case = Case(normal(1, 1, 60, 8).float(), key.float(), normal(1, 1, 60, 5).float(), {})
    case = case.wanting_gradients()
    for normalised in (False, True):
        out = attend(SOFT(normalised=normalised), case)
        assert out.isfinite().all()
        for gradient in torch.autograd.grad(out.square().sum(), case.leaves):
            assert gradient.isfinite().all()
    # one landmark forty-nine times is one landmark, up to the ridge
    assert_close(attend(SOFT(), case), attend(SOFT(1, ridge=0.01 / 49), case), rtol=1e-4, atol=1e-4)


def test_the_gradients_are_the_derivatives_with_fewer_landmarks_than_keys():
    seen = torch.tensor([True, True, False, True, True, True, True])
    leaves = [normal(1, h, 7, 4, seed=h).requires_grad_() for h in (2, 1, 1)]

    def attend(*x):
        return SOFT(3, normalised=True).attend(*x, Visible(mask=seen), enable_gqa=True)

    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)


def test_the_work_grows_with_the_length_and_not_with_its_square():
    def operations(tokens: int) -> int:
        x = normal(1, 1, tokens, 8)
        with FlopCounterMode(display=False) as counter:
            SOFT(landmarks=16).attend(x, x, x, Visible())
        return counter.get_total_flops()

    one, two, four = (operations(n) for n in (256, 512, 1024))
    assert four - two == 2 * (two - one)
    assert one > 0


def test_it_compiles_and_exports_for_lengths_that_change():
    class Module(torch.nn.Module):
        def forward(self, query, key, value, mask):
            return SOFT(landmarks=6, newton=3).attend(query, key, value, Visible(mask=mask))

    def inputs(tokens: int):
        return (*case_of(tokens)[:3], torch.rand(2, 1, 1, tokens) < 0.8)

    length, module = torch.export.Dim("length", min=2, max=4096), Module()
    shapes = ({2: length}, {2: length}, {2: length}, {3: length})
    exported = torch.export.export(module, inputs(20), dynamic_shapes=shapes).module()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 6, 7, 50):
        given = inputs(tokens)
        assert_close(exported(*given), module(*given), **EXACT)
        assert_close(compiled(*given), module(*given), **EXACT)


@pytest.mark.parametrize(
    ("visible", "options", "error", "message"),
    [
        (Visible(causal=True), {}, ValueError, "SOFT is not causal: its landmarks mix all"),
        (Visible(window=3), {}, ValueError, r"a mask \(B\|1, H\|1, 1, Tk\), got window=3"),
        (Visible(mask=torch.ones(6, 6).bool()), {}, ValueError, r"a mask of shape \(6, 6\)"),
        (Visible(mask=torch.full((6,), 0.5)), {}, ValueError, "no scores that a mask could be"),
        (Visible(mask=torch.ones(5).bool()), {}, ValueError, "does not broadcast"),
        (Visible(slopes=torch.ones(4)), {}, ValueError, "no scores that ALiBi slopes"),
        (Visible(), {"dropout_p": 0.1}, ValueError, r"no dropout, got dropout_p=0\.1"),
        (Visible(), {"impl": "cpu"}, RuntimeError, "impl='cpu', but SOFT has no kernel"),
        (Visible(), {"impl": "gpu"}, ValueError, "impl='gpu' is none of 'reference', 'cpu'"),
        (Visible(), {"gate": torch.ones(1)}, TypeError, "SOFT learns no gate"),
    ],
)
def test_what_it_cannot_do_raises(visible, options, error, message):
    with pytest.raises(error, match=message):
        attend(SOFT(), case_of(6), visible, **options)


def test_shapes_that_do_not_fit_raise():
    case = case_of(6, kv_heads=2)
    with pytest.raises(ValueError, match="pass enable_gqa=True"):
        attend(SOFT(), case)
    with pytest.raises(ValueError, match="one width D"):
        attend(SOFT(), case._replace(query=case.query[..., :3]), enable_gqa=True)


def test_there_is_no_state_to_decode_with():
    x = normal(1, 1, 2, 4)
    with pytest.raises(ValueError, match="SOFT is not causal"):
        SOFT().init_state(1, 1, 4, 4)
    with pytest.raises(ValueError, match="SOFT is not causal"):
        SOFT().step(x, x, x, None, Visible())


@pytest.mark.parametrize("wrong", [{"landmarks": 0}, {"newton": 0}, {"ridge": -0.1}])
def test_constants_that_make_no_system_raise(wrong):
    with pytest.raises(ValueError, match=r"got (0|-0\.1)"):
        SOFT(**wrong)


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0)])
def test_no_queries_and_no_keys_are_no_error(queries, keys):
    out = SOFT().attend(
        normal(2, 4, queries, 8), normal(2, 4, keys, 8), normal(2, 4, keys, 5), Visible()
    )
    assert torch.equal(out, torch.zeros(2, 4, queries, 5, dtype=F64))


# the module


def module_of(seed: int = 0, **options) -> SOFTAttention:
    torch.manual_seed(seed)
    return SOFTAttention(16, 4, **{"grid": (6, 8), "dtype": F64} | options)


def heads_of(linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x).reshape(len(x), -1, 4, 4).transpose(1, 2)


@pytest.mark.parametrize("normalised", [False, True])
def test_on_a_grid_the_landmarks_are_means_of_squares(normalised):
    attend, x = module_of(ratio=2, normalised=normalised), normal(2, 48, 16)
    query, value = heads_of(attend.to_query, x), heads_of(attend.to_value, x)
    image = query.reshape(8, 6, 8, 4).permute(0, 3, 1, 2)
    landmarks = torch.nn.functional.avg_pool2d(image, 2).flatten(-2).mT.reshape(2, 4, 12, 4)
    out = soft_attention(query, query, value, landmarks, normalised=normalised)
    assert_close(attend(x), attend.to_out(out.transpose(1, 2).flatten(-2)), **EXACT)


@pytest.mark.parametrize(
    ("grid", "landmarks", "cells"),
    [
        ((56, 56), 49, (7, 7)),
        ((14, 14), 49, (7, 7)),
        ((6, 6), 49, (6, 6)),
        ((4, 16), 16, (2, 8)),
        ((2, 100), 49, (1, 49)),
        ((100, 2), 49, (49, 1)),
        ((9, 7), 1, (1, 1)),
    ],
)
def test_without_a_ratio_there_are_as_many_landmarks_as_allowed(grid, landmarks, cells):
    attend = SOFTAttention(8, 2, grid=grid, landmarks=landmarks)
    assert attend.cells == cells
    x = torch.randn(1, grid[0] * grid[1], 8)
    assert attend.pooled(attend._split(x)).shape == (1, 2, cells[0] * cells[1], 4)
    assert attend(x).isfinite().all()


def test_without_a_grid_it_is_the_system_with_keys_as_queries():
    attend, x = module_of(grid=None, landmarks=5), normal(2, 30, 16)
    query, value = heads_of(attend.to_query, x), heads_of(attend.to_value, x)
    real = torch.rand(2, 30) < 0.7
    for given, visible in (
        (None, Visible()),
        (real, Visible(mask=real[:, None, None])),
        (Visible(mask=real[:, None, None]), Visible(mask=real[:, None, None])),
    ):
        out = SOFT(5).attend(query, query, value, visible)
        expected = attend.to_out(out.transpose(1, 2).flatten(-2))
        assert_close(attend(x, given), expected, **EXACT)


def test_a_convolution_may_make_the_landmarks():
    attend, x = module_of(ratio=2, pooling="conv"), normal(2, 48, 16)
    query = heads_of(attend.to_query, x) / 4**0.25
    value = heads_of(attend.to_value, x)
    weight, landmarks = attend.landmark_conv.weight, torch.empty(2, 4, 3, 4, 4, dtype=F64)
    image = query.reshape(2, 4, 6, 8, 4)
    for i in range(3):
        for j in range(4):
            square = image[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            cell = torch.einsum("oikl,bhkli->bho", weight, square)
            cell = torch.nn.functional.layer_norm(cell, (4,))
            landmarks[:, :, i, j] = torch.nn.functional.gelu(cell)
    out = soft_attention(query, query, value, landmarks.flatten(2, 3), scale=1.0)
    assert_close(attend(x), attend.to_out(out.transpose(1, 2).flatten(-2)), **EXACT)


def test_a_convolution_of_the_values_is_added_one_kernel_for_each_head():
    plain, attend, x = module_of(ratio=2), module_of(ratio=2, value_conv=3), normal(2, 48, 16)
    attend.load_state_dict(plain.state_dict(), strict=False)
    image = heads_of(attend.to_value, x).reshape(2, 4, 6, 8, 4)
    padded = torch.nn.functional.pad(image, (0, 0, 1, 1, 1, 1))
    near = torch.zeros_like(image)
    for i in range(3):
        for j in range(3):
            weight = attend.value_conv.weight[:, 0, i, j, None, None, None]
            near = near + weight * padded[:, :, i : i + 6, j : j + 8]
    added = near.flatten(2, 3).transpose(1, 2).flatten(-2)
    assert_close(attend(x), plain(x) + added @ attend.to_out.weight.T, **EXACT)


OPTIONS = (
    {},
    {"ratio": 2, "pooling": "conv", "value_conv": 3},
    {"grid": None, "landmarks": 6, "normalised": True},
    {"head_dim": 6, "bias": True, "newton": 12, "ridge": 0.1},
)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_state_dict_carries_everything_and_all_of_it_is_trained(options):
    attend, other, x = module_of(**options), module_of(seed=1, **options), normal(2, 48, 16)
    assert not torch.allclose(attend(x), other(x))
    other.load_state_dict(attend.state_dict())
    assert torch.equal(attend(x), other(x))
    attend(x).square().sum().backward()
    for name, parameter in attend.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_there_is_no_projection_of_keys():
    names = {name for name, _ in module_of().named_parameters()}
    assert names == {"to_query.weight", "to_value.weight", "to_out.weight"}


@pytest.mark.parametrize("options", OPTIONS)
def test_the_module_compiles_and_exports(options):
    torch._dynamo.reset()
    # a few steps of the inverse are as many kinds of operation as twenty
    attend, x = module_of(**options | {"newton": 3}), normal(2, 48, 16)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), attend(x), **EXACT)
    upstream, parameters = normal(2, 48, 16, seed=1), list(attend.parameters())
    got = torch.autograd.grad(compiled(x), parameters, upstream)
    assert_close(got, torch.autograd.grad(attend(x), parameters, upstream), **EXACT)
    exported = torch.export.export(attend, (x,)).module()
    other = normal(2, 48, 16, seed=2)
    assert_close(exported(other), attend(other), **EXACT)


@pytest.mark.parametrize("options", OPTIONS[:3])
def test_the_module_takes_half_precision_and_autocast(options):
    attend, x = module_of(**options), normal(2, 48, 16)
    exact = attend(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(attend.float()(x.float()).to(F64), exact, rtol=0.1, atol=0.1)
    half = attend.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert_close(half.to(F64), exact, rtol=0.1, atol=0.1)


def test_an_image_with_a_flaw_is_lost_whole_and_its_batch_mates_are_not():
    attend, x = module_of(ratio=2), normal(3, 48, 16)
    clean = attend(x)
    for flaw in (torch.nan, torch.inf):
        x[1, 7, 3] = flaw
        out = attend(x)
        assert out[1].isnan().all()
        assert torch.equal(out[::2], clean[::2])


def test_the_catalogue_makes_the_module_of_either():
    for name, normalised in (("soft", False), ("soft-norm", True)):
        attend = find(name).image_module(16, heads=4, grid=(4, 4))
        assert attend.system == SOFT(landmarks=4, normalised=normalised)  # a quarter of 16
        assert find(name).system == SOFT(normalised=normalised)
        assert f"normalised={normalised}" in repr(attend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": None, "ratio": 2}, r"need grid=\(h, w\); got grid=None, ratio=2"),
        ({"grid": None, "value_conv": 3}, "value_conv=3"),
        ({"grid": (6,)}, r"grid must be \(h, w\) of at least 1 each, got \(6,\)"),
        ({"grid": (6, 0)}, r"got \(6, 0\)"),
        ({"ratio": 4}, r"ratio must divide both sides of the grid \(6, 8\), got 4"),
        ({"pooling": "conv"}, "pooling='conv' needs ratio"),
        ({"pooling": "max"}, "pooling must be 'average' or 'conv', got 'max'"),
        ({"value_conv": 4}, "odd kernel size, got 4"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"landmarks": 0}, "SOFT needs landmarks >= 1, got 0"),
        ({"newton": 0}, "at least 1 step, got 0"),
    ],
)
def test_a_module_that_cannot_be_raises(options, message):
    with pytest.raises(ValueError, match=message):
        module_of(**options)


def test_tokens_that_do_not_fit_the_module_raise():
    with pytest.raises(ValueError, match="width 10 is not divisible by 4 heads"):
        SOFTAttention(10, 4)
    with pytest.raises(ValueError, match=r"expected \(B, T, 16\), got \(2, 48, 8\)"):
        module_of()(normal(2, 48, 8))
    with pytest.raises(ValueError, match=r"a grid of \(6, 8\) has 48 tokens, got 47"):
        module_of()(normal(2, 47, 16))
    with pytest.raises(ValueError, match="pooled from all tokens: visible must be None"):
        module_of()(normal(2, 48, 16), torch.ones(2, 48, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"bool of shape \(B, T\) = \(2, 48\), got torch.bool"):
        module_of(grid=None)(normal(2, 48, 16), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="SOFT is not causal"):
        module_of(grid=None)(normal(2, 48, 16), Visible(causal=True))
