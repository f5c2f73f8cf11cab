"""Is every layer of a model really ours? Counted on a small batch, not believed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aftermax.dense import Dense
from aftermax.hf.composite import COMPOSITE
from aftermax.hf.door import LEARNED, PREFIX, SAVED, Seen, watched
from aftermax.hf.recurrent import RecurrentLayer, is_carried, recurrent_refusal

TOKENS = 8
"""Of the small batch."""


@dataclass(frozen=True)
class Layer:
    """One attention module of a model."""

    name: str
    kind: str
    """Its class."""
    system: str | None
    """What runs there; None where it is not of this library."""
    cache: str
    """What decoding keeps of it."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `check` found. `print(report)` is a table; `ok` is the verdict."""

    model: str
    implementation: str
    layers: tuple[Layer, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def raise_for_problems(self) -> None:
        """Raise ValueError that lists them, if there are any."""
        if self.problems:
            raise ValueError(f"{self.model}: {'; '.join(self.problems)}")

    def __str__(self) -> str:
        ours = sum(layer.system is not None for layer in self.layers)
        lines = [
            f"{self.model} with {self.implementation!r}: "
            f"{ours} of {len(self.layers)} attention modules are aftermax's"
        ]
        width = max((len(layer.name) for layer in self.layers), default=0)
        for layer in self.layers:
            lines.append(f"  {layer.name:{width}}  {layer.system or layer.kind}  [{layer.cache}]")
        notes = dict.fromkeys(note for layer in self.layers for note in layer.notes)
        lines += [f"note: {note}" for note in notes]
        lines += [f"problem: {problem}" for problem in self.problems]
        return "\n".join(lines)


def check(model: PreTrainedModel, inputs: dict[str, Any] | None = None) -> Report:
    """Run a model once on a small batch, and say of each attention module what ran there.

    A model class that is not built on transformers' attention interface accepts an
    `attn_implementation` and never calls it: this is the way to know.

    Args:
        inputs: keyword arguments of the model's forward; by default a few tokens, patches or
            features of the size that its config says.

    Returns:
        A `Report`: modules that are not ours, a model that raises, and a causal model whose
        earlier outputs hang on later tokens, are problems.

    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> from aftermax.hf import register
    >>> names = register()
    >>> config = LlamaConfig(
    ...     vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2,
    ... )
    >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="aftermax-lssar")
    >>> print(check(model))
    LlamaForCausalLM with 'aftermax-lssar': 2 of 2 attention modules are aftermax's
      model.layers.0.self_attn  LSSAR(power=15)  [all keys and values]
      model.layers.1.self_attn  LSSAR(power=15)  [all keys and values]
    """
    implementation = str(getattr(model.config, "_attn_implementation", None))
    try:
        seen, ran = look(model, inputs)
    except Exception as error:  # whatever a model meets is what is to be told
        problem = f"it does not run: {type(error).__name__}: {error}"
        return Report(type(model).__name__, implementation, (), (problem,))
    some = any(is_carried(module) for module in ran.values())
    states = state_bytes(model, inputs) if some else {}
    layers = tuple(_layer(model, name, module, seen, states) for name, module in ran.items())
    return Report(
        type(model).__name__, implementation, layers, tuple(_problems(model, inputs, layers, seen))
    )


def look(
    model: PreTrainedModel, inputs: dict[str, Any] | None = None
) -> tuple[dict[str, Seen], dict[str, nn.Module]]:
    """Run the small batch: the modules that came through the door, and all attention that ran."""
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    attentions = {n: x for n, x in modules.items() if "Attention" in type(x).__name__}
    ran: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, module in attentions.items()
    ]
    try:
        with watched() as through:
            _run(model, small_batch(model) if inputs is None else inputs)
    finally:
        for hook in hooks:
            hook.remove()
    seen = {names[key]: found for key, found in through.items() if key in names}
    ran |= set(seen)
    innermost = [n for n in ran if n in seen or not any(m.startswith(f"{n}.") for m in ran)]
    inner = [n for n in innermost if n in seen or not any(n.startswith(f"{m}.") for m in seen)]
    return seen, {name: module for name, module in modules.items() if name in inner}


