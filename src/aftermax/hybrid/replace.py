"""Heads of a trained model replaced, in place, and taught by those that were there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aftermax.dense import Dense
from aftermax.hybrid.recency import Plan
from aftermax.hybrid.recurformer import RecurFormer, RecurFormerAttention, heads_of, rows_of_heads
from aftermax.hybrid.window import SinkWindow
from aftermax.linear import Linear
from aftermax.modules import Attention

With = Literal["mamba", "window", "linear"]
REPLACEMENTS = ("mamba", "window", "linear")


def replace_heads(
    model: nn.Module,
    plan: Plan,
    with_: With = "mamba",
    *,
    sinks: int = 4,
    window: int = 64,
    linear: Any = Linear(),  # noqa: B008, a frozen value
    **sizes: int,
) -> nn.Module:
    """Replace KV groups of a model that is built on `aftermax.Attention`, in place.

    Args:
        plan: which groups of which layer, from `plan_of`; its layers are the model's attention
            modules in their order.
        with_: "mamba", a block that starts from the value projections of the heads that it
            replaces, and is otherwise untrained; "window", a sliding window with sinks, which needs
            no training; "linear", a linear system on the same queries, keys and values.
        sinks, window: of "window".
        linear: of "linear".
        sizes: of "mamba": expand, state, conv, rank (see `MambaHeads`).

    Returns:
        The model. What is kept has the weights that it had; the output projection is used again.

    Raises:
        ValueError: for a plan of another model, and for layers that are no softmax-like attention
            of their own (gated, or replaced before).

    >>> from aftermax.hybrid import plan_of
    >>> layers = nn.Sequential(Attention(16, heads=4), Attention(16, heads=4))
    >>> plan = plan_of(torch.rand(2, 4), 0.5, per_layer=True)
    >>> [type(layer).__name__ for layer in replace_heads(layers, plan)]
    ['RecurFormerAttention', 'RecurFormerAttention']
    """
    check_with(with_, sizes)
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, Attention)]
    check_plan(plan, [m.kv_heads for _, m in found])
    touched = [
        (n, m, groups) for (n, m), groups in zip(found, plan.replaced, strict=True) if groups
    ]
    for name, module, _ in touched:
        if type(module) is not Attention or not isinstance(module.system, Dense):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__} of {module.system}: heads are "
                "replaced in aftermax.Attention with a row map"
            )
    for name, module, groups in touched:
        if with_ == "mamba":
            new = with_mamba(module, groups, **sizes)
            if not name:
                raise ValueError("the model is one attention module: put it into another")
            model.set_submodule(name, new.train(module.training))
        else:
            weights = module.system.weights  # type: ignore[union-attr]
            other = SinkWindow(sinks, window, weights) if with_ == "window" else linear
            _give(module, RecurFormer(module.system, other, replaced=groups))
    return model


def check_with(with_: str, sizes: dict) -> None:
    if with_ not in REPLACEMENTS:
        raise ValueError(f"with_ must be one of {', '.join(REPLACEMENTS)}, got {with_!r}")
    if sizes and (with_ != "mamba" or set(sizes) - {"expand", "state", "conv", "rank"}):
        raise ValueError(f"{with_} has no {', '.join(sorted(sizes))}")


def check_plan(plan: Plan, kv_heads: Sequence[int]) -> None:
    """Raise ValueError for a plan that is of another model."""
    if len(plan.replaced) != len(kv_heads) or set(kv_heads) != {plan.kv_heads}:
        raise ValueError(
            f"the plan is for {len(plan.replaced)} layers of {plan.kv_heads} KV heads, and the "
            f"model has {len(kv_heads)} of {', '.join(map(str, sorted(set(kv_heads)))) or 'none'}"
        )


def with_mamba(attend: Attention, groups: Sequence[int], **sizes: int) -> RecurFormerAttention:
    """The same module with a Mamba block in the place of these groups.

    What is kept is copied; the block starts from the values of the heads that it replaces.
    """
    new = RecurFormerAttention(
        attend.to_query.in_features,
        attend.heads,
        weights=attend.system,
        replaced=groups,
        kv_heads=attend.kv_heads,
        head_dim=attend.head_dim,
        positions=attend.positions,
        qk_norm=not isinstance(attend.query_norm, nn.Identity),
        causal=attend.causal,
        window=attend.window,
        dropout=attend.dropout,
        bias=attend.to_query.bias is not None,
        scale=attend.scale,
        impl=attend.impl,
        device=attend.to_query.weight.device,
        dtype=attend.to_query.weight.dtype,
        **sizes,
    )
    for name, heads in {
        "to_query": new.kept_heads,
        "to_key": new.kept,
        "to_value": new.kept,
    }.items():
        if heads:
            setattr(new, name, rows_of_heads(getattr(attend, name), heads, attend.head_dim))
    new.to_out = copy.deepcopy(attend.to_out)
    if new.kept:
        for name in ("query_norm", "key_norm"):
            setattr(new, name, copy.deepcopy(getattr(attend, name)))
    for name, x in attend.learned.items():
        new.learned[name] = nn.Parameter(x.detach()[list(new.kept_heads)])
    if new.mamba is not None and new.mamba.expand == 1:
        values = values_of(attend.to_value.weight, groups, attend.heads // attend.kv_heads)
        new.mamba.start_from_values(values(attend.head_dim))
    return new


def values_of(weight: Tensor, groups: Sequence[int], size: int) -> Callable[[int], Tensor]:
    """W_V of these groups, once for each of their query heads."""

    def rows(width: int) -> Tensor:
        heads = weight.detach().unflatten(0, (-1, width))[list(groups)]
        return heads.repeat_interleave(size, 0).flatten(0, 1)

    return rows


def _give(module: Attention, system: RecurFormer) -> None:
    """The system, with the parameters of what the other one learns."""
    learned = system.learned(module.heads, module.head_dim, module.head_dim)
    module.system = system
    like = module.to_query.weight
    for name, start in learned.items():
        if name not in module.learned:
            module.learned[name] = nn.Parameter(start.to(like))


# ---- distillation ------------------------------------------------------------------------------


def distil_heads(
    model: nn.Module,
    original: nn.Module,
    batches: Sequence[Any],
    *,
    learning_rate: float = 3e-3,
    warmup: float = 0.1,
    progress: Callable[[int, float], None] | None = None,
) -> list[dict[str, float]]:
    """Teach the heads that were replaced what the heads that were there gave, layer by layer.

    For the layers' inputs x of the original model it makes smaller, over the replaced heads::

        |new(x) - old(x)|^2 / |old(x)|^2

    in what those heads are made of: a Mamba block, or their rows of the projections. No label is
    needed, and no gradient passes from one layer to another. Ours: whether RecurFormer's authors
    do so could not be read.

    Args:
        model: after `replace_heads`.
        original: a copy of it from before.
        batches: inputs of the models; a step is made of each.
        learning_rate: AdamW's highest; it rises over the first `warmup` of the batches and falls to
            0 by a cosine.
        progress: called with the number of batches done and the mean error of the last.

    Returns:
        The errors of each batch, by the name of the layer.

    Raises:
        ValueError: where no heads were replaced.
    """
    pupils = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Attention) and _replaced_heads(module)
    }
    if not pupils:
        raise ValueError(f"{type(model).__name__} has no replaced heads: replace_heads comes first")
    teachers = {name: original.get_submodule(name) for name in pupils}

    def teach(name: str, x: Tensor, old: Tensor) -> Tensor:
        heads = list(_replaced_heads(pupils[name]))
        return missed(heads_out(pupils[name], x)[:, heads], old[:, heads])

    parameters = [p for pupil in pupils.values() for p in pupil.parameters()]
    errors = []
    for _, step in stepping(parameters, len(batches), learning_rate, warmup):
        batch, found = batches[len(errors)], {}
        with torch.no_grad(), _shown(teachers) as shown:
            original(batch)
        for name, (x, old) in shown.items():
            error = teach(name, x, old)
            error.backward()
            found[name] = float(error.detach())
        step()
        errors.append(found)
        if progress is not None:
            progress(len(errors), sum(found.values()) / len(found))
    return errors


def heads_out(attend: Any, x: Tensor) -> Tensor:
    """The heads (B, H, T, D) of an attention module before its output projection."""
    if isinstance(attend, RecurFormerAttention):
        return attend.heads_out(x)
    query, key, value = attend.project(x, 0)
    return attend.system.attend(
        query, key, value, attend.what_is_visible(None), **attend._options()
    )


def missed(new: Tensor, old: Tensor) -> Tensor:
    """|new - old|^2 / |old|^2, in float32."""
    new, old = new.float(), old.float()
    return (new - old).square().sum() / old.square().sum()


def stepping(
    parameters: Sequence[nn.Parameter], steps: int, learning_rate: float, warmup: float
) -> Iterator[tuple[int, Callable[[], None]]]:
    """(number, what ends the step) of AdamW without decay, its rate up and down again."""
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, total_steps=steps + 1, pct_start=warmup
    )

    def end() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()

    for number in range(steps):
        yield number, end


def _replaced_heads(attend: Attention) -> tuple[int, ...]:
    if isinstance(attend, RecurFormerAttention):
        return attend.replaced_heads
    if isinstance(attend.system, RecurFormer):
        replaced = attend.system.groups(attend.kv_heads)[1]
        return heads_of(replaced, attend.heads // attend.kv_heads)
    return ()


@contextmanager
def _shown(modules: dict[str, Any]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """By name, the input and the heads of each attention module as the model runs."""
    shown: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str):
        def hook(module: Any, inputs: tuple, _: Any) -> None:
            shown[name] = inputs[0], heads_out(module, inputs[0])

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in modules.items()]
    try:
        yield shown
    finally:
        for handle in handles:
            handle.remove()


# ---- what is kept ------------------------------------------------------------------------------


def cache_bytes(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    replaced: int,
    with_: With = "mamba",
    *,
    batch: int = 1,
    element: int = 4,
    expand: int = 1,
    state: int = 16,
    conv: int = 4,
    sinks: int = 4,
    window: int = 64,
) -> int:
    """Bytes that a layer of this library holds after so many tokens, with `replaced` of its KV
    groups replaced; what is summed up is float32 whatever the `element` is.

    To the numbers that `aftermax.hybrid.recurformer` counts come marks of padding: a byte a token,
    and for the sinks their positions, 8 bytes each.

    >>> cache_bytes(1024, 32, 8, 128, 0, element=2), cache_bytes(1024, 32, 8, 128, 4, element=2)
    (4195328, 2241536)
    """
    kept = kv_heads - replaced
    total = (2 * kept * head_dim * element + 1) * tokens if kept else 0
    if replaced and with_ == "mamba":
        channels = replaced * (heads // kv_heads) * head_dim * expand
        total += channels * (state * 4 + (conv - 1) * element)
    if replaced and with_ == "window":
        recent = min(tokens, window - 1)
        total += 2 * replaced * head_dim * element * (sinks + recent) + 8 * sinks + recent
    if replaced and with_ == "linear":
        total += replaced * (head_dim * (head_dim + 1) * max(4, element) + 1) + 8
    return batch * total


def share_saved(
    tokens: int,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    share: float,
    expand: int = 1,
    state: int = 16,
    conv: int = 4,
) -> float:
    """Of the numbers in a key-value cache, what Mamba for a share of the groups saves, with a block
    that holds `conv` columns, as its authors' does::

        1 - (2 Hkv (1 - share) D n + H share D expand (N + conv)) / (2 Hkv D n)

    >>> round(share_saved(1024, heads=32, kv_heads=32, head_dim=128, share=0.9), 3)
    0.891
    """
    kept = 2 * kv_heads * (1 - share) * head_dim * tokens
    block = heads * share * head_dim * expand * (state + conv)
    return 1 - (kept + block) / (2 * kv_heads * head_dim * tokens)
