"""A system into a model that is there already; and a model from disk, with what it had."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from aftermax.hf.check import look, state_bytes
from aftermax.hf.door import (
    LEARNED,
    OWN,
    PREFIX,
    SAVED,
    Seen,
    implementation,
    on_softmax,
    system_named,
)
from aftermax.hf.recurrent import CARRIED, carry, is_carried, recurrent_refusal
from aftermax.weights import SoftmaxSink

WHERE = (
    "cache_dir",
    "force_download",
    "gguf_file",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
"""Of the arguments of `from_pretrained`, those that say what is read."""


def convert(
    model: PreTrainedModel,
    attention: str = "softmax",
    *,
    layers: Iterable[int] | None = None,
    cache: Literal["full", "recurrent"] = "full",
    inputs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Give a loaded model another attention, in place.

    Args:
        attention: a name of the catalogue, or one given to `register`.
        layers: numbers of the layers that get it (negative ones count from the end); the others
            keep what they have, or get our softmax. None = all.
        cache: what these layers keep while decoding: "full", all keys and values, or "recurrent",
            a state of one size (linear systems, SparseK, LongVQ); see `make_recurrent`.
        inputs: as in `check`, for models whose input is not known here.

    Returns:
        The model. What the system learns (a sink, a gain) is a parameter of each attention module
        (`aftermax_learned`), is trained with the rest and saved with the model; `load` finds it.

    Raises:
        ValueError: for a model class that transformers' attention interface does not reach, for
            what its attention needs and the system does not do, for layers that there are not, and
            for a state where the system, or the model, can have none.

    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> config = LlamaConfig(
    ...     vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2,
    ... )
    >>> model = convert(AutoModelForCausalLM.from_config(config), "sink", layers=[-1])
    >>> [name for name, _ in model.named_parameters() if "aftermax" in name]
    ['model.layers.1.self_attn.aftermax_learned.sink']
    """
    if cache not in ("full", "recurrent"):
        raise ValueError(f"cache must be 'full' or 'recurrent', got {cache!r}")
    name, layers = implementation(attention), None if layers is None else list(layers)
    before = str(model.config._attn_implementation)
    chosen = choose(model, name if layers is None else otherwise(model), layers, inputs)
    had = {place: _had(found.module) for place, found in chosen.items()}
    for found in chosen.values():
        give(found.module, found, name, own=layers is not None)
    try:
        look(model, inputs)  # a system may not do what this model asks of it
        if cache == "recurrent":
            make_recurrent(model, layers, inputs=inputs)
    except Exception:
        for place, found in chosen.items():
            _put_back(found.module, had[place])
        set_implementation(model, before)
        raise
    record(model, name, layers)
    return model


