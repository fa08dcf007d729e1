"""Sentence encoders: BERT written out, so that every product and every sum is a module, and a classifier on top."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qexp.models.blocks import require_positive
from qexp.quant.layers import Add, MatMul

# Added to the scores of padding: exp(-10000) is 0 in every format, and rows of padding alone stay finite, which -inf
# would not. The number is that of BERT's own code.
MASKED = -1e4


class Embeddings(nn.Module):
    """h = LayerNorm(word(ids) + token_type(0) + position(0 .. T-1)), all tokens being of the first sentence.

    Shapes: (N, T) int64 -> (N, T, hidden).
    Errors: ValueError for more tokens than there are positions, and for ids outside of the vocabulary.

    >>> Embeddings(vocabulary=10, hidden=4, positions=8)(torch.tensor([[3, 1, 0]])).shape
    torch.Size([1, 3, 4])
    """

    def __init__(self, vocabulary: int, hidden: int, positions: int, token_types: int = 2, eps: float = 1e-12):
        super().__init__()
        self.word = nn.Embedding(vocabulary, hidden)
        self.token_type = nn.Embedding(token_types, hidden)
        self.position = nn.Embedding(positions, hidden)
        self.add_token_type = Add()
        self.add_position = Add()
        self.norm = nn.LayerNorm(hidden, eps)
        self.register_buffer("order", torch.arange(positions)[None], persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        self._require_ids(ids)
        try:
            words = self.word(ids)  # (N, T, hidden)
        except IndexError:
            found, last = f"{int(ids.min())} to {int(ids.max())}", self.word.num_embeddings - 1
            raise ValueError(f"token ids are {found}, but the vocabulary has 0 to {last}") from None
        # Both are looked up for every sample, so that quantizers see sums of equal shapes.
        token_types = self.token_type(torch.zeros_like(ids))
        positions = self.position(self.order[:, : ids.shape[1]].expand_as(ids))
        return self.norm(self.add_position(self.add_token_type(words, token_types), positions))

    def _require_ids(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"token ids must be int64 of shape (N, T), but are {ids.dtype} of {tuple(ids.shape)}")
        if ids.shape[1] > self.position.num_embeddings:
            raise ValueError(f"{ids.shape[1]} tokens are more than the {self.position.num_embeddings} positions")


class Attention(nn.Module):
    """context = softmax(Q K^T / sqrt(d) + mask) V for each head of d channels, then a linear layer (Vaswani et al.
    2017, equation 1).

    Shapes: h (N, T, hidden) and mask (N, 1, 1, T), which is 0 or very negative, to (N, T, hidden).

    >>> Attention(hidden=4, heads=2)(torch.zeros(1, 3, 4), torch.zeros(1, 1, 1, 3)).shape
    torch.Size([1, 3, 4])
    """

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (hidden // heads) ** -0.5
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.scores = MatMul()
        self.mask = Add()
        self.softmax = nn.Softmax(-1)
        self.context = MatMul()
        self.output = nn.Linear(hidden, hidden)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (self._split(project(h)) for project in (self.query, self.key, self.value))  # (N, heads, T, d)
        scores = self.scores(q, k.transpose(-1, -2)) * self.scale  # (N, heads, T, T)
        context = self.context(self.softmax(self.mask(scores, mask)), v)  # (N, heads, T, d)
        return self.output(context.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class Block(nn.Module):
    """a = LayerNorm(h + Attention(h)), y = LayerNorm(a + W2 GELU(W1 a + b1) + b2): post-norm, the exact GELU.

    Shapes: h (N, T, hidden) and mask (N, 1, 1, T) to (N, T, hidden).

    >>> Block(hidden=4, heads=2, intermediate=8)(torch.zeros(1, 3, 4), torch.zeros(1, 1, 1, 3)).shape
    torch.Size([1, 3, 4])
    """

    def __init__(self, hidden: int, heads: int, intermediate: int, eps: float = 1e-12):
        super().__init__()
        self.attention = Attention(hidden, heads)
        self.attention_add = Add()
        self.attention_norm = nn.LayerNorm(hidden, eps)
        self.intermediate = nn.Linear(hidden, intermediate)
        self.gelu = nn.GELU()
        self.output = nn.Linear(intermediate, hidden)
        self.output_add = Add()
        self.output_norm = nn.LayerNorm(hidden, eps)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        h = self.attention_norm(self.attention_add(self.attention(h, mask), h))
        return self.output_norm(self.output_add(self.output(self.gelu(self.intermediate(h))), h))


class Encoder(nn.Module):
    """The encoder of BERT (Devlin et al. 2019, arXiv 1810.04805): embeddings, then blocks.

    Id 0 is padding, which no token attends to. There is no dropout: inference needs none, and fine-tuning through
    quantizers is regularized by their noise. Shapes: (N, T) int64 -> (N, T, hidden), T up to `positions`.
    Errors: ValueError for ids that do not fit (see `Embeddings`).

    >>> Encoder(vocabulary=10, hidden=4, layers=1, heads=2, intermediate=8, positions=8)(torch.tensor([[3, 0]])).shape
    torch.Size([1, 2, 4])
    """

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        layers: int,
        heads: int,
        intermediate: int,
        positions: int,
        token_types: int = 2,
        eps: float = 1e-12,
    ):
        super().__init__()
        self.embeddings = Embeddings(vocabulary, hidden, positions, token_types, eps)
        self.layers = nn.ModuleList(Block(hidden, heads, intermediate, eps) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embeddings(ids)
        mask = ids.eq(0).to(h.dtype)[:, None, None] * MASKED  # (N, 1, 1, T)
        for layer in self.layers:
            h = layer(h, mask)
        return h


class TextClassifier(nn.Module):
    """A linear head on the mean over the tokens that are no padding: logits = W sum_t m_t h_t / max(sum_t m_t, 1) + b.

    `encoder` is any module from ids to hidden states; where `trains_head_alone`, it stays as it is and its embeddings
    are made once. Shapes: (N, T) int64 -> (N, num_classes); `embed` gives (N, hidden).

    >>> net = bert_tiny_random(num_classes=3)
    >>> net(torch.tensor([[5, 7, 0, 0], [0, 0, 0, 0]])).shape, net.embed(torch.tensor([[5, 7]])).shape
    (torch.Size([2, 3]), torch.Size([1, 32]))
    """

    def __init__(self, encoder: nn.Module, hidden: int, num_classes: int, trains_head_alone: bool):
        super().__init__()
        require_positive(num_classes=num_classes)
        if not isinstance(trains_head_alone, bool):
            raise ValueError(f"model.trains_head_alone={trains_head_alone!r}: allowed are True, False")
        self.encoder = encoder
        self.trains_head_alone = trains_head_alone
        self.head = nn.Linear(hidden, num_classes)

    def words(self, ids: Tensor) -> Tensor:
        """Which tokens are no padding, so that something depends on them: (N, T) booleans."""
        return ids.ne(0)

    def embed(self, ids: Tensor) -> Tensor:
        """The mean of the hidden states of all tokens that are no padding."""
        h = self.encoder(ids)
        words = self.words(ids).to(h.dtype)[:, :, None]  # (N, T, 1)
        return (h * words).sum(1) / words.sum(1).clamp(min=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def bert_tiny_random(
    num_classes: int = 10, width: int = 32, layers: int = 2, heads: int = 2, vocabulary: int = 2048, length: int = 128
) -> TextClassifier:
    """A small BERT with random weights, which is trained as a whole and needs no files.

    Weights are normal with a standard deviation of 0.02 and biases 0 (Devlin et al. 2019), from the global seed.
    Shapes: (N, T) int64 below `vocabulary`, T up to `length` -> (N, num_classes).
    Errors: ValueError for a size below 1, and for a width that the number of heads does not divide.

    >>> sum(p.numel() for p in bert_tiny_random().parameters())
    95498
    """
    require_positive(
        num_classes=num_classes, width=width, layers=layers, heads=heads, vocabulary=vocabulary, length=length
    )
    if width % heads:
        raise ValueError(f"model.width={width}: must be a multiple of model.heads={heads}")
    encoder = Encoder(vocabulary, width, layers, heads, 4 * width, length)
    net = TextClassifier(encoder, width, num_classes, trains_head_alone=False)
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return net
