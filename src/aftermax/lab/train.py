"""The one training loop. Killed at any moment, it goes on to the same numbers, bit for bit.

What a step does is a function of (seed, step) and of the tensors: batches are drawn from a
generator seeded by both, so that every system sees the same data in the same order and a resumed
run needs no history. A checkpoint holds weights, optimiser and generator state; it is written
beside the old one and renamed over it, so that one whole checkpoint exists at any moment.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from aftermax.lab.store import Row, Store, alone
from aftermax.lab.tasks import Data, task_of
from aftermax.lab.work import AnyWork, Run
from aftermax.losses import FactoredLinear

CHECKPOINT_EVERY = 100
"""Steps between checkpoints; any value gives the same numbers."""
LOG_EVERY = 20
"""Steps between rows of the training loss."""
STACKED = {"w1": True, "w2": True, "gates": True, "b1": False, "b2": False}
"""Stacks of `aftermax.moe`, one part for each expert or task: whether the parts are matrices."""


def train(
    run: Run,
    data: Data,
    store: Store,
    folder: Path,
    proceed: Callable[[], bool] = lambda: True,
) -> bool:
    """Train and measure one run, from wherever it was left.

    Args:
        folder: of all runs; this one's checkpoint is in `folder / run.id`.
        proceed: asked before each step; False stops after a checkpoint.

    Returns:
        Whether the run is finished.
    """
    torch.set_num_threads(run.work.threads)
    with alone(folder / run.id):
        if store.status(run.id) == "done":
            return True
        store.begin(run.id)
        model, optimiser = build(run, data)
        checkpoint = folder / run.id / "checkpoint.safetensors"
        step = load(checkpoint, model, optimiser) if checkpoint.exists() else 0
        log: list[Row] = []
        while step < run.steps:
            if not proceed():
                if step:  # before the first step there is nothing to keep
                    store.write(run.id, log)
                    save(checkpoint, model, optimiser, step)
                return False
            loss = train_step(model, optimiser, batch(run, data, step), run, step)
            step += 1
            if step % LOG_EVERY == 0 or step == run.steps:
                if not math.isfinite(loss.item()):
                    # a result: the run is done, and says so
                    log.append(Row(step, run.work.context, "diverged", 1.0))
                    store.write(run.id, log, done=True)
                    return True
                log.append(Row(step, run.work.context, "train_loss", loss.item()))
                store.report_progress(run.id, step, run.steps, loss.item())
            if step % CHECKPOINT_EVERY == 0 or step == run.steps:
                store.write(run.id, log)  # first: a row that is lost is not made again
                save(checkpoint, model, optimiser, step)
                log = []
        store.report_progress(run.id, step, run.steps, math.nan, "measuring")
        model.eval()
        store.write(run.id, evaluate(model, run, data, step), done=True)
        return True


def build(run: Run, data: Data) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimiser before the first step; the same initial weights for every system."""
    torch.manual_seed(run.seed)
    model = task_of(run.work).model(run, data)
    return model, make_optimiser(model, run)


def make_optimiser(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors and what a system learns do not. Or plain SGD, which may be
    sparse. A factored output layer, which no optimiser can hold, makes its own step with it."""
    work = run.work
    if run.arm.optimiser == "sgd":
        optimiser: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=run.learning_rate)
    else:
        optimiser = _adamw(model, work)
    scale = work.factored_rate / run.arm.rate_scale
    decay = work.weight_decay / scale  # of the rate of the optimiser, as AdamW's
    layers: list[FactoredLinear] = [
        layer for layer in model.modules() if isinstance(layer, FactoredLinear)
    ]

    def step_too(after: torch.optim.Optimizer, *_: Any) -> None:
        for layer in layers:
            if math.isfinite(layer.grad_norm()):
                layer.step(scale * after.param_groups[0]["lr"], weight_decay=decay)
            else:  # the run has diverged, which the loop sees by its loss
                layer.zero_grad()

    if layers:
        optimiser.register_step_post_hook(step_too)
    return optimiser


def _adamw(model: nn.Module, work: AnyWork) -> torch.optim.Optimizer:
    named = dict(model.named_parameters())
    matrices = {
        name
        for name, p in named.items()
        if STACKED.get(name.rpartition(".")[2], p.ndim == 2 and "learned" not in name)
    }
    groups = [
        {
            "params": [p for n, p in named.items() if n in matrices],
            "weight_decay": work.weight_decay,
        },
        {"params": [p for n, p in named.items() if n not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def batch(run: Run, data: Data, step: int) -> Any:
    """What a step learns from."""
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
    return task_of(run.work).batch(run, data, generator)


def train_step(model, optimiser, batch: Any, run: Run, step: int) -> Tensor:
    """One step of the optimiser; returns the loss that is reported."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(run, step)
    loss, reported = task_of(run.work).loss(model, batch, run)
    optimiser.zero_grad()
    loss.backward()
    if run.work.clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), run.work.clip)
    optimiser.step()
    return reported.detach()


def evaluate(model: nn.Module, run: Run, data: Data, step: int) -> list[Row]:
    """The rows that end a run."""
    task = task_of(run.work)
    if run.kind == "search":
        loss = task.tuning_loss(model, run.work, data)
        return [Row(step, run.work.context, "tuning_loss", loss)]
    return task.evaluate(model, run.work, data, step)


def learning_rate(run: Run, step: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    warmup = max(1, round(run.work.warmup * run.steps))
    highest = run.learning_rate * run.arm.rate_scale
    if step < warmup:
        return highest * (step + 1) / warmup
    done = (step - warmup) / max(1, run.steps - warmup)
    return highest * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def save(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    """Write whole or not at all, even if the power fails."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter, state in optimiser.state.items():
        for key, value in state.items():
            tensors[f"optimiser.{key}.{names[id(parameter)]}"] = value
    tensors["generator"] = torch.get_rng_state()
    scratch = path.with_suffix(".part")
    save_file(tensors, scratch, {"step": json.dumps(step)})
    with scratch.open("rb") as written:
        os.fsync(written.fileno())
    scratch.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def load(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Put a checkpoint back; the number of steps that it has behind it."""
    with safe_open(path, "pt") as checkpoint:
        names = set(checkpoint.keys())
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(checkpoint.get_tensor(f"model.{name}"))
            for name, parameter in model.named_parameters():
                held = {
                    key: checkpoint.get_tensor(stored)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if (stored := f"optimiser.{key}.{name}") in names
                }
                if held:  # plain SGD has none
                    optimiser.state[parameter] = held
        torch.set_rng_state(checkpoint.get_tensor("generator"))
        return json.loads(checkpoint.metadata()["step"])