def make_recurrent(
    model: PreTrainedModel,
    layers: Iterable[int] | None = None,
    *,
    recurrent: bool = True,
    inputs: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Let layers that run a linear system keep its state alone, in place.

    What they run, and what they have learned, stays as it is: after `convert` or `distil`.

    Args:
        layers: numbers of the layers (negative ones count from the end). None = all.
        recurrent: False = they keep all keys and values again.
        inputs: as in `check`.

    Returns:
        The model. The layers are in its config; `load` finds them there.

    Raises:
        ValueError: for layers that cannot (see `recurrent_refusal`); none is changed then.

    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> config = LlamaConfig(
    ...     vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...     num_attention_heads=4, num_key_value_heads=2,
    ... )
    >>> model = make_recurrent(convert(AutoModelForCausalLM.from_config(config), "linear"))
    >>> cache = model(torch.arange(80)[None] % 97).past_key_values
    >>> [layer.bytes for layer in cache.layers]
    [586, 586]
    """
    seen, _ = look(model, inputs)
    if not seen:
        raise ValueError(f"{type(model).__name__} runs no attention of aftermax: convert it first")
    chosen = _of_layers(seen, None if layers is None else list(layers))
    if recurrent:
        _refuse_a_state(model, chosen)
    for found in chosen.values():
        carry(found.module, recurrent)
    if recurrent:
        _counted(model, chosen, inputs)
    _record_carried(model)
    return model


def _refuse_a_state(model: PreTrainedModel, chosen: dict[str, Seen]) -> None:
    refused: dict[str, list[str]] = {}
    for name, found in chosen.items():
        why = recurrent_refusal(model, found.module, found.system)
        if why is not None:
            refused.setdefault(why, []).append(name)
    if refused:
        told = "; ".join(f"{', '.join(names)}: {why}" for why, names in refused.items())
        raise ValueError(f"{type(model).__name__} cannot keep a state in place of keys: {told}")


def _counted(model: PreTrainedModel, chosen: dict[str, Seen], inputs: dict | None) -> None:
    """A model that has its own way with the cache would keep all keys, and say nothing."""
    kept = state_bytes(model, inputs)
    lost = [name for name, found in chosen.items() if found.module.layer_idx not in kept]
    if lost:
        for found in chosen.values():
            carry(found.module, False)
        raise ValueError(
            f"{type(model).__name__} cannot keep a state in place of keys: "
            f"{', '.join(lost)}: the model does not hand it the cache by name"
        )


def load(
    path: str | Path,
    attention: str | None = None,
    *,
    layers: Iterable[int] | None = None,
    cache: Literal["full", "recurrent"] = "full",
    **kwargs: Any,
) -> PreTrainedModel:
    """A model from disk with an attention of this library.

    transformers does not save the choice: after `from_pretrained` a model runs on SDPA again. What
    `convert` did is in the config of a model saved after it, and is done again here.

    Args:
        path: a folder, as for `from_pretrained`.
        attention, layers, cache: as in `convert`; by default what the model was saved with, else
            softmax.
        **kwargs: of `from_pretrained` (dtype, gguf_file ...).

    Raises:
        ValueError: as `convert`.
    """
    config = AutoConfig.from_pretrained(path, **{k: kwargs[k] for k in WHERE if k in kwargs})
    if getattr(config, "aftermax_replaced", None) and not attention:
        from aftermax.hf.replace import load_replaced  # which is built on this module

        return load_replaced(path, **kwargs)
    saved = getattr(config, SAVED, None) or []
    carried = getattr(config, CARRIED, None) or []
    steps = [{"attention": attention, "layers": layers}] if attention else saved
    steps = steps or [{"attention": "softmax", "layers": None}]
    whole = "softmax" if steps[0]["layers"] is not None else steps[0]["attention"]
    kind = _class_of(config)
    with _expecting_learned(kind):
        model = kind.from_pretrained(path, attn_implementation=implementation(whole), **kwargs)
    setattr(model.config, SAVED, [])
    for step in steps:
        if step.get("named"):
            setattr(model.config, SAVED, [step])
        else:
            convert(model, step["attention"], layers=step["layers"], cache=cache)
    if not attention:
        _restore(model, _folder(path, kwargs))
        if carried:
            make_recurrent(model, carried)
    return model


def otherwise(model: PreTrainedModel) -> str:
    """What layers that are not chosen run: what they have, where it is ours, or our softmax."""
    before = str(model.config._attn_implementation)
    return before if before.startswith(PREFIX) else implementation("softmax")


def choose(
    model: PreTrainedModel, whole: str, layers: list[int] | None, inputs: dict[str, Any] | None
) -> dict[str, Seen]:
    """Set the whole model's implementation; the attention modules of these layers, by name.

    They are found by a pass on softmax, whatever system they have or shall have.

    Raises:
        ValueError: as `convert`; the model then has the implementation that it had.
    """
    before = str(model.config._attn_implementation)
    set_implementation(model, whole)
    try:
        return _of_layers(_through_the_door(model, inputs), layers)
    except Exception:
        set_implementation(model, before)
        raise


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """As the model's own `set_attn_implementation`, but a refusal is an error."""
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} is not built on transformers' attention interface: it would "
            f"accept {name!r} and go on with its own attention"
        )
    model.set_attn_implementation(name)


def give(module: nn.Module, found: Seen, name: str, own: bool) -> None:
    """The system of that name, and what it learns, to an attention module like the one found."""
    system = system_named(name)
    _put_back(module, {})
    if own:
        setattr(module, OWN, system)
    learned = system.learned(found.heads, found.key_dim, found.value_dim)
    if found.sinks and isinstance(getattr(system, "weights", None), SoftmaxSink):
        learned = {}  # the model's own
    if learned:  # in the dtype of the queries: what the weights are stored in may be no such number
        parameters = {
            key: nn.Parameter(start.to(device=found.device, dtype=found.dtype))
            for key, start in learned.items()
        }
        setattr(module, LEARNED, nn.ParameterDict(parameters))


def _had(module: nn.Module) -> dict[str, Any]:
    names = (LEARNED, OWN, CARRIED)
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


def _put_back(module: nn.Module, attributes: dict[str, Any]) -> None:
    """Let the module have these of its system's attributes, and no others."""
    for name in (LEARNED, OWN):
        if hasattr(module, name):
            delattr(module, name)
        if name in attributes:
            setattr(module, name, attributes[name])
    carry(module, CARRIED in attributes)


