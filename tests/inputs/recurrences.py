"""Recurrent modules by loops over sequences, layers and times: what W_x and W_h meet, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from inputs.unfolded import Rows


@dataclass
class Weights:
    """Of one layer in one direction, with what they met."""

    W: Tensor
    U: Tensor
    b: Tensor | None
    c: Tensor | None
    P: Tensor | None = None
    x: list[Tensor] = field(default_factory=list)
    h: list[Tensor] = field(default_factory=list)

    def step(self, mode: str, x: Tensor, h: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """(h, c) of the next time."""
        self.x.append(x)
        self.h.append(h)
        a = self.W @ x + (0 if self.b is None else self.b)
        d = self.U @ h + (0 if self.c is None else self.c)
        match mode:
            case "RNN_TANH":
                return torch.tanh(a + d), cell
            case "RNN_RELU":
                return torch.relu(a + d), cell
            case "GRU":
                (ar, az, an), (dr, dz, dn) = a.chunk(3), d.chunk(3)
                r, z = torch.sigmoid(ar + dr), torch.sigmoid(az + dz)
                return (1 - z) * torch.tanh(an + r * dn) + z * h, cell
        i, f, g, o = (a + d).chunk(4)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(cell)
        return (h if self.P is None else self.P @ h), cell

    @property
    def rows(self) -> list[Rows]:
        found = []
        for weight, bias, met in ((self.W, self.b, self.x), (self.U, self.c, self.h)):
            index = torch.arange(weight.numel()).reshape(weight.shape)
            found.append(Rows(weight, index, bias, torch.arange(len(weight)), torch.stack(met).detach()))
        return found


def recurrent(m: nn.RNNBase, sequences: Sequence[Tensor], hx: tuple[Tensor, ...] | None) -> tuple[list[Tensor], list[Rows]]:
    """The outputs of each sequence (T, n), and what every weight meets; hx: (layers·directions, sequences, …)."""
    both, rows = 1 + m.bidirectional, []
    for layer in range(m.num_layers):
        directions = []
        for d in range(both):
            get = lambda name, layer=layer, d=d: getattr(m, f"{name}_l{layer}{'_reverse' * d}", None)  # noqa: E731
            directions.append(Weights(get("weight_ih"), get("weight_hh"), get("bias_ih"), get("bias_hh"), get("weight_hr")))
        outputs = []
        for k, sequence in enumerate(sequences):
            parts = []
            for d, weights in enumerate(directions):
                at = layer * both + d
                h = torch.zeros(m.proj_size or m.hidden_size).to(sequence) if hx is None else hx[0][at, k]
                cell = torch.zeros(m.hidden_size).to(sequence) if hx is None or len(hx) < 2 else hx[1][at, k]
                out = []
                for x in sequence.flip(0) if d else sequence:
                    h, cell = weights.step(m.mode, x, h, cell)
                    out.append(h)
                parts.append(torch.stack(out[::-1] if d else out))
            outputs.append(torch.cat(parts, -1))
        sequences = outputs
        rows += [part for weights in directions for part in weights.rows]
    return list(sequences), rows
