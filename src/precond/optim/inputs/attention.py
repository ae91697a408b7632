"""Inputs of ``nn.MultiheadAttention``, which calls neither its projections nor ``out_proj`` as modules."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond.algebra.maps import Layout
from precond.optim.inputs.moments import Request, Rows
from precond.optim.inputs.reading import Unreadable, argument, called_with, is_called_as, plain
from precond.optim.inputs.taps import Tap, Weight

_INPUTS = ("query", "key", "value")
_OUT = 3  # the slot of out_proj, after query, key and value
_PACKED = 4  # the slot of the three together


class AttentionTap(Tap):
    """Packed and separate projections, and ``out_proj``.

    A subclass whose forward takes one sequence attends to itself. What then reaches ``out_proj`` is not known: masks may be made within.
    """

    @property
    def weights(self) -> list[Weight]:
        m = self.module
        out = Weight(m.out_proj.weight, m.out_proj.bias, slot=_OUT)
        if m._qkv_same_embed_dim:
            return [Weight(m.in_proj_weight, m.in_proj_bias, slot=_PACKED), out]
        size = m.embed_dim
        parts = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
        return [*(Weight(w, m.in_proj_bias, slice(i * size, (i + 1) * size), i) for i, w in enumerate(parts)), out]

    def layout(self, weight: Weight, request: Request) -> Layout:
        return Layout(3) if weight.slot == _PACKED else Layout()

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Called | None:
        m = self.module
        named = called_with(m, args, kwargs)
        own = not (is_called_as(m, nn.MultiheadAttention) or all(isinstance(named.get(name), Tensor) for name in _INPUTS))
        if own:
            named |= dict.fromkeys(_INPUTS, argument(m, args, kwargs, lambda t: t.shape[-1] == m.embed_dim))
        query, key, value = (plain(named.get(name)) for name in _INPUTS)
        return None if query is None or key is None or value is None else Called(m, query, key, value, named, own)

    def origin(self, seen: Called, weight: Weight) -> Tensor | str:
        return "attention" if weight.slot == _OUT else seen.inputs[0 if weight.slot == _PACKED else weight.slot]

    def rows(self, seen: Called, weight: Weight) -> Rows:
        flat = lambda x: x.detach().reshape(-1, x.shape[-1])  # noqa: E731
        if weight.slot == _PACKED:  # queries may be more or fewer than keys: one group each
            return tuple(flat(x) for x in seen.inputs)
        return flat(seen.attended if weight.slot == _OUT else seen.inputs[weight.slot])[None]


@dataclass(frozen=True, eq=False)
class Called:
    """What an attention module was called with.

    Attributes:
        module: it.
        query, key, value: its inputs.
        named: all arguments of its forward.
        own: whether that forward has other arguments than the base class's.
    """

    module: nn.MultiheadAttention
    query: Tensor
    key: Tensor
    value: Tensor
    named: dict[str, Any]
    own: bool

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @cached_property
    def attended(self) -> Tensor:
        """What ``out_proj`` will see: the attention once more, with the identity in its place and the same random numbers."""
        m = self.module
        if self.own:
            raise Unreadable(f"meets what {type(m).__name__}.forward makes of its argument, masks and all, which is not known")
        # Under autocast the inputs may be narrower than the weights, and nothing casts them here.
        wide = m.out_proj.weight.dtype
        q, k, v = (x.detach().to(wide) for x in self.inputs)
        padding, mask = (_additive(self.named.get(name), wide) for name in ("key_padding_mask", "attn_mask"))
        if m.batch_first and q.ndim == 3:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        separate = not m._qkv_same_embed_dim
        weights = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight) if separate else (None, None, None)
        with torch.no_grad(), torch.random.fork_rng(devices=[q.device] if q.device.type == "cuda" else []):
            h, _ = F.multi_head_attention_forward(
                q,
                k,
                v,
                m.embed_dim,
                m.num_heads,
                m.in_proj_weight,
                m.in_proj_bias,
                m.bias_k,
                m.bias_v,
                m.add_zero_attn,
                m.dropout,
                torch.eye(m.embed_dim, dtype=wide, device=q.device),
                None,
                training=m.training,
                key_padding_mask=padding,
                need_weights=False,
                attn_mask=mask,
                use_separate_proj_weight=separate,
                q_proj_weight=weights[0],
                k_proj_weight=weights[1],
                v_proj_weight=weights[2],
                # Where weights are wanted torch goes by the mask, in which all see what bias_k or zeros add to the keys.
                is_causal=self.named.get("is_causal", False) and not self.named.get("need_weights", True),
            )
        return h


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as what is added to the scores."""
    mask = F._canonical_mask(mask, "mask", None, "", dtype, check_other=False)
    return None if mask is None else mask.to(dtype)