def record(model: PreTrainedModel, name: str, layers: list[int] | None) -> None:
    """Write into the config what `load` will do again."""
    step = {"attention": name.removeprefix(PREFIX), "layers": layers}
    earlier = [] if layers is None else list(getattr(model.config, SAVED, None) or [])
    whole = str(model.config._attn_implementation).removeprefix(PREFIX)
    if layers is not None and whole not in [x["attention"] for x in earlier if _is_whole(x)]:
        # it was named at construction, or by `set_attn_implementation`, and learns nothing
        some = [x for x in earlier if not _is_whole(x)]
        earlier = [{"attention": whole, "layers": None, "named": True}, *some]
    setattr(model.config, SAVED, [*earlier, step])
    _record_carried(model)


def _is_whole(step: dict[str, Any]) -> bool:
    return step["layers"] is None


def _record_carried(model: PreTrainedModel) -> None:
    names = [name for name, module in model.named_modules() if is_carried(module)]
    if names or hasattr(model.config, CARRIED):
        setattr(model.config, CARRIED, sorted(_layer_number(name) for name in names))


def _through_the_door(model: PreTrainedModel, inputs: dict | None) -> dict[str, Seen]:
    with on_softmax():
        seen, ran = look(model, inputs)
    missing = sorted(set(ran) - set(seen))
    if missing or not seen:
        raise ValueError(
            f"{type(model).__name__}: {', '.join(missing) or 'no attention'} did not come through "
            "transformers' attention interface"
        )
    return seen


def _of_layers(seen: dict[str, Seen], layers: list[int] | None) -> dict[str, Seen]:
    if layers is None:
        return seen
    numbers = {name: _layer_number(name) for name in seen}
    there = sorted(set(numbers.values()))
    wanted = set()
    for layer in layers:
        number = layer if layer >= 0 else len(there) + layer
        if number not in there:
            raise ValueError(f"there is no layer {layer}; the model has {there[0]} to {there[-1]}")
        wanted.add(number)
    return {name: seen[name] for name, number in numbers.items() if number in wanted}


def _layer_number(name: str) -> int:
    numbers = re.findall(r"\.(\d+)\.", f".{name}.")
    if not numbers:
        raise ValueError(f"{name} has no layer number; convert the whole model (layers=None)")
    return int(numbers[0])


def _class_of(config: Any) -> Any:
    """The model class that a config names; a decoder where it names none."""
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{type(config).__name__} names no class of transformers (its architectures: "
            f"{getattr(config, 'architectures', None)}), and has no decoder: open it by its own "
            "class, and convert it"
        )
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


@contextlib.contextmanager
def _expecting_learned(kind: Any) -> Iterator[None]:
    """`from_pretrained` has no place yet for what systems learn, and shall not warn of it."""
    before = kind._keys_to_ignore_on_load_unexpected
    kind._keys_to_ignore_on_load_unexpected = [*(before or ()), rf"\.{LEARNED}\."]
    try:
        yield
    finally:
        kind._keys_to_ignore_on_load_unexpected = before


def _folder(path: str | Path, kwargs: dict[str, Any]) -> Path:
    """Where the weights are that `from_pretrained` has just read."""
    if not Path(path).is_dir():
        where = {k: kwargs[k] for k in ("cache_dir", "revision") if k in kwargs}
        path = snapshot_download(str(path), local_files_only=True, **where)
    return Path(path) / kwargs.get("subfolder", "")


def _restore(model: PreTrainedModel, folder: Path) -> None:
    """The learned parameters of the systems, which `from_pretrained` had no place for."""
    places = {name: p for name, p in model.named_parameters() if f".{LEARNED}." in name}
    files = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin"))] if places else []
    for file in files:
        with torch.no_grad():
            for name, stored in _stored(file, places):
                places.pop(name).copy_(stored)
    if places:
        raise ValueError(f"{folder} does not hold {', '.join(sorted(places))}")


def _stored(file: Path, wanted: Iterable[str]) -> list[tuple[str, Tensor]]:
    if file.suffix == ".bin":
        if not file.name.startswith("pytorch_model"):
            return []
        held = torch.load(file, map_location="cpu", weights_only=True)
        return [(name, held[name]) for name in wanted if name in held]
    with safe_open(file, "pt") as held:
        names = set(held.keys())
        return [(name, held.get_tensor(name)) for name in wanted if name in names]
