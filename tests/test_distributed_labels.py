"""Labels over two processes: the gradients add up to those of one."""

import os
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.testing import assert_close

from aftermax import cached_backward, decoupled_softmax_loss, in_batch_masks, soft_topk_loss
from aftermax.losses import sharded

from .native import F32, F64, INF, NAN

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

RANKS = 2
BATCHES, SHARDS = [(5, 2), (0, 3)], [(4, 9), (11, 0), (3, 3)]
"""Rows and labels of the two ranks."""


def towers(dtype):
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).to(dtype) for _ in "ql"]


def work(batch, shard, dtype):
    """What one process would see whole."""
    random = torch.Generator().manual_seed(1)
    queries = torch.randn(sum(batch), 6, generator=random, dtype=F64).to(dtype)
    labels = torch.randn(sum(shard), 6, generator=random, dtype=F64).to(dtype)
    positives = torch.rand(sum(batch), sum(shard), generator=random) < 0.3
    positives[:, -1] = True  # the last of a shard
    positives[-1] = False
    visible = torch.rand(sum(batch), sum(shard), generator=random) < 0.8
    return queries, labels, positives, visible


def part(x, sizes, rank, dim=0):
    return x.split(sizes, dim)[rank]


def gradients(modules):
    return torch.cat([p.grad.flatten() for m in modules for p in m.parameters()])


def summed(modules):
    """Over the ranks, as DistributedDataParallel does before it divides."""
    for p in (p for m in modules for p in m.parameters()):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(p.grad)
    return gradients(modules)


def one_process(loss, batch, shard, dtype, **options):
    f, g = towers(dtype)
    queries, labels, positives, visible = work(batch, shard, dtype)
    value = loss(4 * f(queries) @ g(labels).T, positives, visible=visible, **options)
    value.backward()
    return value.detach(), gradients((f, g))


# what runs on each rank


def gathered(rank, dtype):
    """Each rank has its rows against the labels of all."""
    for batch, shard in zip(BATCHES, SHARDS, strict=False):
        f, g = towers(dtype)
        queries, labels, positives, visible = work(batch, shard, dtype)
        pool = sharded.gather_embeddings(g(part(labels, shard, rank)))
        mine = part(positives, batch, rank), part(visible, batch, rank)
        scores = 4 * f(part(queries, batch, rank)) @ pool.T
        rows = decoupled_softmax_loss(scores, mine[0], visible=mine[1], reduction="none")
        loss = sharded.global_mean(rows, (mine[0] & mine[1]).any(1))
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        check((total, summed((f, g))), one_process(decoupled_softmax_loss, batch, shard, dtype))


def by_shards(rank, dtype):
    """Each rank has all rows against its labels."""
    for batch in BATCHES:
        for shard in SHARDS:
            f, g = towers(dtype)
            queries, labels, positives, visible = work(batch, shard, dtype)
            everyone = sharded.gather_embeddings(f(part(queries, batch, rank)))
            scores = 4 * everyone @ g(part(labels, shard, rank)).T
            mine = part(positives, shard, rank, 1), part(visible, shard, rank, 1)
            for sum_or_mean in ("mean", "sum"):
                for module in (f, g):
                    module.zero_grad()
                loss = sharded.sharded_decoupled_softmax_loss(
                    scores, mine[0], visible=mine[1], reduction=sum_or_mean
                )
                loss.backward(retain_graph=True)
                total = loss.detach().clone()
                dist.all_reduce(total)
                exact = one_process(
                    decoupled_softmax_loss, batch, shard, dtype, reduction=sum_or_mean
                )
                check((total, summed((f, g))), exact)


def soft_topk_by_shards(rank, dtype):
    batch = BATCHES[0]
    for shard in SHARDS[:2]:
        for k in (1, 10.5, 40, "positives"):
            for scale in (1, 300):
                queries, labels, positives, visible = work(batch, shard, dtype)
                whole = (scale * queries @ labels.T).requires_grad_()
                right = soft_topk_loss(whole, positives, k=k, visible=visible)
                right.backward()
                mine = part(whole.detach(), shard, rank, 1).clone().requires_grad_()
                loss = sharded.sharded_soft_topk_loss(
                    mine,
                    part(positives, shard, rank, 1),
                    k=k,
                    visible=part(visible, shard, rank, 1),
                )
                loss.backward()
                total = loss.detach().clone()
                dist.all_reduce(total)
                bound = {"rtol": 1e-11 if dtype == F64 else 2e-5, "atol": 1e-12}
                assert_close(total, right.detach(), **bound)
                bound["atol"] = 1e-11 if dtype == F64 else 2e-6
                assert_close(mine.grad, part(whole.grad, shard, rank, 1), **bound)
    with pytest.raises(ValueError, match="up to 256"):
        sharded.sharded_soft_topk_loss(mine, part(positives, shard, rank, 1), k=257)


def by_shards_and_cached(rank, dtype):
    """The authors' all-negatives step: shards of labels, encoded in chunks, their gradient kept."""
    batch, shard = BATCHES[0], SHARDS[0]
    f, g = towers(dtype)
    queries, labels, positives, visible = work(batch, shard, dtype)
    mine = part(positives, shard, rank, 1), part(visible, shard, rank, 1)

    def loss(own, labels):
        scores = 4 * sharded.gather_embeddings(own) @ labels.T
        return sharded.sharded_decoupled_softmax_loss(scores, mine[0], visible=mine[1])

    value = cached_backward(
        loss, f(part(queries, batch, rank)), (g, part(labels, shard, rank).split(2))
    )
    dist.all_reduce(value)
    check((value, summed((f, g))), one_process(decoupled_softmax_loss, batch, shard, dtype))


