"""The output layers that the tasks of labels and of words compare: what a report says of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Output:
    """What stands in a table; the layers themselves are in `heads.py`."""

    name: str
    title: str
    formula: str
    paper: str
    arxiv: str = ""
    claim: str = ""
    """What its paper says, in its own setting."""


@dataclass(frozen=True)
class OutputArm:
    """An output layer as it runs in a work."""

    name: str
    entry: Output
    optimiser: Literal["adamw", "sgd"] = "adamw"
    rate_scale: float = 1.0
    values: tuple[float, ...] = ()
    """Of the loss, where the name gives them."""

    @property
    def title(self) -> str:
        numbers = "" if not self.values else " · a = {:g}, b = {:g}".format(*self.values)
        return self.entry.title + numbers + (" · AdamW" if self.name.endswith("/adamw") else "")

    @property
    def identity(self) -> dict[str, str]:
        return {"arm": self.entry.name}


def find(name: str, outputs: tuple[Output, ...]) -> Output:
    """The output of that name.

    Raises:
        ValueError: naming those that there are.
    """
    for output in outputs:
        if output.name == name:
            return output
    raise ValueError(f"there is no output {name!r}; there are {', '.join(o.name for o in outputs)}")


SOFTMAX = Output("softmax", "softmax", "logsumexp(o) − o_c", "cross-entropy of all classes")
ADAPTIVE = Output(
    "adaptive",
    "adaptive softmax",
    "frequent classes, and clusters of rare ones through ever narrower projections",
    "Grave et al. 2016",
    "1609.04309",
    "2 to 10 times faster than softmax, close in perplexity.",
)
SAMPLED = Output(
    "sampled",
    "sampled softmax",
    "softmax over the class and drawn ones, each less ln(expected draws)",
    "Bengio & Senécal 2008; Jean et al. 2014",
    "1412.2007",
    "Trains large vocabularies at the cost of the draws.",
)
HIERARCHICAL = Output(
    "hierarchical",
    "hierarchical softmax",
    "p(group) p(class | group), √D groups of √D",
    "Goodman 2001; Morin & Bengio 2005",
    "",
    "A step in √D; the Z-loss's paper has it 4 times slower than the Z-loss.",
)
Z_LOSS = Output(
    "z-loss",
    "Z-loss (factored)",
    "softplus(a (b − z_c)) / a, z = (o − mean o) / sd o",
    "de Brébisson & Vincent 2016",
    "1604.08859",
    "40 times faster than softmax at 793,471 words, better in some top-k.",
)
LOG_TAYLOR = Output(
    "log-taylor",
    "log-Taylor softmax (factored)",
    "−ln of (1 + o_c + o_c²/2) / Σ (1 + o_k + o_k²/2)",
    "Vincent, de Brébisson & Bouthillier 2015; de Brébisson & Vincent 2015",
    "1511.05042",
    "Better than softmax on MNIST and CIFAR-10, worse at many classes.",
)
WORD_OUTPUTS = (SOFTMAX, ADAPTIVE, HIERARCHICAL, SAMPLED, Z_LOSS, LOG_TAYLOR)

BCE = Output(
    "bce",
    "one-vs-all, BCE",
    "Σ softplus(s_j) − Σ s_p over the labels p",
    "one binary classifier a label",
)
ONE_VS_ALL = (
    Output(
        "softmax",
        "one-vs-all, softmax",
        "mean over p of logsumexp(s) − s_p",
        "cross-entropy of all labels, a share for each of a document's",
    ),
    BCE,
    Output(
        "decoupled",
        "one-vs-all, decoupled softmax",
        "mean over p of softplus(logsumexp of the negatives − s_p)",
        "Gupta et al. 2023, with a vector for each label",
        "2310.10636",
    ),
    Output("sampled", "one-vs-all, sampled softmax", SAMPLED.formula, SAMPLED.paper, SAMPLED.arxiv),
    Output(
        "adaptive", "one-vs-all, adaptive softmax", ADAPTIVE.formula, ADAPTIVE.paper, ADAPTIVE.arxiv
    ),
    Output("z-loss", "one-vs-all, Z-loss (factored)", Z_LOSS.formula, Z_LOSS.paper, Z_LOSS.arxiv),
)
DUAL = (
    Output(
        "dual/infonce",
        "dual encoder, InfoNCE",
        "mean over p of logsumexp(s) − s_p, s = f(x)·g(y) / τ",
        "van den Oord et al. 2018; the coupled softmax of the DEXML paper",
        "1807.03748",
        "A confident label is pushed down by the others of its document.",
    ),
    Output(
        "dual/bce",
        "dual encoder, BCE",
        BCE.formula,
        "the one-vs-all loss on a dual encoder, in the DEXML paper",
        "2310.10636",
        "Trains poorly on a dual encoder.",
    ),
    Output(
        "dual/decoupled",
        "dual encoder, decoupled softmax",
        "mean over p of softplus(logsumexp of the negatives − s_p)",
        "Gupta et al. 2023 (DEXML)",
        "2310.10636",
        "Equal to classifiers with a vector for each label or better, 20 times smaller.",
    ),
    Output(
        "dual/decoupled-one",
        "dual encoder, decoupled softmax, one label drawn",
        "softplus(logsumexp of the negatives − s_p) of one p, drawn for each step",
        "Gupta et al. 2023, the default of the authors' code",
        "2310.10636",
    ),
    Output(
        "dual/soft-topk",
        "dual encoder, soft top-k",
        "−mean over p of ln σ(α(s_p + t)), t such that Σ σ(α(s + t)) = k",
        "Gupta et al. 2023, after Ahle's operator",
        "2310.10636",
        "Best at the k that it is trained for.",
    ),
)
LABEL_OUTPUTS = ONE_VS_ALL + DUAL


def loss_of(output: Output) -> str:
    """The same in whatever layer; InfoNCE is the softmax of a dual encoder."""
    loss = output.name.removeprefix("dual/")
    return "softmax" if loss == "infonce" else loss


LOSSES = tuple(dict.fromkeys(map(loss_of, WORD_OUTPUTS + LABEL_OUTPUTS)))
"""Each has a colour, by its place here."""
