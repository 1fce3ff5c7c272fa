"""The small network on top of the encoder: a vector in, a score per length bucket out."""

import torch
from torch import nn

HIDDEN = 128


class LengthHead(nn.Module):
    """Standardises with the training set's statistics, then one hidden layer."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, dimension: int, num_buckets: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("std", torch.ones(dimension))
        self.layers = nn.Sequential(
            nn.Linear(dimension, HIDDEN), nn.GELU(), nn.Dropout(0.1), nn.Linear(HIDDEN, num_buckets)
        )

    def standardise(self, embeddings: torch.Tensor) -> None:
        """Take mean and spread from the training set: [requests, dimension]."""
        self.mean.copy_(embeddings.mean(0))
        self.std.copy_(embeddings.std(0).clamp_min(1e-6))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[n, dimension] -> [n, buckets], logits."""
        return torch.as_tensor(self.layers((embeddings - self.mean) / self.std))


def length_loss(logits: torch.Tensor, buckets: torch.Tensor, is_cut: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood.

    buckets: [n], the bucket that each output ended in. is_cut: [n], whether ``max_tokens`` ended it there: then all
    that is known is that it would have ended in this bucket or a later one, so their probabilities count together.
    """
    log_p = torch.log_softmax(logits, -1)
    exact = log_p.gather(1, buckets[:, None]).squeeze(1)
    index = torch.arange(logits.shape[1])
    at_least = torch.logsumexp(log_p.masked_fill(index < buckets[:, None], -torch.inf), -1)
    return -torch.where(is_cut, at_least, exact).mean()
