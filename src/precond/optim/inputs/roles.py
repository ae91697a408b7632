"""What a parameter is in its module, by the module's class, the parameter's name and its shape."""

from __future__ import annotations

from torch import Tensor, nn

_NORMS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def kind_of(name: str, param: Tensor, module: nn.Module | None) -> str:
    """The kind of a parameter, from its module or else from its name and shape."""
    if isinstance(module, _NORMS):
        return "norm"
    if isinstance(module, _EMBEDDINGS):
        return "embedding"
    last = name.rpartition(".")[2]
    if last.endswith("bias") or last.startswith("bias"):
        return "bias"
    if module is None and param.ndim <= 1:
        return "vector"
    if module is not None and param.ndim <= 1 and "Norm" in type(module).__name__:
        return "norm"
    return "weight"
