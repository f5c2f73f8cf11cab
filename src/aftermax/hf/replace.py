"""RecurFormer in Hugging Face models: KV groups replaced in place, taught, saved and loaded.

For models whose attention has `q_proj`, `k_proj`, `v_proj` and `o_proj` of its own: Llama, Qwen2,
Qwen3, SmolLM2, Mistral and the like.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from aftermax.hf.composite import COMPOSITE, MambaLayer, cache_in, give_composite, place_of
from aftermax.hf.convert import _class_of, convert
from aftermax.hf.distil import _float32
from aftermax.hf.door import OWN
from aftermax.hf.recurrent import recurrent_refusal, seen_tokens
from aftermax.hybrid.mamba import MambaHeads
from aftermax.hybrid.recency import Plan
from aftermax.hybrid.recurformer import RecurFormer, heads_of, in_order, rows_of_heads
from aftermax.hybrid.replace import With, check_plan, check_with, missed, stepping, values_of
from aftermax.hybrid.window import SinkWindow
from aftermax.linear import Linear
from aftermax.modules import evaluating
from aftermax.weights import Softmax

REPLACED = "aftermax_replaced"
"""The field of a model's config that says what `replace_heads` did."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def replace_heads(
    model: PreTrainedModel,
    plan: Plan,
    with_: With = "mamba",
    *,
    sinks: int = 4,
    window: int = 64,
    **sizes: int,
) -> PreTrainedModel:
    """Replace KV groups of a loaded model, in place. What stays runs our softmax.

    Args:
        plan: which groups of which layer: `aftermax.hybrid.plan_of(measure_recency(...).mean, ...)`
            with `kv_heads=model.config.num_key_value_heads`.
        with_: "mamba", a block on the layer's input, which starts from the value projections that
            it replaces and wants `distil_heads` and training; "window", the last tokens and the
            first ones, untrained; "linear", linear attention on the same queries and keys.
        sinks, window: of "window".
        sizes: of "mamba": expand, state, conv, rank (see `aftermax.hybrid.MambaHeads`).

    Returns:
        The model. `generate` keeps a composite cache: keys and values of the groups that stay, and
        the state of the others. It is saved as any; `aftermax.hf.load` brings it back.

    Raises:
        ValueError: for a plan of another model, for attention that is built otherwise, and for a
            model whose heads were replaced already.

    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> config = LlamaConfig(
    ...     vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    ... )
    >>> model = replace_heads(AutoModelForCausalLM.from_config(config), Plan(((0,), (0, 1)), 2))
    >>> model.generate(torch.arange(5)[None], max_new_tokens=3, pad_token_id=0).shape
    torch.Size([1, 8])
    """
    check_with(with_, sizes)
    if any(isinstance(m, WithMamba) or hasattr(m, COMPOSITE) for m in model.modules()):
        raise ValueError(f"heads of this {type(model).__name__} were replaced already")
    found = _attentions(model)
    check_plan(plan, [_kv_heads(module) for _, module in found])
    chosen = [(n, m, groups) for (n, m), groups in zip(found, plan.replaced, strict=True) if groups]
    for name, module, _ in chosen:
        refused = recurrent_refusal(model, module)
        if refused is not None:
            raise ValueError(f"{name}: {refused}")
    convert(model, "softmax")
    for name, module, groups in chosen:
        if with_ == "mamba":
            model.set_submodule(name, WithMamba(module, groups, **sizes).train(model.training))
        else:
            other = SinkWindow(sinks, window) if with_ == "window" else Linear()
            setattr(module, OWN, RecurFormer(Softmax(), other, replaced=tuple(groups)))
            handle = module.register_forward_pre_hook(give_composite, with_kwargs=True)
            setattr(module, COMPOSITE, handle)
    said = {"plan": asdict(plan), "with_": with_, "sinks": sinks, "window": window, **sizes}
    setattr(model.config, REPLACED, said)
    return model