def state_bytes(model: PreTrainedModel, inputs: dict[str, Any] | None = None) -> dict[Any, int]:
    """Of one sequence, after the small batch: of the layers that kept a state, by their number."""
    batch = small_batch(model) if inputs is None else inputs
    layers = _run(model, batch | {"use_cache": True}).past_key_values.layers
    states = {i: layer for i, layer in enumerate(layers) if isinstance(layer, RecurrentLayer)}
    return {i: layer.bytes // layer.batch for i, layer in states.items() if layer.state is not None}


def small_batch(model: PreTrainedModel) -> dict[str, Any]:
    """Keyword arguments of a forward pass, of the kind that this model takes.

    Raises:
        ValueError: for a model whose input is none of tokens, pixels and features.
    """
    config, device = model.config, model.device
    text = getattr(config, "get_text_config", lambda: config)()
    tokens = torch.arange(1, TOKENS + 1, device=device)[None] % getattr(text, "vocab_size", 10)
    batch: dict[str, Any] = {}
    if model.main_input_name == "input_ids":
        batch["input_ids"] = tokens
    elif model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", 3)
        batch["pixel_values"] = torch.zeros(1, channels, height, width, device=device)
    elif model.main_input_name == "input_features":
        frames = 2 * config.max_source_positions  # a convolution halves them
        batch["input_features"] = torch.zeros(1, config.num_mel_bins, frames, device=device)
    else:
        raise ValueError(
            f"no small batch is known for {type(model).__name__}, which takes "
            f"{model.main_input_name}: give inputs="
        )
    for name, x in batch.items():
        if x.is_floating_point():
            batch[name] = x.to(model.dtype)
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = tokens
    return batch


@torch.no_grad()
def _run(model: nn.Module, inputs: dict[str, Any]) -> Any:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled graph cannot be watched
            return model(**inputs)
    finally:
        for module in training:  # and no other: some may have been frozen
            module.training = True


def _layer(
    model: PreTrainedModel,
    name: str,
    module: nn.Module,
    seen: dict[str, Seen],
    states: dict[Any, int],
) -> Layer:
    kind = type(module).__name__
    found = seen.get(name)
    if found is None:
        return Layer(name, kind, None, "its own")
    system, notes = found.system, []
    learns = system.learned(found.heads, found.key_dim, found.value_dim)
    if learns and not hasattr(module, LEARNED) and not found.sinks:
        notes.append(
            f"{_told(system)} learns {', '.join(learns)}, which stay at their initial values here: "
            "aftermax.hf.convert(model, ...) makes them parameters"
        )
    if is_carried(module):
        size = states.get(module.layer_idx)
        cache = "all keys and values" if size is None else f"a state of {size:,} bytes"
        return Layer(name, kind, _told(system), cache, tuple(notes))
    if hasattr(module, COMPOSITE):
        both: Any = system
        groups: Any = module.num_key_value_groups
        kept = len(both.groups(found.heads // groups)[0])
        cache = f"keys and values of {kept} groups, the state of the others"
        return Layer(name, kind, _told(system), cache, tuple(notes))
    if getattr(system, "fixed_size", False):
        refused = recurrent_refusal(model, module, system)
        notes.append(
            f"{_told(system)} needs a state of one size alone, but the model keeps all keys and "
            "values: "
            + (f"{refused}" if refused else "aftermax.hf.make_recurrent(model) keeps the state")
        )
    return Layer(name, kind, _told(system), "all keys and values", tuple(notes))


def _told(system) -> str:
    return str(system.weights if isinstance(system, Dense) else system)


def _problems(
    model: PreTrainedModel, inputs: dict | None, layers: tuple[Layer, ...], seen: dict[str, Seen]
) -> list[str]:
    problems = []
    foreign = [layer for layer in layers if layer.system is None]
    if foreign:
        problems.append(
            f"{len(foreign)} of {len(layers)} attention modules are not aftermax's "
            f"({', '.join(sorted({layer.kind for layer in foreign}))}): this class, or this "
            "version of it, is not built on transformers' attention interface"
        )
    if not layers:
        problems.append("no attention module ran")
    implementation = str(getattr(model.config, "_attn_implementation", None))
    if not implementation.startswith(PREFIX) and any(layer.system for layer in layers):
        problems.append(f"the model's own implementation is {implementation!r}")
    steps = getattr(model.config, SAVED, None) or []
    converted = [step["attention"] for step in steps if step["layers"] is None][-1:]
    if converted and implementation.startswith(PREFIX) and implementation != PREFIX + converted[0]:
        problems.append(
            f"hf.convert made it {converted[0]!r}, which is what is saved and what hf.load brings "
            f"back, and since then it was set to {implementation!r}: convert it to that"
        )
    causal = all(getattr(found.module, "is_causal", True) for found in seen.values())
    numbers = model.device.type != "meta"
    if inputs is None and numbers and not foreign and _writes(model, causal):
        batch, name = _to_be_continued(model)
        problems += _looks_ahead(model, batch, name) + _forgets(model, batch, name)
    return problems


def _writes(model: PreTrainedModel, causal: bool) -> bool:
    """Whether it gives logits of next tokens. An encoder's class may have a head for it too."""
    if not getattr(model, "can_generate", lambda: False)():
        return False
    return getattr(model.config, "is_encoder_decoder", False) or (
        causal and model.main_input_name == "input_ids"
    )


def _to_be_continued(model: PreTrainedModel) -> tuple[dict[str, Any], str]:
    """The small batch, and the argument in it that holds the tokens so far."""
    batch = small_batch(model)
    if not getattr(model.config, "is_encoder_decoder", False):
        return batch, "input_ids"
    name, given = "decoder_input_ids", model.main_input_name
    encoded = _run(model.get_encoder(), {given: batch[given]})  # once, it may be long
    return {"encoder_outputs": encoded, name: batch[name]}, name


def _looks_ahead(model: PreTrainedModel, batch: dict[str, Any], name: str) -> list[str]:
    """Whether the first logits of a causal model change with what comes after."""
    half, tokens = TOKENS // 2, batch[name]
    changed = torch.cat([tokens[:, :half], tokens[:, :half].flip(-1)], -1)
    one, other = (_run(model, batch | {name: x}).logits[:, :half] for x in (tokens, changed))
    # of one shape, they are rounded alike
    if _same(one, other, 1e-3 if one.dtype == torch.float32 else 1e-2):
        return []
    return ["a later token changes earlier outputs: the causal mask is lost"]


def _forgets(model: PreTrainedModel, batch: dict[str, Any], name: str) -> list[str]:
    """Whether the next token, after a cache, is another than in a full pass."""
    tokens = batch[name]
    whole = _run(model, batch).logits[:, -1:]
    before = _run(model, batch | {name: tokens[:, :-1], "use_cache": True}).past_key_values
    inner = next(x for x in model.modules() if isinstance(x, PreTrainedModel))  # of what wraps it
    takes = inspect.signature(inner.forward).parameters
    cache = "cache" if "cache" in takes else "past_key_values"  # before transformers 5.24
    try:
        last = _run(model, batch | {name: tokens[:, -1:], cache: before}).logits
    except ValueError as error:
        return [f"it does not decode from a cache: {error}"]
    if _same(whole, last, 1e-3 if whole.dtype == torch.float32 else 0.1):
        return []
    return ["decoding from a cache differs from the full pass"]


def _same(one: Tensor, other: Tensor, bound: float) -> bool:
    difference = (one.float() - other.float()).abs().max()
    return bool(difference <= bound * one.float().abs().max())
