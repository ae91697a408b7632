"""What owners want to be observed of layer inputs, told to all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from precond.algebra import collectives
from precond.optim.inputs import Request
from precond.optim.inputs.observer import Key


class Asked(NamedTuple):
    """What may be asked for, owner after owner, as all ranks know it.

    Attributes:
        keys: with the shapes of the statistics.
        first: the number of each owner's first one, and how many there are.
        sizes: of each owner the numbers of its flags, and of each mean.
    """

    keys: list[tuple[Key, tuple[int, int]]]
    first: list[int]
    sizes: list[list[int]]

    @classmethod
    def of(cls, sites: Sequence[Mapping[Key, tuple[int, int]]]) -> Asked:
        """From what each owner may ask for."""
        keys = [entry for of in sites for entry in of.items()]
        sizes = [[len(of), *(groups * n for groups, n in of.values())] for of in sites]
        return cls(keys, [0, *accumulate(map(len, sites))], sizes)

    def answered(
        self, own: Mapping[Key, Tensor | None], like: Tensor, group: dist.ProcessGroup
    ) -> list[tuple[str, Request, Tensor | None]]:
        """What is asked for by any owner, with the mean known before: a flag of each, and these means, go to all.

        Args:
            own: what this rank asks for.
        """
        rank = dist.get_rank(group)
        mine, sizes = self.keys[self.first[rank] : self.first[rank + 1]], self.sizes[rank]
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        zeros = like.new_zeros(max(sizes), dtype=dtype)
        flags = zeros.new_tensor([0 if key not in own else 1 if own[key] is None else 2 for key, _ in mine])
        means = [
            zeros[:n] if (c := own.get(key)) is None else c.to(zeros).reshape(-1)
            for (key, _), n in zip(mine, sizes[1:], strict=True)
        ]
        flat = torch.cat([flags, *means])
        every = collectives.all_gather_v(flat, list(map(sum, self.sizes)), "what is to be observed", group)
        told = [flat.split(n) for flat, n in zip(every, self.sizes, strict=True)]
        wants = torch.cat([flags for flags, *_ in told]).tolist()  # the host decides by them what hooks do
        each = zip(self.keys, wants, (c for _, *of in told for c in of), strict=True)
        return [(*key, mean.view(shape) if flag == 2 else None) for (key, shape), flag, mean in each if flag]