class WithMamba(nn.Module):  # no "Attention": `check` looks for those that it should find ours in
    """An attention module of transformers with a Mamba block in place of some of its KV groups.

    The module itself runs the groups that stay, with the rows of its projections that are theirs;
    all heads meet in their old order before the output projection.
    """

    def __init__(self, attention: nn.Module, groups: Sequence[int], **sizes: int):
        super().__init__()
        kept_groups = tuple(g for g in range(_kv_heads(attention)) if g not in groups)
        width: Any = attention.head_dim
        size: Any = attention.num_key_value_groups
        kept, replaced = heads_of(kept_groups, size), heads_of(tuple(groups), size)
        to_value: nn.Linear = attention.v_proj  # type: ignore[assignment]
        number: Any = attention.layer_idx
        self.layer_idx, self.head_dim = number, width
        self.is_causal = True
        self.order, self.kept, self.replaced = (*kept, *replaced), kept, replaced
        weight = to_value.weight
        factory: Any = {"device": weight.device, "dtype": weight.dtype}
        self.mamba = MambaHeads(weight.shape[1], len(replaced), width, **sizes, **factory)
        if self.mamba.expand == 1:
            self.mamba.start_from_values(values_of(weight, groups, size)(width))
        self.o_proj: Any = attention.o_proj
        self.attention = None
        if kept:
            config = getattr(attention, "config", None)  # the model's own: it says what runs
            inner = copy.deepcopy(attention, {id(config): config})
            for name, heads in (("q_proj", kept), ("k_proj", kept_groups), ("v_proj", kept_groups)):
                setattr(inner, name, rows_of_heads(getattr(attention, name), heads, width))
            inner.o_proj = nn.Identity()
            self.attention = inner

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any):
        """As the module that it stands for."""
        mask, cache = kwargs.get("attention_mask"), cache_in(kwargs)
        tokens = hidden_states.shape[1]
        seen = seen_tokens(mask, tokens)
        layer = None if cache is None else place_of(cache, self.layer_idx, MambaLayer)
        state = None if layer is None else layer.block
        state = self.mamba.init_state(len(hidden_states)) if state is None else state
        outs, weights = [], None
        if self.attention is not None:
            out, weights = self.attention(hidden_states, *args, **kwargs)[:2]
            outs.append(out.unflatten(-1, (-1, self.head_dim)).transpose(1, 2))
        out, state = self.mamba.step(hidden_states, state, seen)
        if layer is not None:
            layer.block = state
        heads = in_order(torch.cat([*outs, out], 1), self.order)
        return self.o_proj(heads.transpose(1, 2).flatten(-2)), weights


def _attentions(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The attention modules by name, in the order of their layers."""
    found = [
        (name, m)
        for name, m in model.named_modules()
        if all(isinstance(getattr(m, p, None), nn.Linear) for p in PROJECTIONS)
        and hasattr(m, "num_key_value_groups")
        and hasattr(m, "layer_idx")
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention with {', '.join(PROJECTIONS)}, whose rows "
            "could be dropped by head"
        )
    return sorted(found, key=lambda pair: pair[1].layer_idx)  # type: ignore[arg-type, return-value]


def _kv_heads(module: nn.Module) -> int:
    return module.k_proj.out_features // module.head_dim  # type: ignore[union-attr, operator]


def load_replaced(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A model from disk whose heads `replace_heads` had replaced; `aftermax.hf.load` calls it.

    Args:
        folder: where it was saved, on this machine.
        kwargs: dtype; as the weights are by default.
    """
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder)
    said = dict(getattr(config, REPLACED, None) or {})
    if not said or set(kwargs) - {"dtype"}:
        what = "has no replaced heads" if not said else f"is loaded without {', '.join(kwargs)}"
        raise ValueError(f"{folder} {what}")
    setattr(config, REPLACED, None)
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    dtype = kwargs.get("dtype") or next(iter(state.values())).dtype
    # not by `to`: the frequencies of RoPE stay in float32, as they were when the model was saved
    model = _class_of(config)._from_config(config, dtype=dtype)
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    plan = said.pop("plan")
    plan = Plan(tuple(tuple(groups) for groups in plan["replaced"]), plan["kv_heads"])
    replace_heads(model, plan, said.pop("with_"), **said)
    found = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or model._tied_weights_keys or ())
    if found.unexpected_keys or set(found.missing_keys) - tied:
        names = ", ".join([*found.unexpected_keys, *found.missing_keys])
        raise ValueError(f"the weights in {folder} are not of this model: {names}")
    model.tie_weights()
    return model.eval()


