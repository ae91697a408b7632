"""The table of layers: every kind and option, with a call of it and what its rows see in that call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inputs import unfolded
from inputs.unfolded import Rows


@dataclass
class Case:
    """A layer.

    Attributes:
        make: builds it.
        call: one training forward, the same each time.
        rows: what its rows see in that forward.
        frozen: names of parameters that are not trained.
    """

    name: str
    make: Callable[[], nn.Module]
    call: Callable[[nn.Module], Tensor]
    rows: Callable[[nn.Module], list[Rows]]
    frozen: Sequence[str] = ()
    kind: str = field(default="linear")

    def build(self) -> nn.Module:
        torch.manual_seed(5)
        module = self.make().double()
        for name, p in module.named_parameters():
            p.requires_grad_(name not in self.frozen)
        return module

    def __repr__(self) -> str:
        return self.name


def data(*shape: int, seed: int = 0) -> Tensor:
    """Badly scaled inputs that are not centered, the features (second or last dimension) unlike each other."""
    make = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, shape[-1], dtype=torch.float64)
    x = torch.randn(shape, generator=make, dtype=torch.float64) * scales + 2
    return (
        x * torch.linspace(0.5, 2, shape[1], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 2)) if len(shape) > 1 else x
    )


def _linear(name: str, *shape: int, frozen: Sequence[str] = (), keyword: bool = False, **options: Any) -> Case:
    x = data(*shape)
    return Case(
        f"Linear {name}",
        lambda: nn.Linear(shape[-1], 3, **options),
        lambda m: m(input=x) if keyword else m(x),
        lambda m: unfolded.linear(m, x),
        frozen,
    )


LINEAR = [
    _linear("plain", 6, 4),
    _linear("one sample's dimension", 4),
    _linear("leading dimensions", 2, 3, 2, 4),
    _linear("no bias", 6, 4, bias=False),
    _linear("frozen bias", 6, 4, frozen=["bias"]),
    _linear("frozen weight", 6, 4, frozen=["weight"]),
    _linear("by keyword", 6, 4, keyword=True),
]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_SIZES = {1: (7,), 2: (4, 5), 3: (3, 4, 3)}


def _convolution(
    table: dict, dims: int, name: str, frozen: Sequence[str] = (), batch: bool = True, call: dict[str, Any] | None = None,
    **options: Any,
) -> Case:  # fmt: skip
    x = data(*((2,) if batch else ()), 4, *_SIZES[dims])
    kind = table[dims]
    forward = lambda m: m(x, **(call or {}))  # noqa: E731
    sizes = lambda m: forward(m).shape[-dims:]  # noqa: E731
    return Case(
        f"{kind.__name__} {name}",
        lambda: kind(4, 6, **{"kernel_size": 2, **options}),
        forward,
        lambda m: unfolded.convolution(m, x, sizes(m)),
        frozen,
        "conv",
    )


_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("plain", {}),
    ("no bias", {"bias": False}),
    ("frozen bias", {"frozen": ["bias"]}),
    ("frozen weight", {"frozen": ["weight"]}),
    ("groups", {"groups": 2}),
    ("depthwise, no bias", {"groups": 2, "bias": False, "stride": 2}),
    ("stride", {"stride": 2, "padding": 1}),
    ("dilation", {"dilation": 2, "padding": 1}),
    ("everything", {"groups": 2, "stride": 2, "dilation": 2, "padding": 1}),
    ("without batch", {"batch": False, "padding": 1}),
]
_SAME = [
    (f"same, {mode}", {"padding": "same", "padding_mode": mode, "kernel_size": 3, "dilation": dilation})
    for mode, dilation in (("zeros", 2), ("reflect", 1), ("replicate", 2), ("circular", 1))
]
_MODES = [
    (mode, {"padding": 1, "padding_mode": mode, "stride": 2, "groups": 2}) for mode in ("reflect", "replicate", "circular")
]
_PADDED = [
    *_SAME,
    ("same, even kernel", {"padding": "same"}),
    ("valid", {"padding": "valid", "stride": 2}),
    *_MODES,
]
_TURNED = [("output padding", {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2})]
CONV = [
    *(_convolution(_CONV, d, name, **options) for d in (1, 2, 3) for name, options in [*_OPTIONS, *_PADDED]),
    *(_convolution(_TRANSPOSED, d, name, **options) for d in (1, 2, 3) for name, options in [*_OPTIONS, *_TURNED]),
    _convolution(_CONV, 2, "uneven", kernel_size=(3, 2), stride=(1, 2), padding=(2, 0), dilation=(1, 3)),
    _convolution(_TRANSPOSED, 2, "output size", stride=2, call={"output_size": (9, 11)}),
]


def _attention(
    name: str, frozen: Sequence[str] = (), lengths=(4, 4), batch: bool = True, call: dict | None = None, **options
) -> Case:
    first, (L, S) = options.get("batch_first", False), lengths
    size, key, value = 4, options.get("kdim") or 4, options.get("vdim") or 4
    shape = lambda n, d: (2, n, d) if batch and first else (n, 2, d) if batch else (n, d)  # noqa: E731
    q, k, v = data(*shape(L, size)), data(*shape(S, key), seed=1), data(*shape(S, value), seed=2)
    call = {"need_weights": False, **(call or {})}

    def forward(m: nn.Module) -> Tensor:
        torch.manual_seed(7)  # dropout
        return m(q, k, v, **call)[0]

    def rows(m: nn.MultiheadAttention) -> list[Rows]:
        # The output is linear in out_proj's weight: its derivative lists what out_proj sees, dropout included.
        weight = m.out_proj.weight.detach()
        first_unit = lambda W: torch.func.functional_call(_Call(m, forward), {"m.out_proj.weight": W})[..., 0]  # noqa: E731
        seen = torch.autograd.functional.jacobian(first_unit, weight)[..., 0, :]
        return unfolded.attention(m, q, k, v, seen)

    return Case(
        f"MultiheadAttention {name}", lambda: nn.MultiheadAttention(size, 2, **options), forward, rows, frozen, "attention"
    )


class _Call(nn.Module):
    def __init__(self, m: nn.Module, call: Callable[[nn.Module], Tensor]):
        super().__init__()
        self.m, self.call = m, call

    def forward(self) -> Tensor:
        return self.call(self.m)


_causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
_padding = torch.tensor([[False, False, True, True], [False, False, False, True]])
_separate = {"kdim": 3, "vdim": 5}
ATTENTION = [
    _attention("packed"),
    _attention("separate", **_separate),
    _attention("kdim alone", kdim=3),
    _attention("batch first", batch_first=True),
    _attention("separate, batch first", batch_first=True, **_separate),
    _attention("without batch", batch=False),
    _attention("no bias", bias=False),
    _attention("separate, no bias", bias=False, **_separate),
    _attention("frozen biases", frozen=["in_proj_bias", "out_proj.bias"]),
    _attention("frozen weights", frozen=["in_proj_weight"]),
    _attention("separate, one frozen", frozen=["k_proj_weight"], **_separate),
    _attention("separate, frozen bias", frozen=["in_proj_bias"], **_separate),
    _attention("cross", lengths=(3, 5)),
    _attention("cross, separate, batch first", lengths=(3, 5), batch_first=True, **_separate),
    _attention("mask", call={"attn_mask": _causal}),
    _attention("float mask", call={"attn_mask": torch.zeros(4, 4).double().masked_fill(_causal, -3.0)}),
    _attention("mask per head", call={"attn_mask": _causal.expand(4, 4, 4)}),
    _attention("causal", call={"attn_mask": _causal, "is_causal": True}),
    _attention("padding", call={"key_padding_mask": _padding}, batch_first=True),
    _attention("mask and padding", call={"key_padding_mask": _padding, "attn_mask": _causal}),
    _attention("dropout", dropout=0.5),
    _attention("dropout, weights wanted", dropout=0.5, call={"need_weights": True}),
    _attention("weights wanted, mask", call={"need_weights": True, "attn_mask": _causal, "average_attn_weights": False}),
    _attention("extra key and value", add_bias_kv=True),
    _attention("extra zero", add_zero_attn=True, call={"key_padding_mask": _padding}),
    *(
        _attention(
            f"{name}, causal, weights {how}", **extra, call={"attn_mask": _causal, "is_causal": True, "need_weights": wanted}
        )
        for name, extra in (("extra key", {"add_bias_kv": True}), ("extra zero", {"add_zero_attn": True}))
        for how, wanted in (("wanted", True), ("not wanted", False))
    ),
]

CASES = [*LINEAR, *CONV, *ATTENTION]
