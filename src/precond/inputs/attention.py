"""Inputs of ``nn.MultiheadAttention``, which calls neither its projections nor ``out_proj`` as modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from precond.inputs.moments import Moments, Request, covariance, of_rows
from precond.inputs.taps import Tap, Weight
from precond.maps import Layout

_OUT = 3  # the slot of out_proj, after query, key and value
_PACKED = 4  # the slot of the three together


class AttentionTap(Tap):
    """Packed and separate projections, and ``out_proj``."""

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

    def moments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Weight, request: Request, center: Tensor | None
    ) -> Moments:
        if weight.slot != _PACKED:
            return super().moments(args, kwargs, weight, request, center)
        # Queries may be more or fewer than keys: one group each.
        parts = []
        for i, x in enumerate(self._inputs(args, kwargs)):
            own = None if center is None else center[i : i + 1]
            of = covariance if request.kind == "covariance" else of_rows
            parts.append(of(self._flat(x), own))
        joined = {name: torch.cat([getattr(p, name) for p in parts]) for name in ("count", "mean", "spread", "deviation")}
        return Moments(**joined, examples=parts[0].examples)

    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Weight) -> Tensor:
        inputs = self._inputs(args, kwargs)
        return self._flat(self._attended(args, kwargs) if weight.slot == _OUT else inputs[weight.slot])

    @staticmethod
    def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        named = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        return named["query"].detach(), named["key"].detach(), named["value"].detach()

    @staticmethod
    def _flat(x: Tensor) -> Tensor:
        return x.reshape(1, -1, x.shape[-1])

    @staticmethod
    def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A mask as what is added to the scores."""
        mask = F._canonical_mask(mask, "mask", None, "", dtype, check_other=False)
        return None if mask is None else mask.to(dtype)

    def _attended(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What ``out_proj`` will see: the attention once more, with the identity in its place and the same random numbers."""
        m = self.module
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
        call = {
            "key_padding_mask": None,
            "attn_mask": None,
            "is_causal": False,
            **dict(zip(names, args, strict=False)),
            **kwargs,
        }
        # Under autocast the inputs may be narrower than the weights, and nothing casts them here.
        wide = m.out_proj.weight.dtype
        q, k, v = (call[name].detach().to(wide) for name in names[:3])
        padding, mask = (self._additive(call[name], wide) for name in ("key_padding_mask", "attn_mask"))
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
                is_causal=call["is_causal"],
            )
        return h
