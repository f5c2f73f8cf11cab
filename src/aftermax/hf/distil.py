"""A new attention taught by the old one, layer by layer.

Each attention module's copy, with the new system in it, learns to give what the module gives for
the same input: for the layers' inputs x of the unchanged model, it makes

    |new(x) - old(x)|^2 / |old(x)|^2

smaller, in the projections of queries, keys, values and output and in what the system learns. No
label is needed, and no gradient passes from one layer to another: a batch costs one forward pass
of the model, and a forward and backward of attention alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from aftermax.hf.convert import choose, give, otherwise, record, set_implementation
from aftermax.hf.door import OWN, Seen, implementation
from aftermax.modules import evaluating

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Distilled:
    """What each layer's copy missed of the old output, as a share of its square."""

    layers: tuple[str, ...]
    errors: tuple[tuple[float, ...], ...]
    """One for each batch, in which one for each layer."""

    def mean(self, batches: slice) -> float:
        """Of all layers, over some of the batches."""
        return float(torch.tensor(self.errors[batches]).mean())


def distil(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    attention: str,
    *,
    layers: Iterable[int] | None = None,
    learning_rate: float = 1e-3,
    warmup: float = 0.1,
    progress: Callable[[int, float], None] | None = None,
) -> Distilled:
    """Convert a model's attention and teach it what the old one gave, in place.

    Interrupted, it leaves the model as it was.

    Args:
        batches: input ids, (B, T) each; a step is made of each.
        attention, layers: as in `convert`.
        learning_rate: AdamW's highest; it rises over the first `warmup` of the batches and falls to
            0 by a cosine. Ours: the papers of these systems do not distil.
        progress: called with the number of batches done and the mean error of the last.

    Raises:
        ValueError: as `convert`, and for a model whose attention takes no input that could be
            given again.

    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> config = LlamaConfig(
    ...     vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2,
    ... )
    >>> _ = torch.manual_seed(0)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> batches = [torch.randint(97, (2, 16)) for _ in range(30)]
    >>> found = distil(model, batches, "lssa")
    >>> found.mean(slice(-3, None)) < found.mean(slice(3))
    True
    """
    name, layers = implementation(attention), None if layers is None else list(layers)
    before = str(model.config._attn_implementation)
    old = choose(model, otherwise(model), layers, {"input_ids": batches[0][:1]})
    new = {}
    for place, found in old.items():
        config = getattr(found.module, "config", None)  # the model's own: it says what runs
        pupil = copy.deepcopy(found.module, {id(config): config})
        give(pupil, found, name, own=True)
        if found.dtype in HALF:  # which has no room for small steps
            pupil.float()
        new[place] = pupil.requires_grad_().train()
    try:
        errors = _train(model, old, new, batches, learning_rate, warmup, progress)
    except BaseException:
        set_implementation(model, before)
        raise
    for place, module in new.items():
        _as_before(module, old[place])
        model.set_submodule(place, module.train(model.training))
        if layers is None:
            delattr(module, OWN)
    if layers is None:
        set_implementation(model, name)
    record(model, name, layers)
    return Distilled(tuple(old), tuple(errors))


def _as_before(module: nn.Module, found: Seen) -> None:
    """The dtypes of the old module, and what was frozen in it."""
    names = {name: p.requires_grad for name, p in found.module.named_parameters()}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(names.get(name, True))
    were = {**dict(found.module.named_parameters()), **dict(found.module.named_buffers())}
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        x.data = x.data.to(were[name].dtype if name in were else found.dtype)


def _train(
    model: PreTrainedModel,
    old: dict[str, Seen],
    new: dict[str, nn.Module],
    batches: Sequence[Tensor],
    learning_rate: float,
    warmup: float,
    progress: Callable[[int, float], None] | None,
) -> list[tuple[float, ...]]:
    parameters = [p for module in new.values() for p in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, learning_rate, total_steps=len(batches) + 1, pct_start=warmup
    )
    errors = []
    for done, tokens in enumerate(batches, 1):
        missed = _teach(model, old, new, tokens)
        for module in new.values():  # no gradient passes between them
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        errors.append(tuple(missed[place] for place in old))
        if progress is not None:
            progress(done, sum(errors[-1]) / len(old))
    return errors


def _float32(inputs: Any) -> Any:
    def wide(x: Any) -> Any:
        half = isinstance(x, Tensor) and x.dtype in HALF
        return x.float() if half else x

    return tree_map(wide, inputs)


def _teach(
    model: PreTrainedModel, old: dict[str, Seen], new: dict[str, nn.Module], tokens: Tensor
) -> dict[str, float]:
    """One forward of the model; each copy's gradient of its error, as the layer is passed."""
    missed: dict[str, float] = {}

    def follow(place: str):
        def hook(module: nn.Module, inputs: tuple, options: dict[str, Any], out: Any) -> None:
            wanted = out[0] if isinstance(out, tuple) else out
            with torch.enable_grad():
                given = new[place](*_float32(inputs), **_float32(options))
                given = given[0] if isinstance(given, tuple) else given
                wanted = wanted.float()
                error = (given - wanted).square().sum() / wanted.square().sum()
                error.backward()
            missed[place] = float(error.detach())

        return hook

    hooks = [
        found.module.register_forward_hook(follow(place), with_kwargs=True)
        for place, found in old.items()
    ]
    try:
        with torch.no_grad(), evaluating(model):
            model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return missed
