"""Recurrent mixers that attention is compared with: each the formula, a loop, and its form.

    S6          selective state space, Mamba                     arXiv 2312.00752
    SSD         the same with one decay for a head, Mamba-2      arXiv 2405.21060
    QuasiLSTM   an LSTM whose gates see the input alone          arXiv 2405.15731
    RGLRU       real-gated linear recurrent unit, Griffin        arXiv 2402.19427
    MLSTM       LSTM with a matrix for memory, xLSTM             arXiv 2405.04517

They are references: plain torch, token by token, right in float64, the mixer alone. What their
papers put around it (convolutions, gates, norms, up- and down-projections) is not here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aftermax.dynamics.form import DynamicalSystem, Factors, Gauge, normalised


class Mixer(nn.Module):
    """(B, T, width) -> (B, T, width), causal, with a form for `aftermax.as_dynamical_system`."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def dynamics(self, u: Tensor, gauge: Gauge = "state") -> DynamicalSystem:
        """The form at the input u (L, width)."""
        raise NotImplementedError(f"{type(self).__name__} does not define dynamics")

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise ValueError(f"expected (B, T, {self.width}), got {tuple(x.shape)}")
        return x

    def _own(self, u: Tensor) -> Tensor:
        return self(u[None])[0]


class S6(Mixer):
    """Mamba's selective state space (Gu & Dao 2023, arXiv 2312.00752), per channel c::

        h_i[c] = exp(Delta_i[c] A[c]) h_{i-1}[c] + Delta_i[c] b_i u_i[c]
        y_i[c] = c_i . h_i[c] + D[c] u_i[c]
        Delta_i = softplus(W_Delta u_i + bias),  b_i = W_b u_i,  c_i = W_c u_i,  A < 0

    Delta b is what the authors' code takes for the paper's zero-order hold of B. A starts at -1 ...
    -n in each channel, D at 1, the bias so that Delta starts between 0.001 and 0.1, as in their
    code.

    Args:
        width: channels. state: n, numbers kept for each. rank: of W_Delta; None = width / 16,
            rounded up, theirs.

    The form: Lambda_i = exp(Delta_i A) for each channel and number, B_i = Delta_i b_i per channel,
    C_i = I (x) c_i^T, D. N = n width.

    >>> S6(4, state=3)(torch.randn(2, 5, 4)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(self, width: int, state: int = 16, rank: int | None = None):
        super().__init__(width)
        rank = math.ceil(width / 16) if rank is None else rank
        self.to_delta = nn.Sequential(
            nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=True)
        )
        self.to_b = nn.Linear(width, state, bias=False)
        self.to_c = nn.Linear(width, state, bias=False)
        self.log_minus_a = nn.Parameter(torch.arange(1.0, state + 1).log().repeat(width, 1))
        self.skip = nn.Parameter(torch.ones(width))
        with torch.no_grad():
            self.to_delta[1].bias.copy_(_bias_of_steps(width))  # type: ignore[arg-type]

    def step_sizes(self, x: Tensor) -> Tensor:
        """Delta, (..., width)."""
        return F.softplus(self.to_delta(x))

    def forward(self, x: Tensor) -> Tensor:
        a = -self.log_minus_a.exp()
        delta, b, c = self.step_sizes(self._checked(x)), self.to_b(x), self.to_c(x)
        state, out = x.new_zeros(len(x), *a.shape), []
        for i in range(x.shape[1]):
            step = delta[:, i, :, None]  # (B, width, 1)
            state = torch.exp(step * a) * state + step * b[:, i, None] * x[:, i, :, None]
            out.append((state * c[:, i, None]).sum(-1))
        return torch.stack(out, 1) + self.skip * x

    def dynamics(self, u: Tensor, gauge: Gauge = "state") -> DynamicalSystem:
        delta = self.step_sizes(u)[:, None]  # (L, 1, width)
        decay = torch.exp(delta[:, :, None] * -self.log_minus_a.mT.exp())  # (L, 1, n, width)
        whole = torch.eye(self.width).to(u)[None]
        return DynamicalSystem(
            decay,
            Factors(self.to_b(u)[:, None], delta, whole),
            Factors(self.to_c(u)[:, None], u.new_ones(1, 1, 1), whole),
            torch.diag(self.skip).expand(len(u), -1, -1),
            u, self._own(u), gauge=gauge,
        )  # fmt: skip


class SSD(Mixer):
    """Mamba-2's state space dual (Dao & Gu 2024, arXiv 2405.21060), per head of P channels::

        h_i = exp(-a Delta_i) h_{i-1} + Delta_i b_i u_i^T,    y_i = h_i^T c_i + D u_i
        Delta_i = softplus(w . u_i + bias),  b_i = W_b u_i,  c_i = W_c u_i,  a > 0

    One Delta, a and D for each head, b and c shared by all. a starts evenly between 1 and 16, D at
    1, Delta between 0.001 and 0.1 (the authors' code).

    Args:
        width: channels. heads: blocks of width / heads channels. state: n.

    The form: Lambda_i = exp(-a Delta_i), B_i = Delta_i b_i (x) I, C_i = c_i^T (x) I, D.
    N = n width.

    >>> SSD(4, heads=2, state=3)(torch.randn(2, 5, 4)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(self, width: int, heads: int = 1, state: int = 16):
        super().__init__(width)
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.to_delta = nn.Linear(width, heads, bias=True)
        self.to_b = nn.Linear(width, state, bias=False)
        self.to_c = nn.Linear(width, state, bias=False)
        self.log_a = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(heads))
        with torch.no_grad():
            self.to_delta.bias.copy_(_bias_of_steps(heads))

    def forward(self, x: Tensor) -> Tensor:
        delta = F.softplus(self.to_delta(self._checked(x)))  # (B, T, H)
        b, c, a = self.to_b(x), self.to_c(x), self.log_a.exp()
        heads = x.unflatten(-1, (self.heads, -1))  # (B, T, H, P)
        state, out = x.new_zeros(len(x), self.heads, b.shape[-1], heads.shape[-1]), []
        for i in range(x.shape[1]):
            step = delta[:, i, :, None, None]
            new = b[:, i, None, :, None] * heads[:, i, :, None]
            state = torch.exp(-a[:, None, None] * step) * state + step * new
            out.append((c[:, i, None, None] @ state)[:, :, 0])
        return (torch.stack(out, 1) + self.skip[:, None] * heads).flatten(-2)

    def dynamics(self, u: Tensor, gauge: Gauge = "state") -> DynamicalSystem:
        delta = F.softplus(self.to_delta(u))  # (L, H)
        decay = torch.exp(-self.log_a.exp() * delta)[..., None, None]
        b, c = (x(u)[:, None].expand(-1, self.heads, -1) for x in (self.to_b, self.to_c))
        own = torch.eye(self.width).to(u).unflatten(0, (self.heads, -1))  # (H, P, width)
        skip = self.skip.repeat_interleave(self.width // self.heads)
        return DynamicalSystem(
            decay,
            Factors(b, delta[..., None], own),
            Factors(c, u.new_ones(1, 1, 1), own),
            torch.diag(skip).expand(len(u), -1, -1),
            u, self._own(u), gauge=gauge,
        )  # fmt: skip


class QuasiLSTM(Mixer):
    """An LSTM whose gates see the input alone, qLSTM (Sieber et al. 2024, arXiv 2405.15731)::

        h_i = f_i * h_{i-1} + sigmoid(W_i u_i) * W_u u_i,    y_i = sigmoid(W_o u_i) * h_i
        f_i = sigmoid(W_f u_i),    reversed (their equation 23): f_i = sigmoid(-W_f u_i)^alpha

    alpha is one learned number, initially 1, rectified as in the authors' code. The gates have
    biases, W_u has none, and nothing is squashed but the gates: a tanh would not be linear in h.

    Args:
        width: channels, in, out and of the state. reversed_sigmoid: see above.

    The form: Lambda_i = f_i, B_i = diag(sigmoid(W_i u_i)) W_u, C_i = diag(sigmoid(W_o u_i)).
    N = width.

    >>> QuasiLSTM(4, reversed_sigmoid=True)(torch.randn(2, 5, 4)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(self, width: int, *, reversed_sigmoid: bool = False):
        super().__init__(width)
        self.reversed_sigmoid = reversed_sigmoid
        self.to_new = nn.Linear(width, width, bias=False)
        self.to_gates = nn.Linear(width, 3 * width, bias=True)
        self.alpha = nn.Parameter(torch.ones(())) if reversed_sigmoid else None

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Forget, input and output gate, each (..., width)."""
        forget, into, out_of = self.to_gates(x).chunk(3, -1)
        if self.alpha is None:
            forget = forget.sigmoid()
        else:
            forget = (-forget).sigmoid() ** self.alpha.relu()
        return forget, into.sigmoid(), out_of.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        forget, into, out_of = self.gates(self._checked(x))
        new, state, out = into * self.to_new(x), x.new_zeros(len(x), self.width), []
        for i in range(x.shape[1]):
            state = forget[:, i] * state + new[:, i]
            out.append(out_of[:, i] * state)
        return torch.stack(out, 1)

    def dynamics(self, u: Tensor, gauge: Gauge = "state") -> DynamicalSystem:
        forget, into, out_of = (gate[:, None] for gate in self.gates(u))
        one = u.new_ones(len(u), 1, 1)
        return DynamicalSystem(
            forget[:, :, None],
            Factors(one, into, self.to_new.weight.clone()[None]),
            Factors(one, out_of, torch.eye(self.width).to(u)[None]),
            None, u, self._own(u), gauge=gauge,
        )  # fmt: skip


class RGLRU(Mixer):
    """Griffin's real-gated linear recurrent unit (De et al. 2024, arXiv 2402.19427)::

        r_i = sigmoid(W_r u_i + b_r),  g_i = sigmoid(W_g u_i + b_g),  a_i = a^(c r_i),  c = 8
        h_i = a_i * h_{i-1} + sqrt(1 - a_i^2) * g_i * u_i,    y_i = h_i

    a = sigmoid of what is learned, initially so that a^c lies evenly between 0.9 and 0.999 (the
    paper's). Their W are block-diagonal, ours are full.

    Args:
        width: channels, in, out and of the state. power: c.

    The form: Lambda_i = a_i, B_i = diag(sqrt(1 - a_i^2) g_i), C_i = I. N = width.

    >>> RGLRU(4)(torch.randn(2, 5, 4)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(self, width: int, *, power: float = 8.0):
        super().__init__(width)
        self.power = power
        self.to_gates = nn.Linear(width, 2 * width, bias=True)
        start = torch.empty(width).uniform_(0.9, 0.999) ** (1 / power)
        self.logit = nn.Parameter(start.logit())

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """a_i and sqrt(1 - a_i^2) g_i, each (..., width)."""
        recurrence, into = self.to_gates(x).sigmoid().chunk(2, -1)
        log_a = self.power * recurrence * F.logsigmoid(self.logit)
        # 1 - a^2 to the last digit where a is next to 1
        return log_a.exp(), (-torch.expm1(2 * log_a)).sqrt() * into

    def forward(self, x: Tensor) -> Tensor:
        decay, into = self.gates(self._checked(x))
        state, out = x.new_zeros(len(x), self.width), []
        for i in range(x.shape[1]):
            state = decay[:, i] * state + into[:, i] * x[:, i]
            out.append(state)
        return torch.stack(out, 1)

    def dynamics(self, u: Tensor, gauge: Gauge = "state") -> DynamicalSystem:
        decay, into = (gate[:, None] for gate in self.gates(u))
        one, whole = u.new_ones(len(u), 1, 1), torch.eye(self.width).to(u)[None]
        return DynamicalSystem(
            decay[:, :, None],
            Factors(one, into, whole),
            Factors(one, u.new_ones(1, 1, 1), whole),
            None, u, self._own(u), gauge=gauge,
        )  # fmt: skip


class MLSTM(Mixer):
    """xLSTM's matrix memory (Beck et al. 2024, arXiv 2405.04517), per head::

        S_i = f_i S_{i-1} + e_i k_i v_i^T,    n_i = f_i n_{i-1} + e_i k_i
        y_i = o_i * S_i^T q_i / max(|n_i . q_i|, 1)
        f_i = sigmoid(w_f . u_i + b_f),  e_i = exp(w_e . u_i + b_e),  o_i = sigmoid(W_o u_i + b_o)

    Keys are divided by sqrt(d). The paper's stabiliser of the exponentials is left out: in float64
    the formula stands as it is.

    That it has this form is our derivation; it is not confirmed that the paper of the form has it.

    Args:
        width: of the tokens, in and out. heads: H, of width / H.

    The form: Lambda_i = f_i, B_i = e_i k_i (x) W_V and
    C_i = q_i^T (x) diag(o_i) / max(abs(n_i . q_i), 1) in the gauge "output"; in "state" that
    divisor goes into Lambda and B. It depends on what came before.
    N = width^2 / H. The sLSTM, whose memories mix, is no such system.

    >>> MLSTM(4, heads=2)(torch.randn(2, 5, 4)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(self, width: int, heads: int = 1):
        super().__init__(width)
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key = nn.Linear(width, width, bias=False)
        self.to_value = nn.Linear(width, width, bias=False)
        self.to_gates = nn.Linear(width, 2 * heads, bias=True)
        self.to_out_gate = nn.Linear(width, width, bias=True)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Query, key (..., H, d), forget and input gate (..., H), output gate (..., H, d)."""
        query, key, gate = (
            part.unflatten(-1, (self.heads, -1))
            for part in (self.to_query(x), self.to_key(x), self.to_out_gate(x).sigmoid())
        )
        forget, into = self.to_gates(x).chunk(2, -1)
        return query, key * key.shape[-1] ** -0.5, forget.sigmoid(), into.exp(), gate

    def forward(self, x: Tensor) -> Tensor:
        query, key, forget, into, gate = self._project(self._checked(x))
        value = self.to_value(x).unflatten(-1, (self.heads, -1))
        size = query.shape[-1]
        memory = x.new_zeros(len(x), self.heads, size, size)
        norm, out = x.new_zeros(len(x), self.heads, size), []
        for i in range(x.shape[1]):
            f, e = forget[:, i, :, None], into[:, i, :, None]
            memory = f[..., None] * memory + (e * key[:, i])[..., None] * value[:, i, :, None]
            norm = f * norm + e * key[:, i]
            total = (norm * query[:, i]).sum(-1, keepdim=True).abs().clamp_min(1)
            out.append(gate[:, i] * (query[:, i, :, None] @ memory)[:, :, 0] / total)
        return torch.stack(out, 1).flatten(-2)

    def dynamics(self, u: Tensor, gauge: Gauge = "state") -> DynamicalSystem:
        query, key, forget, into, out_gate = self._project(u)
        norm, totals = torch.zeros_like(key[0]), []
        for i in range(len(u)):
            norm = forget[i, :, None] * norm + into[i, :, None] * key[i]
            totals.append((norm * query[i]).sum(-1).abs().clamp_min(1))
        whole = torch.eye(self.width).to(u).unflatten(0, (self.heads, -1))
        to_values = self.to_value.weight.clone().unflatten(0, (self.heads, -1))
        decay, into, out_of = normalised(
            forget[..., None, None],
            Factors(into[..., None] * key, u.new_ones(1, 1, 1), to_values),
            Factors(query, out_gate, whole),
            torch.stack(totals),
            gauge,
        )
        return DynamicalSystem(
            decay, into, out_of, None, u, self._own(u), context="history", gauge=gauge
        )


def _bias_of_steps(number: int) -> Tensor:
    """softplus of it is spread evenly in its logarithm over 0.001 ... 0.1."""
    steps = torch.empty(number).uniform_(math.log(0.001), math.log(0.1)).exp()
    return steps + torch.log(-torch.expm1(-steps))
