"""What many tests go over: distances with their reference, and the implementations of the loss."""

from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import numpy as np
import reference
import torch
from pytorch_metric_learning import distances

from pml_multiproxy import _step


class BentCosine(distances.CosineSimilarity):
    """A subclass of the cosine that computes something else."""

    def compute_mat(self, query_emb, ref_emb):
        return super().compute_mat(query_emb, ref_emb) + 0.1 * query_emb.square() @ ref_emb.T


def bent_cosine(x, w):
    x, w = reference.unit(x), reference.unit(w)
    return reference.dot(x + 0.1 * x.square(), w)


RAW = {"normalize_embeddings": False}
DISTANCES = {
    "cosine": (distances.CosineSimilarity, {}, reference.cosine),
    "L1 cosine cubed": (distances.CosineSimilarity, {"p": 1, "power": 3}, partial(reference.cosine, p=1, power=3)),
    "bent cosine": (BentCosine, {}, bent_cosine),
    "dot product": (distances.DotProductSimilarity, RAW, reference.dot),
    "L2": (distances.LpDistance, {}, reference.minus_lp(2)),
    "L1 squared": (distances.LpDistance, {"p": 1, "power": 2}, reference.minus_lp(1, power=2)),
    "L3, raw": (distances.LpDistance, {"p": 3, **RAW}, reference.minus_lp(3, normalized=False)),
    "L2 squared, raw": (distances.LpDistance, {"power": 2, **RAW}, reference.minus_lp(2, 2, normalized=False)),
    "SNR": (distances.SNRDistance, {}, reference.minus_snr),
}
"""By name: the class, its arguments, and the similarity of the reference."""


ARRAYS = {
    "reversed": lambda array: array[::-1].copy()[::-1],
    "read-only": lambda array: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
    "big-endian": lambda array: array.astype(array.dtype.newbyteorder(">")),
}
"""By name: an array of the same values that torch does not take as it is."""


def make_distance(name):
    cls, arguments, _ = DISTANCES[name]
    return cls(**arguments)


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
