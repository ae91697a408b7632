"""The table of layers, continued: recurrent and bilinear layers, weights (in, out), grouped experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import precond
from inputs.layers import Case, data
from inputs.recurrences import recurrent
from inputs.unfolded import Rows


def _recurrent(
    kind: type[nn.RNNBase], name: str, frozen: Sequence[str] = (), lengths=(5, 5, 5), packed=False, batch=True, given=False, **options
) -> Case:  # fmt: skip
    """Sequences of some lengths: padded, packed or one without a batch."""
    options = {"batch_first": False, **options}
    sequences = [data(n, 3, seed=k) for k, n in enumerate(lengths)]
    whole = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=options["batch_first"])
    x: Any = sequences[0] if not batch else whole
    if packed:
        x = pack_padded_sequence(whole, torch.tensor(lengths), options["batch_first"], enforce_sorted=False)

    def hx(m: nn.RNNBase) -> tuple[Tensor, ...] | None:
        count = m.num_layers * (1 + m.bidirectional)
        sizes = [m.proj_size or m.hidden_size, m.hidden_size][: 1 + (m.mode == "LSTM")]
        return tuple(data(count, len(lengths), n, seed=9) / 10 for n in sizes) if given else None

    def forward(m: nn.RNNBase) -> Tensor:
        h = hx(m)
        if h is not None:
            h = tuple(t if batch else t[:, 0] for t in h)
            h = h if m.mode == "LSTM" else h[0]
        out = m(x, h)[0]
        return out.data if packed else out

    def rows(m: nn.RNNBase) -> list[Rows]:
        outputs, found = recurrent(m, sequences, hx(m))
        out = m(x, *([] if not given else [_of(m, hx(m), batch)]))[0]
        if packed:
            out, _ = nn.utils.rnn.pad_packed_sequence(out, options["batch_first"])
        expected = torch.nn.utils.rnn.pad_sequence(outputs, batch_first=options["batch_first"])
        torch.testing.assert_close(out, expected if batch else outputs[0], rtol=1e-10, atol=1e-12)
        return found

    if kind is nn.LSTM and options.get("proj_size"):
        frozen = (*frozen, *(f"weight_hr_l{k}" for k in range(options.get("num_layers", 1))))  # it keeps its gradient
    return Case(f"{kind.__name__} {name}", lambda: kind(3, 4, **options), forward, rows, frozen, "recurrent")


def _of(m: nn.RNNBase, h: tuple[Tensor, ...], batch: bool) -> Any:
    h = tuple(t if batch else t[:, 0] for t in h)
    return h if m.mode == "LSTM" else h[0]


_STACKED = {"num_layers": 2, "bidirectional": True}
_UNEVEN = {"lengths": (3, 6, 1), "packed": True}
RECURRENT = [
    *(_recurrent(kind, "plain") for kind in (nn.RNN, nn.GRU, nn.LSTM)),
    *(_recurrent(kind, "two layers, both directions", **_STACKED) for kind in (nn.RNN, nn.GRU, nn.LSTM)),
    *(_recurrent(kind, "packed, two layers, both directions", given=True, **_STACKED, **_UNEVEN) for kind in (nn.GRU, nn.LSTM)),
    _recurrent(nn.RNN, "relu", nonlinearity="relu", num_layers=2),
    _recurrent(nn.LSTM, "batch first, first states", batch_first=True, given=True),
    _recurrent(nn.GRU, "without batch", batch=False, lengths=(6,), given=True, bidirectional=True),
    _recurrent(nn.LSTM, "no bias", bias=False, num_layers=2),
    _recurrent(nn.LSTM, "projection", proj_size=2, num_layers=2, given=True),
    _recurrent(nn.GRU, "packed, batch first", batch_first=True, **_UNEVEN),
    _recurrent(nn.GRU, "frozen states", frozen=["weight_hh_l0"]),
    _recurrent(nn.LSTM, "frozen biases", frozen=["bias_ih_l0", "bias_hh_l0"]),
]


def _cell(kind: type[nn.RNNCellBase], name: str, given: bool) -> Case:
    x, h = data(7, 3), data(7, 4, seed=1) / 10
    hx = None if not given else (h, h) if kind is nn.LSTMCell else h

    def rows(m: nn.RNNCellBase) -> list[Rows]:
        index = lambda W: torch.arange(W.numel()).reshape(W.shape)  # noqa: E731
        states = h if given else torch.zeros_like(h)
        met = ((m.weight_ih, m.bias_ih, x), (m.weight_hh, m.bias_hh, states))
        return [Rows(W, index(W), b, torch.arange(len(W)), rows) for W, b, rows in met]

    def forward(m: nn.RNNCellBase) -> Tensor:
        out = m(x, hx)
        return out[0] if isinstance(out, tuple) else out

    frozen = () if given else ("weight_hh",)  # what is always zero has no scale
    return Case(f"{kind.__name__} {name}", lambda: kind(3, 4), forward, rows, frozen, "recurrent")


CELLS = [
    *(_cell(kind, "given", True) for kind in (nn.RNNCell, nn.GRUCell, nn.LSTMCell)),
    _cell(nn.GRUCell, "first", False),
]


def _bilinear(name: str, *lead: int, **options: Any) -> Case:
    a, b = data(*lead, 2), data(*lead, 3, seed=1)

    def rows(m: nn.Bilinear) -> list[Rows]:
        index = torch.arange(m.weight.numel()).reshape(len(m.weight), -1)
        products = torch.stack([torch.outer(u, v).flatten() for u, v in zip(a.reshape(-1, 2), b.reshape(-1, 3), strict=True)])
        return [Rows(m.weight, index, m.bias, torch.arange(len(m.weight)), products)]

    return Case(f"Bilinear {name}", lambda: nn.Bilinear(2, 3, 4, **options), lambda m: m(a, b).reshape(-1, 4), rows)


BILINEAR = [_bilinear("plain", 9), _bilinear("leading dimensions, no bias", 3, 4, bias=False)]


class Conv1D(nn.Module):
    """The layer of GPT-2, as Hugging Face has it: known by its name and its ``nf``."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / 3), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def _conv1d(name: str, *shape: int, frozen: Sequence[str] = ()) -> Case:
    x = data(*shape)

    def rows(m: Conv1D) -> list[Rows]:
        index = torch.arange(m.weight.numel()).reshape(m.weight.shape).T
        return [Rows(m.weight, index, m.bias, torch.arange(m.nf), x.reshape(-1, m.nx))]

    return Case(f"Conv1D {name}", lambda: Conv1D(3, shape[-1]), lambda m: m(x), rows, frozen)


