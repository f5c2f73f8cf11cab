"""Output layers: time and memory of a training step against the number of classes.

    make bench-output
    python benchmarks/output.py --save docs/results/output.json

Sections:
    steps     forward, backward and update of the output layer, from 10,000 to 1,000,000 classes:
              the factored Z-loss, log-softmax (as a training loop writes it, and by hand), our
              linear_cross_entropy, adaptive and sampled softmax; 256 wide, 128 examples
    flat      the factored step alone, its sizes beside one another in one process
    repairs   a run of steps at each size, with all that they ask for: how often U is put right,
              what that costs, and what a step costs on average
    memory    peak of a step above what its layer and batches hold, in processes of their own
    topk      the best 10 of all classes
    drift     100,000 steps in float32 against a twin in float64, and dense float32 SGD beside them

One thread, float32, thread time. Contenders run in one process, interleaved, in shuffled order;
ratios are medians within rounds. Only the output layer is timed: what a whole training step gains
depends on the network beneath.
"""

from __future__ import annotations

import statistics
import time

import torch
from interleaved import Contenders, Record, need_kernels, options_parser, ratio, time_rounds
from output_layers import (
    BATCH,
    DENSE,
    WIDTH,
    factored,
    names,
    step_of,
    weight_of,
    zipf,
)
from rich.console import Console
from torch import Tensor

from aftermax import FactoredLinear, SquaredErrorLoss, ZScoreLoss
from aftermax.lab.cost import in_own_process, peak_mebibytes
from aftermax.losses import SphericalLoss
from aftermax.losses.zloss import find_labels, reduced

SECTIONS = ("steps", "flat", "repairs", "memory", "topk", "drift")
SIZES = (10_000, 100_000, 793_471, 1_000_000)
"""793,471: the vocabulary of the One Billion Word set, which arXiv:1604.08859 trains on."""

DRIFT = {"Z-loss": (ZScoreLoss(), 1.0), "squared error": (SquaredErrorLoss(), 0.01)}
DRIFT_CLASSES, DRIFT_WIDTH, DRIFT_BATCH = 2000, 64, 32