# ---- distillation ------------------------------------------------------------------------------


def distil_heads(
    model: PreTrainedModel,
    original: PreTrainedModel,
    batches: Sequence[Tensor],
    *,
    learning_rate: float = 3e-3,
    warmup: float = 0.1,
    progress: Callable[[int, float], None] | None = None,
) -> list[dict[str, float]]:
    """Teach the replaced heads what the heads that were there gave, layer by layer, as
    `aftermax.hybrid.replace.distil_heads` does.

    Args:
        model: after `replace_heads`, in float32.
        original: a copy of it from before.
        batches: input ids (B, T); a step is made of each.

    The others, and what is returned, are those of the function above.

    Raises:
        ValueError: where no heads were replaced.
    """
    pupils: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, WithMamba) or isinstance(getattr(module, OWN, None), RecurFormer):
            pupils[name] = module
    if not pupils:
        raise ValueError(f"{type(model).__name__} has no replaced heads: replace_heads comes first")
    teachers = {name: original.get_submodule(name) for name in pupils}
    parameters = [p for pupil in pupils.values() for p in _taught(pupil)]
    errors: list[dict[str, float]] = []
    found: dict[str, float] = {}

    def follow(name: str):
        pupil, teacher = pupils[name], teachers[name]
        heads, width = _replaced_heads(pupil), int(teacher.head_dim)  # type: ignore[arg-type]
        seen_heads: list[Tensor] = []

        def look(_: nn.Module, inputs: tuple) -> None:
            seen_heads.append(inputs[0])

        def hook(_: nn.Module, inputs: tuple, options: dict[str, Any], __: Any) -> None:
            old = seen_heads.pop().unflatten(-1, (-1, width))[:, :, heads]
            with torch.enable_grad():
                new = _heads_of(pupil, _float32(inputs), _float32(options), width)
                error = missed(new[:, :, heads] if new.shape[2] != len(heads) else new, old)
                error.backward()
            found[name] = float(error.detach())

        return (
            teacher.o_proj.register_forward_pre_hook(look),  # type: ignore[union-attr]
            teacher.register_forward_hook(hook, with_kwargs=True),
        )

    hooks = [hook for name in pupils for hook in follow(name)]
    try:
        for number, step in stepping(parameters, len(batches), learning_rate, warmup):
            with torch.no_grad(), evaluating(original):
                original(input_ids=batches[number], use_cache=False)
            step()
            errors.append(dict(found))
            if progress is not None:
                progress(len(errors), sum(found.values()) / len(found))
    finally:
        for hook in hooks:
            hook.remove()
    return errors


def _taught(pupil: nn.Module) -> list[nn.Parameter]:
    if isinstance(pupil, WithMamba):
        return list(pupil.mamba.parameters())
    return [p for name in PROJECTIONS[:3] for p in getattr(pupil, name).parameters()]


def _replaced_heads(pupil: nn.Module) -> list[int]:
    if isinstance(pupil, WithMamba):
        return list(pupil.replaced)
    groups = getattr(pupil, OWN).groups(_kv_heads(pupil))[1]
    return list(heads_of(groups, pupil.num_key_value_groups))  # type: ignore[arg-type]


def _heads_of(pupil: nn.Module, inputs: tuple, options: dict, width: int) -> Tensor:
    """(B, T, heads, D): the replaced heads of a block, or all heads of a module."""
    if isinstance(pupil, WithMamba):
        x = inputs[0] if inputs else options["hidden_states"]
        seen = seen_tokens(options.get("attention_mask"), x.shape[1])
        return pupil.mamba(x, seen).transpose(1, 2)
    seen_heads: list[Tensor] = []
    handle = pupil.o_proj.register_forward_pre_hook(  # type: ignore[union-attr]
        lambda _, given: seen_heads.append(given[0])
    )
    try:
        pupil(*inputs, **options)
    finally:
        handle.remove()
    return seen_heads[0].unflatten(-1, (-1, width))
