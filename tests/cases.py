"""What many tests go over: distances with their reference, and the implementations of the loss."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import reference
import torch
from pytorch_metric_learning import distances

from pml_multiproxy import _step

DISTANCES = {
    "cosine": (distances.CosineSimilarity, {}, reference.cosine),
    "cosine squared": (distances.CosineSimilarity, {"power": 2}, lambda x, w: reference.cosine(x, w) ** 2),
    "dot product": (distances.DotProductSimilarity, {"normalize_embeddings": False}, reference.dot),
    "L2": (distances.LpDistance, {}, reference.minus_lp(2)),
    "L1 squared": (distances.LpDistance, {"p": 1, "power": 2}, reference.minus_lp(1, power=2)),
    "L3, not normalized": (
        distances.LpDistance,
        {"p": 3, "normalize_embeddings": False},
        reference.minus_lp(3, normalized=False),
    ),
    "SNR": (distances.SNRDistance, {}, reference.minus_snr),
}
"""By name: the class, its arguments, and the similarity of the reference."""


def make_distance(name):
    cls, arguments, _ = DISTANCES[name]
    return cls(**arguments)


class LearnedDistance(distances.BaseDistance):
    """A Mahalanobis distance with a learned factor."""

    def __init__(self):
        super().__init__(normalize_embeddings=False)
        self.matrix = torch.nn.Parameter(
            torch.eye(6) + 0.1 * torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
        )
        self.factor = torch.nn.Parameter(torch.tensor(0.7))

    def compute_mat(self, query_emb, ref_emb):
        return self.factor * torch.cdist(query_emb @ self.matrix, ref_emb @ self.matrix).square()


@contextmanager
def computed_by(implementation):
    """All calls of the loss by ``"autograd"`` or ``"analytic"``, whatever it would choose."""
    with mock.patch.object(_step, "_implementation", return_value=implementation):
        yield


@contextmanager
def memory_full_of_nan():
    """Whoever asks for memory that is not initialised gets it full of NaN, or of the largest integer."""

    def filled(make):
        def fill(*args, **kwargs):
            with torch.no_grad():
                tensor = make(*args, **kwargs)
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
                elif tensor.dtype != torch.bool:
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return fill

    names = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
    with ExitStack() as stack:
        for owner, name in names:
            stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        yield
