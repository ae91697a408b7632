"""Models of sequences of the sixth set: a transformer with norms behind, dilated convolutions, an LSTM that attends to another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class PostNormGPT(nn.Module):
    """PyTorch's own layers with norms behind (Vaswani et al., 2017), next signs by the embedding's own vectors: (N, T) ↦ (N, signs, T)."""

    def __init__(self, signs: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(signs, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(width, signs)
        self.head.weight = self.embedding.weight
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        later = torch.ones(n, n, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.embedding(tokens) + self.positions.weight[:n]
        for layer in self.layers:
            x = layer(x, src_mask=later)
        return self.head(x).transpose(1, 2)


class DilatedBlock(nn.Module):
    """x ↦ ReLU(x + two causal convolutions of reach 2d, each with a weight norm and ReLU) (Bai et al., 2018)."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.conv1, self.conv2 = (weight_norm(self._conv(channels, dilation)) for _ in range(2))

    @staticmethod
    def _conv(channels: int, dilation: int) -> nn.Conv1d:
        conv = nn.Conv1d(channels, channels, 3, dilation=dilation)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        return conv

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv in (self.conv1, self.conv2):
            y = F.relu(conv(F.pad(y, (2 * self.dilation, 0))))
        return F.relu(x + y)


class DilatedLM(nn.Module):
    """Next signs by convolutions that look back twice as far in each block, (N, T) ↦ (N, signs, T)."""

    def __init__(self, signs: int, width: int, blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(signs, width)
        self.blocks = nn.Sequential(*(DilatedBlock(width, 2**i) for i in range(blocks)))
        self.head = nn.Linear(width, signs)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.embedding(tokens).transpose(1, 2))
        return self.head(x.transpose(1, 2)).transpose(1, 2)


class AttentiveLSTM(nn.Module):
    """An LSTM reads in both directions, another writes and attends to it (Luong et al., 2015): (N, S + T) ↦ (N, signs, T).

    Args:
        read, written: signs of the source and of the target; one more starts it.
        source: S.
        embedding, width: of the signs' vectors, and of the LSTM that writes, of which each direction of the other has half.
    """

    def __init__(self, read: int, written: int, source: int, embedding: int, width: int) -> None:
        super().__init__()
        self.source = source
        self.read, self.written = nn.Embedding(read, embedding), nn.Embedding(written + 1, embedding)
        self.encoder = nn.LSTM(embedding, width // 2, batch_first=True, bidirectional=True)
        self.decoder = nn.LSTM(embedding, width, batch_first=True)
        self.score, self.combine = nn.Linear(width, width, bias=False), nn.Linear(2 * width, width, bias=False)
        self.head = nn.Linear(width, written)

    def forward(self, signs: Tensor) -> Tensor:
        memory, (h, c) = self.encoder(self.read(signs[:, : self.source]))
        state = tuple(torch.cat([both[0], both[1]], 1)[None] for both in (h, c))
        x, _ = self.decoder(self.written(signs[:, self.source :]), state)
        weights = (x @ self.score(memory).transpose(1, 2)).softmax(2)
        return self.head(self.combine(torch.cat([weights @ memory, x], 2)).tanh()).transpose(1, 2)