def under_ddp(rank, dtype):
    """DistributedDataParallel divides by the ranks, so the loss is multiplied."""
    batch, shard = BATCHES[0], SHARDS[0]
    queries, labels, positives, visible = work(batch, shard, dtype)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g = towers(dtype)

        def forward(self, queries, labels):
            return self.f(queries), self.g(labels)

    both = nn.parallel.DistributedDataParallel(Both())
    own, pool = both(part(queries, batch, rank), part(labels, shard, rank))
    scores = 4 * own @ sharded.gather_embeddings(pool).T
    mine = part(positives, batch, rank), part(visible, batch, rank)
    rows = decoupled_softmax_loss(scores, mine[0], visible=mine[1], reduction="none")
    loss = sharded.global_mean(rows, (mine[0] & mine[1]).any(1))
    (dist.get_world_size() * loss).backward()
    got = gradients((both.module.f, both.module.g))
    check(got, one_process(decoupled_softmax_loss, batch, shard, dtype)[1])


def in_batch(rank, dtype):
    """Each rank brings its queries with one label each, some of them the same."""
    f, g = towers(dtype)
    random = torch.Generator().manual_seed(3)
    queries, texts = torch.randn(2, 5, 6, generator=random, dtype=F64).to(dtype).unbind()
    true = torch.tensor([[7, 2], [7, -1], [3, -1], [2, -1], [7, 3]])
    texts = texts[[0, 0, 1, 2, 0]]  # as texts of the labels 7, 7, 3, 2, 7
    rows = (3, 2)
    ids = part(true, rows, rank)
    ids = ids if rank == 0 else ids[:, : 1 + bool((ids[:, 1:] >= 0).any())]
    everyone = sharded.gather_ids(ids)
    assert everyone.tolist() == true.tolist()
    positives, visible = in_batch_masks(everyone[:, 0], part(true, rows, rank))
    pool = sharded.gather_embeddings(g(part(texts, rows, rank)))
    scores = f(part(queries, rows, rank)) @ pool.T
    each = decoupled_softmax_loss(scores, positives, visible=visible, reduction="none")
    sharded.global_mean(each).backward()
    got = summed((f, g))
    f, g = towers(dtype)
    positives, visible = in_batch_masks(true[:, 0], true)
    decoupled_softmax_loss(f(queries) @ g(texts).T, positives, visible=visible).backward()
    check(got, gradients((f, g)))


def traps(rank, dtype):
    """Rows without positives or negatives, large and hidden scores."""
    scores = torch.tensor(
        [[1e30, 2.0, -1e30, 0.0], [3.0, 3.0, 3.0, 3.0], [NAN, 1.0, INF, -INF], [1e4, 0, 1e4, 0]],
        dtype=dtype,
    )
    positives = torch.tensor([[2, 1], [-1, -1], [1, -1], [0, 3]])
    visible = scores.isfinite()
    visible[3] = torch.tensor([True, False, False, True])  # both positive: no negative is left
    whole = scores.clone().requires_grad_()
    rows = decoupled_softmax_loss(whole, positives, visible=visible, reduction="none")
    rows.sum().backward()
    mask = torch.zeros(4, 5).bool().scatter(1, positives.where(positives >= 0, 4), True)[:, :4]
    columns = slice(0, 3) if rank == 0 else slice(3, 4)
    mine = scores[:, columns].clone().requires_grad_()
    got = sharded.sharded_decoupled_softmax_loss(
        mine, mask[:, columns], visible=visible[:, columns], reduction="none"
    )
    got.sum().backward()
    total = got.detach().clone()
    dist.all_reduce(total)
    check((total, mine.grad), (rows.detach(), whole.grad[:, columns]))


def shapes_that_differ(rank, dtype):
    with pytest.raises(ValueError, match="first dimension alone"):
        sharded.gather_embeddings(torch.zeros(2, 3 + rank, dtype=dtype))


def check(got, exact):
    dtype = (exact[1] if isinstance(exact, tuple) else exact).dtype
    bound = 1e-12 if dtype == F64 else 1e-6
    assert_close(got, exact, rtol=bound, atol=bound)


RUNS = (
    gathered,
    by_shards,
    soft_topk_by_shards,
    by_shards_and_cached,
    under_ddp,
    in_batch,
    traps,
    shapes_that_differ,
)


def run_all(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS
    )
    for run in RUNS:
        for dtype in (F64, F32):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # as in the tests themselves
                    run(rank, dtype)
                said = ""
            except Exception:
                said = traceback.format_exc()
            (folder / f"{run.__name__}-{dtype}-{rank}").write_text(said)
            dist.barrier()
    # threads of gloo that outlive the interpreter's end abort the process now and then
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank said of each run: two processes for all of them, since they start slowly."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        # a process that is spawned finds this module where its parent's path says
        patch.syspath_prepend(Path(__file__).parents[1])
        mp.spawn(run_all, (folder,), RANKS)
    return {file.name: file.read_text() for file in folder.glob("*-*-*")}


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_two_processes_are_one(results, run, dtype):
    for rank in range(RANKS):
        assert results[f"{run.__name__}-{dtype}-{rank}"] == ""