def thread_time(contenders: Contenders, rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of this thread's own time, which others on the machine do not add to."""
    return time_rounds(contenders, rounds, repeats, time.thread_time)


def many(step, times: int):
    def run() -> None:
        for _ in range(times):
            step()

    return run


def quartiles(seconds: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"ms": 1e3 * middle, "ms_low": 1e3 * low, "ms_high": 1e3 * high}


# ---- time of a step ----------------------------------------------------------------------------


def steps(record: Record, console: Console, rounds: int) -> None:
    for classes in SIZES:
        weight = weight_of(classes)
        dense = names()[:3]
        repeats = {name: 1 if name in dense else 10 for name in names()}
        contenders: Contenders = {
            name: many(step_of(name, classes, weight), repeats[name]) for name in names()
        }
        taken = thread_time(contenders, max(5, min(rounds, 2_000_000 // classes)))
        seconds = {name: [s / repeats[name] for s in all_] for name, all_ in taken.items()}
        console.print(f"[bold]{classes:,} classes[/]", highlight=False)
        for name, each in seconds.items():
            line = {"name": name, "classes": classes, "width": WIDTH, "batch": BATCH}
            line |= quartiles(each) | {"rounds": len(each)}
            for other, key in zip(dense, ("dense", "by_hand", "fused"), strict=True):
                line |= {f"{key}_{k}": v for k, v in ratio(seconds[other], each).items()}
            record.add("steps", line, ("name", "classes", "width", "batch"))
            console.print(
                f"  {name}: {line['ms']:,.2f} ms, {line['dense_ratio']:,.1f} times as fast as"
                f" autograd, {line['by_hand_ratio']:,.1f} as by hand, {line['fused_ratio']:,.1f} as"
                " linear_cross_entropy",
                highlight=False,
            )
        del contenders, weight


def flat(record: Record, console: Console, rounds: int) -> None:
    layers = {classes: FactoredLinear(WIDTH, classes) for classes in SIZES}
    contenders: Contenders = {str(size): factored(layer) for size, layer in layers.items()}
    seconds = thread_time(contenders, 20 * rounds)
    for classes in SIZES:
        line = {"classes": classes, "width": WIDTH, "batch": BATCH}
        line |= quartiles(seconds[str(classes)])
        line |= ratio(seconds[str(classes)], seconds["100000"])
        record.add("flat", line, ("classes", "width", "batch"))
        console.print(
            f"  {classes:,}: {line['ms']:.2f} ms, {line['ratio']:.3f} of 100,000's",
            highlight=False,
        )


class Watched(FactoredLinear):
    """Clocks its repairs."""

    spent, repairs = 0.0, 0

    def _repair(self) -> None:
        start = time.thread_time()
        super()._repair()
        self.spent += time.thread_time() - start
        self.repairs += 1


def learnable(
    classes: int, width: int, batch: int, random: torch.Generator, codes: Tensor
) -> tuple[Tensor, Tensor]:
    """Hidden vectors that say something of their Zipf targets, through a ReLU."""
    target = zipf(classes, batch, generator=random)
    noise = torch.randn(batch, width, generator=random)
    return (codes[target % len(codes)] + noise).relu_(), target


def repairs(record: Record, console: Console, count: int) -> None:
    """With learning rates of a size that next-word prediction asks for."""
    for classes in SIZES:
        for rate in (1.0, 10.0):
            random = torch.Generator().manual_seed(0)
            codes = torch.randn(2000, WIDTH, generator=random)
            layer = Watched(WIDTH, classes)
            each = []
            for _ in range(count):
                hidden, target = learnable(classes, WIDTH, BATCH, random, codes)
                start = time.thread_time()
                layer(hidden.requires_grad_(), target).backward()
                layer.step(rate)
                each.append(time.thread_time() - start)
            line = {"classes": classes, "lr": rate, "steps": count, "repairs": layer.repairs}
            line |= {"mean_ms": 1e3 * statistics.fmean(each)}
            line |= {"median_ms": 1e3 * statistics.median(each)}
            line |= {"repair_ms": 1e3 * layer.spent / max(1, layer.repairs)}
            record.add("repairs", line, ("classes", "lr"))
            console.print(
                f"  {classes:,}, lr {rate}: {layer.repairs} repairs of {line['repair_ms']:,.0f} ms"
                f" in {count:,} steps; a step {line['median_ms']:.2f} ms, with them"
                f" {line['mean_ms']:.2f} ms",
                highlight=False,
            )
            del layer


# ---- memory, prediction ------------------------------------------------------------------------


def _peak(name: str, classes: int) -> float:
    torch.set_num_threads(1)
    step = step_of(name, classes)
    step_of(DENSE, 100)()  # the libraries' own memory
    return peak_mebibytes(step)


def memory(record: Record, console: Console) -> None:
    for classes in (100_000, 1_000_000):
        for name in names():
            mebibytes = in_own_process(_peak, name, classes)
            line = {"name": name, "classes": classes, "mebibytes": mebibytes}
            record.add("memory", line, ("name", "classes"))
            console.print(f"  {classes:,}, {name}: {mebibytes:,.0f} MiB", highlight=False)


def topk(record: Record, console: Console, rounds: int) -> None:
    layer = FactoredLinear(WIDTH, SIZES[-1])
    weight = layer.weight
    for rows in (1, BATCH):
        hidden = torch.randn(rows, WIDTH)
        contenders: Contenders = {
            "FactoredLinear.topk": lambda h=hidden: layer.topk(h, 10),
            "torch, all logits": lambda h=hidden: (h @ weight.T).topk(10),
        }
        seconds = thread_time(contenders, rounds)
        for name, each in seconds.items():
            line = {"name": name, "rows": rows, "classes": SIZES[-1], "k": 10}
            line |= quartiles(each) | ratio(seconds["torch, all logits"], each)
            record.add("topk", line, ("name", "rows", "classes", "k"))
            console.print(f"  {rows} rows, {name}: {line['ms']:.1f} ms", highlight=False)


# ---- drift -------------------------------------------------------------------------------------


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def drift(record: Record, console: Console, count: int) -> None:
    marks = {round(10 ** (n / 8)) for n in range(16, 41)} & set(range(count + 1)) | {count}
    for name, (loss, rate) in DRIFT.items():
        random = torch.Generator().manual_seed(0)
        codes = torch.randn(DRIFT_CLASSES, DRIFT_WIDTH, generator=random)
        layer = Watched(DRIFT_WIDTH, DRIFT_CLASSES, loss=loss)
        dense = layer.weight.clone()
        twin = FactoredLinear.from_linear(layer.to_linear().double(), loss=loss)
        for step in range(1, count + 1):
            hidden, target = learnable(DRIFT_CLASSES, DRIFT_WIDTH, DRIFT_BATCH, random, codes)
            hidden = 0.3 * hidden
            for each, inputs in ((layer, hidden), (twin, hidden.double())):
                each(inputs, target).backward()
                each.step(rate)
            dense_step(dense, hidden, target, loss, rate)
            if step in marks:
                line = {"loss": name, "lr": rate, "step": step, "repairs": layer.repairs}
                line |= drifted(layer, twin, dense)
                record.add("drift", line, ("loss", "step"))
        console.print(
            f"  {name}, {count:,} steps: weights {line['weight']:.1e} from the twin's (dense"
            f" float32 {line['dense']:.1e}), gram {line['gram']:.1e} from the weights, inverse"
            f" {line['inverse']:.1e}; {layer.repairs} repairs",
            highlight=False,
        )


def dense_step(
    weight: Tensor, hidden: Tensor, target: Tensor, loss: SphericalLoss, rate: float
) -> None:
    """SGD on a dense float32 weight, in place."""
    logits = (hidden @ weight.T).requires_grad_()
    variance, mean = torch.var_mean(logits, 1, correction=0, keepdim=True)
    labels = find_labels("drift", target[:, None], len(weight), -100, several=False)
    each = loss.from_moments(mean, variance, logits.gather(1, target[:, None]), len(weight))
    (gradient,) = torch.autograd.grad(reduced(each, labels, "mean"), logits)
    weight.addmm_(gradient.T, hidden, alpha=-rate)


def drifted(layer: FactoredLinear, twin: FactoredLinear, dense: Tensor) -> dict[str, float]:
    """Relative distances in the Frobenius norm, computed in float64."""
    weight, exact = copied(layer), copied(twin)
    centred = weight - weight.mean(0)
    eye = torch.eye(DRIFT_WIDTH, dtype=torch.float64)
    return {
        "weight": relative(weight, exact),
        "dense": relative(dense, exact),
        "gram": relative(layer.gram, centred.T @ centred),
        "mean": ((layer.mean.double() - weight.mean(0)).norm() / weight.norm(dim=1).mean()).item(),
        "inverse": relative(layer.U.double() @ layer.U_inverse.double(), eye),
    }


def copied(layer: FactoredLinear) -> Tensor:
    """W in float64, from the parts as they stand."""
    return layer.V.double() @ layer.U.double() + (layer.offset.double() + layer.mean.double())


def main() -> None:
    parser = options_parser(__doc__ or "", SECTIONS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repair-steps", type=int, default=2000)
    parser.add_argument("--drift-steps", type=int, default=100_000)
    options = parser.parse_args()
    need_kernels()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    record, console = Record(options.save), Console()
    counts = {"repairs": options.repair_steps, "drift": options.drift_steps}
    for section in SECTIONS:
        if options.only in (None, section):
            console.print(f"[bold]{section}[/]")
            if section == "memory":
                memory(record, console)
            else:
                globals()[section](record, console, counts.get(section, options.rounds))


if __name__ == "__main__":
    main()
