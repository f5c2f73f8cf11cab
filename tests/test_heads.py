"""Output layers of the lab: each ranks by what it is trained on, whatever the order of classes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from aftermax.lab import heads
from aftermax.lab.heads import Adaptive, Dual, Factored, Hierarchical, OneVsAll, Sampled, Softmax
from aftermax.lab.labels_work import LabelsWork
from aftermax.losses import LogTaylorLoss, ZScoreLoss, coupled_softmax_loss

WIDTH, CLASSES = 64, 53
COUNTS = torch.randint(1, 100, (CLASSES,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def hidden(count=9, grad=False):
    return torch.randn(count, WIDTH, requires_grad=grad)


def targets(*rows):
    most = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (most - len(row))] for row in rows])


def all_heads():
    return {
        "softmax": Softmax(WIDTH, CLASSES),
        "adaptive": Adaptive(WIDTH, COUNTS),
        "hierarchical": Hierarchical(WIDTH, COUNTS, sparse=True),
        "sampled": Sampled(WIDTH, COUNTS, 16, sparse=True),
        "z-loss": Factored(WIDTH, CLASSES, ZScoreLoss()),
        "log-taylor": Factored(WIDTH, CLASSES, LogTaylorLoss()),
        "one-vs-all": OneVsAll(WIDTH, coupled_softmax_loss, torch.zeros(CLASSES)),
    }


@pytest.mark.parametrize("name", all_heads())
def test_a_ranking_follows_the_scores(name):
    head, x = all_heads()[name], hidden()
    with torch.no_grad():
        best, scores = head.ranker(7)(x), head.scores(x)
    assert_close(scores.gather(1, best), scores.topk(7).values)


@pytest.mark.parametrize("name", all_heads())
def test_a_head_learns_its_classes(name):
    """Steps on nine examples bring each class to the front, wherever it stands in frequency."""
    head, x = all_heads()[name], F.normalize(hidden(), dim=-1) * 3
    wanted = torch.randperm(CLASSES)[:9]
    optimiser = torch.optim.SGD(head.parameters(), lr=0.3) if [*head.parameters()] else None
    for _ in range(400):
        loss = head.loss(x.clone().requires_grad_(), wanted[:, None])
        loss.backward()
        if optimiser is None:
            head.layer.step(1.0)
        else:
            optimiser.step()
            optimiser.zero_grad()
    assert torch.equal(head.ranker(1)(x)[:, 0], wanted)


@pytest.mark.parametrize("name", ["adaptive", "hierarchical"])
def test_scores_of_a_tree_are_log_probabilities_and_its_loss_is_theirs(name):
    head, x = all_heads()[name], hidden(3)
    scores = head.scores(x)
    assert_close(scores.exp().sum(1), torch.ones(3))
    rows = targets([4, 50], [7], [52, 1, 0])
    means = [scores[i, [c for c in row if c >= 0]].mean() for i, row in enumerate(rows.tolist())]
    assert_close(head.loss(x, rows), -torch.stack(means).mean())


@pytest.mark.parametrize("classes", [3, 4, 5, 30])
def test_few_classes_are_ranked_too(classes):
    for head in (Adaptive(WIDTH, COUNTS[:classes]), Hierarchical(WIDTH, COUNTS[:classes], False)):
        x = hidden(2)
        assert_close(head.scores(x).exp().sum(1), torch.ones(2))
        assert head.loss(x, torch.tensor([[0], [classes - 1]])).isfinite()


def test_many_draws_give_the_loss_and_the_gradient_of_softmax():
    head, x = Sampled(WIDTH, COUNTS, 20_000, sparse=False), hidden(4, grad=True)
    rows = targets([3], [10], [51], [0])
    (got,) = torch.autograd.grad(loss := head.loss(x, rows), x)
    full = F.cross_entropy(head.scores(x), rows[:, 0])
    (want,) = torch.autograd.grad(full, x)
    assert_close(loss, full, rtol=0.03, atol=0)
    assert_close(got, want, rtol=0.1, atol=0.01)


def test_a_drawn_target_is_no_negative():
    """With the target alone to draw there is nothing to tell it from."""
    head = Sampled(WIDTH, torch.tensor([1, 1]), 64, sparse=False)
    head.cumulative.copy_(torch.tensor([1.0, 1.0]))  # class 0 is always drawn
    assert head.loss(hidden(1), torch.tensor([[0]])).item() == 0
    assert head.loss(hidden(1), torch.tensor([[1]])).item() > 0


def test_shares_are_alike_within_a_row_and_one_in_all():
    rows, classes, share = heads.pairs(targets([5, 2], [], [9]))
    assert rows.tolist() == [0, 0, 2]
    assert classes.tolist() == [5, 2, 9]
    assert share.tolist() == [0.25, 0.25, 0.5]


def test_in_a_batch_a_dual_encoder_is_told_from_its_own_labels_alone():
    vectors, rows = torch.randn(CLASSES, WIDTH), targets([4, 50], [7], [50])

    def labels(ids):
        return vectors if ids is None else vectors[ids]

    prior = torch.randn(CLASSES)
    x = hidden(3)
    got = Dual(labels, coupled_softmax_loss, prior, every=False).loss(x, rows)
    scores = (x @ vectors.T + prior)[:, [4, 7, 50]]
    assert_close(got, coupled_softmax_loss(scores, targets([0, 2], [1], [2])))
    whole = Dual(labels, coupled_softmax_loss, prior, every=True)
    assert_close(whole.loss(x, rows), coupled_softmax_loss(x @ vectors.T + prior, rows))
    assert_close(whole.ranker(3)(x), whole.scores(x).topk(3).indices)


@pytest.mark.parametrize("name", ["bce", "dual/bce"])
def test_binary_classifiers_begin_with_how_frequent_their_labels_are(name):
    head = heads.of_labels(name, LabelsWork(width=WIDTH), COUNTS, 200, lambda ids: None)
    assert_close(head.bias.sigmoid(), (COUNTS + 0.5) / 201)
    none = LabelsWork(width=WIDTH, prior=False)
    assert not heads.of_labels(name, none, COUNTS, 200, lambda ids: None).bias.any()


def test_parameters_count_what_a_factored_layer_stands_for():
    assert heads.parameters(Factored(WIDTH, CLASSES, ZScoreLoss())) == (WIDTH + 1) * CLASSES
    assert heads.parameters(Softmax(WIDTH, CLASSES)) == (WIDTH + 1) * CLASSES


def test_the_losses_have_the_names_of_the_outputs():
    assert set(all_heads()) - {"one-vs-all"} == {
        "softmax", "adaptive", "hierarchical", "sampled", "z-loss", "log-taylor",
    }  # fmt: skip
    assert math.isfinite(heads.rule("soft-topk", LabelsWork())(hidden(), torch.tensor([[1]] * 9)))