CONV1D = [_conv1d("plain", 7, 4), _conv1d("sequences", 2, 5, 3), _conv1d("frozen bias", 7, 4, frozen=["bias"])]


class Experts(nn.Module):
    """A stack of linear layers, of which each sees its own rows of x, which come in their order."""

    def __init__(self, transposed: bool, bias: bool):
        super().__init__()
        self.W = nn.Parameter(torch.randn(3, 4, 2) if transposed else torch.randn(3, 2, 4))
        self.b = nn.Parameter(torch.randn(3, 2)) if bias else None

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        found = []
        for e, rows in enumerate(x.split(counts.tolist())):
            W = self.W[e] if self.W.shape[1] == 4 else self.W[e].T
            found.append(rows @ W + (0 if self.b is None else self.b[e]))
        return torch.cat(found)


class ExpertsFirst(Experts):
    """The same with weights (E, in, out)."""


for kind, axes in ((Experts, "eoi"), (ExpertsFirst, "eio")):
    inputs = lambda layer, x, counts: precond.routed(x, counts=counts)  # noqa: E731
    precond.register_layer(kind, precond.Observed("W", "b", axes, inputs))


def _experts(name: str, counts: Sequence[int], transposed: bool = False, bias: bool = True) -> Case:
    x, sizes = data(sum(counts), 4), torch.tensor(counts)

    def rows(m: Experts) -> list[Rows]:
        index = torch.arange(m.W.numel()).reshape(m.W.shape)
        index = index.mT if transposed else index
        parts = enumerate(x.split(list(counts)))
        return [Rows(m.W, index[e], m.b, torch.arange(2 * e, 2 * e + 2), part) for e, part in parts]

    make = lambda: (ExpertsFirst if transposed else Experts)(transposed, bias)  # noqa: E731
    return Case(f"Experts {name}", make, lambda m: m(x, sizes), rows, (), "experts")


EXPERTS = [
    _experts("(E, out, in)", (6, 7, 9)),
    _experts("(E, in, out)", (6, 7, 9), transposed=True),
    _experts("no bias", (6, 7, 9), bias=False),
    _experts("one that sees nothing", (6, 0, 9)),
    _experts("one that sees one row", (6, 1, 9)),
]

KINDS = [*RECURRENT, *CELLS, *BILINEAR, *CONV1D, *EXPERTS]
