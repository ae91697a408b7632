"""Inputs and hidden states of ``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` and their cells.

In every gate W_x x_t + b_x + W_h h_{t−1} + b_h is linear in x_t and in h_{t−1} (the new gate of a GRU multiplies the latter by its
reset gate, which belongs to S). So rows of W_x meet all x_t, rows of W_h all h_{t−1}.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from precond.optim.inputs.reading import Unreadable, argument, called_with, is_called_as, plain
from precond.optim.inputs.taps import Tap, Weight

_RUN = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}
_CUDNN = {"RNN_RELU": 0, "RNN_TANH": 1, "LSTM": 2, "GRU": 3}


class RecurrentTap(Tap):
    """All layers and directions, padded and packed sequences, with dropout between layers drawn anew."""

    @property
    def weights(self) -> list[Weight]:
        m = self.module
        out = []
        for layer in range(m.num_layers):
            for direction in range(1 + m.bidirectional):
                for kind in ("ih", "hh"):
                    end = f"{kind}_l{layer}{'_reverse' * direction}"
                    weight, bias = (getattr(m, f"{name}_{end}", None) for name in ("weight", "bias"))
                    out.append(Weight(weight, bias, slot=(kind, layer, direction)))  # type: ignore[arg-type]
        return out

    @property
    def refused(self) -> list[tuple[Tensor, str]]:
        why = "is a projection of hidden states, which its module does not show"
        return [(p, why) for name, p in self.module._parameters.items() if name.startswith("weight_hr")]

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Unrolled | None:
        m = self.module
        named = called_with(m, args, kwargs)
        if any(is_called_as(m, base) for base in (nn.RNN, nn.LSTM, nn.GRU)):
            x = named.get("input")
        else:
            x = next((v for v in named.values() if isinstance(v, PackedSequence)), None)
            x = argument(m, args, kwargs, lambda t: t.shape[-1] == m.input_size) if x is None else x
        return Unrolled.of(m, x, named.get("hx"))

    def origin(self, seen: Unrolled, weight: Weight) -> Tensor | str:
        kind, layer, _ = weight.slot
        return seen.x if kind == "ih" and layer == 0 else "hidden states"

    def rows(self, seen: Unrolled, weight: Weight) -> Tensor:
        kind, layer, direction = weight.slot
        return (seen.inputs(layer) if kind == "ih" else seen.states(layer, direction))[None].detach()


@dataclass(eq=False)
class Unrolled:
    """A call of a recurrent module, its layers run once more, one after the other, as far as they are asked for.

    Attributes:
        module: it.
        x: the inputs of all times, one after the other, (Σ sizes, in).
        sizes: how many sequences have each time.
        hx: the first hidden states, (layers·directions, batch, hidden), and of an LSTM the first cells.
    """

    module: Any
    x: Tensor
    sizes: Tensor
    hx: tuple[Tensor, ...]
    _out: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, module: Any, x: Any, hx: Any) -> Unrolled | None:
        """From the arguments of its forward."""
        first = hx if isinstance(hx, tuple) else () if hx is None else (hx,)
        if isinstance(x, PackedSequence):
            data, sizes, order = plain(x.data), x.batch_sizes, x.sorted_indices
            first = first if order is None else tuple(h.index_select(1, order) for h in first)
        else:
            whole = plain(x)
            if whole is None or whole.ndim not in (2, 3):
                return None
            if whole.ndim == 2:
                whole, first = whole[:, None], tuple(h[:, None] for h in first)
            elif module.batch_first:
                whole = whole.transpose(0, 1)
            data, sizes = whole.flatten(0, 1), torch.full((len(whole),), whole.shape[1])
        if data is None or data.shape[-1] != module.input_size:
            return None
        if not first:
            most, count = int(sizes[0]), module.num_layers * (1 + module.bidirectional)
            lengths = [module.proj_size or module.hidden_size] + [module.hidden_size] * (module.mode == "LSTM")
            first = tuple(data.new_zeros(count, most, n) for n in lengths)
        wide = module.weight_ih_l0.dtype  # under autocast inputs may be narrower, and nothing casts them here
        return cls(module, data, sizes, tuple(h.detach().to(wide) for h in first))

    def inputs(self, layer: int) -> Tensor:
        """What W_x of a layer meets."""
        if layer == 0:
            return self.x
        below, m = self.outputs(layer - 1), self.module
        if not (m.training and m.dropout):
            return below
        # The module's own masks are not known. These are as likely, and the generators are left as they were.
        with torch.random.fork_rng(devices=[below.device] if below.is_cuda else []):
            return F.dropout(below, m.dropout)

    def states(self, layer: int, direction: int) -> Tensor:
        """What W_h of a layer meets: the states before each time, the first given, the others its own."""
        out, sizes = self.outputs(layer).tensor_split(1 + self.module.bidirectional, -1)[direction], self.sizes.tolist()
        h = self.hx[0][layer * (1 + self.module.bidirectional) + direction]
        if direction == 0:
            times = out.split(sizes)
            return torch.cat([h[: sizes[0]], *(before[:n] for before, n in zip(times, sizes[1:], strict=False))])
        # From the end: where a sequence has no later time it begins.
        after = [*out.split(sizes)[1:], out[:0]]
        return torch.cat([torch.cat([later, h[len(later) : n]]) for later, n in zip(after, sizes, strict=True)])

    @torch.no_grad()
    def outputs(self, layer: int) -> Tensor:
        """What a layer puts out."""
        while len(self._out) <= layer:
            self._out.append(self._run(len(self._out)))
        return self._out[layer]

    def _run(self, layer: int) -> Tensor:
        m, both = self.module, 1 + self.module.bidirectional
        names = [n for d in range(both) for n in m._all_weights[layer * both + d]]
        weights = [getattr(m, n).detach() for n in names]
        x = self.inputs(layer).detach().to(weights[0].dtype)
        hx = [h[layer * both : (layer + 1) * both].contiguous() for h in self.hx]
        if x.is_cuda:  # cuDNN complains of weights that do not lie together
            weights = [w.clone() for w in weights]
            per_layer = len(weights) // both
            torch._cudnn_rnn_flatten_weight(
                weights, per_layer, x.shape[-1], _CUDNN[m.mode], m.hidden_size, m.proj_size, 1, False, m.bidirectional
            )
        run = getattr(torch._VF, _RUN[m.mode])
        state = hx if m.mode == "LSTM" else hx[0]
        return run(x, self.sizes, state, weights, m.bias, 1, 0.0, False, m.bidirectional)[0]


class CellTap(Tap):
    """``nn.RNNCell``, ``nn.LSTMCell``, ``nn.GRUCell``: one time, whose state is given."""

    @property
    def weights(self) -> list[Weight]:
        m = self.module
        return [Weight(m.weight_ih, m.bias_ih, slot="ih"), Weight(m.weight_hh, m.bias_hh, slot="hh")]

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        m = self.module
        named = called_with(m, args, kwargs)
        if not isinstance(named.get("input"), Tensor):
            raise Unreadable(f"is in a {type(m).__name__}, whose forward was given no input")
        x, hx = plain(named["input"]), named.get("hx")
        h = hx[0] if isinstance(hx, tuple) else hx
        if x is None or x.shape[-1] != m.input_size:
            return None
        h = x.new_zeros(*x.shape[:-1], m.hidden_size) if h is None else plain(h)
        return None if h is None else (x, h)

    def origin(self, seen: tuple[Tensor, Tensor], weight: Weight) -> Tensor | str:
        return seen[0] if weight.slot == "ih" else "hidden states"

    def rows(self, seen: tuple[Tensor, Tensor], weight: Weight) -> Tensor:
        x = seen[weight.slot == "hh"].detach()
        return x.reshape(1, -1, x.shape[-1])
