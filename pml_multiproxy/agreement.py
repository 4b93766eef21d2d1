r"""How far trainings agree: what chooses the number of proxies and the temperature where there are no fine labels.

Train twice with different seeds, and look which proxy of its class each held-out sample is nearest to. Where the
proxies found clusters that are there, both trainings split a class alike. No fine label is needed, and proxies need not
have the same order. :func:`proxy_agreement` compares losses, :func:`assignment_agreement` assignments from anywhere.

For a class whose samples are assigned to proxies :math:`U` by one training and :math:`V` by the other, the agreement is
the mutual information beyond what chance would give to clusters of these sizes, in nats:

.. math::

    A = I(U; V) - \mathbb{E}[I(U; V)]

Its mean over pairs of trainings and over classes is to be maximised. :math:`e^A` reads as a number: so many equally
large clusters of a class were found again. Independent assignments give 0 on average. One proxy per class, one that
takes all samples, and as many as there are samples always give 0: there is nothing to agree on.

It is not divided by the entropies, as adjusted mutual information is (``normalized`` in the result): where one proxy
takes all samples but a few, these few decide on the quotient, which can be as large as if a class had been split into
its true parts. The information itself is small there.

How many samples it takes. The fewer samples, the lower the agreement, and the more so the more proxies there are. With
few samples, the highest agreement therefore has too few proxies. Compare settings on the same samples only. On the
digits with two views and ten proxies, 20 held-out samples of a class give 0.65 nats where all give 1.10, and 50 led to
the same choice of settings as all (``benchmarks/agreement``). The standard deviation over pairs of seeds was 0.1 to 0.2
there: average over more than one pair where settings lie closer together.

Limits. It tells how well clusters can be found again, not whether a user wants them: a class that is one cluster to its
user may split in the same way each time. For new classes, validate on held-out classes, whose labels are there.

Sources. Choosing a clustering by its stability: Lange, Roth, Braun, Buhmann, *Stability-Based Validation of Clustering
Solutions*, Neural Computation 16(6), 2004; its pitfalls: Ben-David, von Luxburg, Pál, *A Sober Look at Clustering
Stability*, COLT 2006. The correction for chance: Vinh, Epps, Bailey, *Information Theoretic Measures for Clusterings
Comparison*, JMLR 11, 2010; computed by scikit-learn.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from . import _check as check

__all__ = ["Agreement", "assignment_agreement", "proxy_agreement"]

MIN_SAMPLES = 20
"""Ten proxies tell about half with so few samples of a class: benchmarks/agreement/results/samples.md."""


class Agreement(NamedTuple):
    """What :func:`proxy_agreement` and :func:`assignment_agreement` return; all but ``normalized`` is in nats.

    >>> result = assignment_agreement([[0, 0, 1, 1], [1, 1, 0, 0]], labels=[7, 7, 7, 7], min_samples=4)
    >>> sorted(result.per_class)
    [7]
    """

    mean: float
    """Over classes and pairs of trainings: the number to maximise."""

    per_class: dict[int, float]
    """Of each class that was not left out, mean over the pairs: the larger, the more stable clusters it holds."""

    pairs: tuple[float, ...]
    """Of each pair of trainings, in the order (0, 1), (0, 2), ..., (1, 2), ..., mean over the classes."""

    normalized: float
    """Mean adjusted mutual information: 1 where the trainings split classes alike, 0 for chance and where one splits
    nothing. It tells how much of the assignment is found again. Do not choose by it, see above."""

    left_out: tuple[int, ...]
    """The classes with fewer than ``min_samples`` samples, whose number is ``len(left_out)``."""


class _Assigns(Protocol):
    """A loss that tells which proxy of its class an embedding is nearest to."""

    def assign(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...


def proxy_agreement(
    loss_funcs: Sequence[_Assigns],
    embeddings: Sequence[Tensor | NDArray[Any]],
    labels: Tensor | NDArray[Any],
    *,
    min_samples: int = MIN_SAMPLES,
) -> Agreement:
    """How far trained losses agree on the parts of each class: :func:`assignment_agreement` of what they assign.

    The trainings should differ in their seed alone, and the samples should be held out: samples that were trained with
    are found again more easily.

    Args:
        loss_funcs: at least two, each with ``assign(embeddings, labels)``, as
            :class:`~pml_multiproxy.losses.MultiProxyEntropyLoss`.
        embeddings: one ``(N, D)`` for each loss: the same samples, in the same order, embedded by the network (in
            ``eval()`` mode) that was trained with that loss.
        labels: ``(N,)``, integers: the classes of training.
        min_samples: classes with fewer samples are left out.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape or range, embeddings that are not finite, and
            where every class is left out.

    >>> from pml_multiproxy import MultiProxyEntropyLoss
    >>> first, second = (MultiProxyEntropyLoss(num_classes=2, embedding_size=8, proxies_per_class=4) for _ in range(2))
    >>> second.proxies.data = first.proxies.data.flip(1)  # the same proxies in another order
    >>> embeddings, labels = torch.randn(400, 8), torch.arange(400) % 2
    >>> round(proxy_agreement([first, second], [embeddings, embeddings], labels).normalized, 6)
    1.0
    """
    if len(loss_funcs) != len(embeddings):
        raise ValueError(
            f"embeddings must be one tensor for each of the {len(loss_funcs)} losses, got {len(embeddings)}: each "
            "training has a network of its own"
        )
    classes = torch.as_tensor(_integers("labels", labels))
    assignments = []
    for run, (loss_func, of_run) in enumerate(zip(loss_funcs, embeddings, strict=True)):
        if not callable(getattr(loss_func, "assign", None)):
            raise TypeError(
                f"loss_funcs[{run}] must have a method assign(embeddings, labels), got {type(loss_func).__name__}: "
                "pass assignments to assignment_agreement instead"
            )
        points = torch.as_tensor(of_run)
        check.finite(f"embeddings[{run}]", points)
        assignments.append(loss_func.assign(points, classes.to(points.device))[1])
    return assignment_agreement(assignments, classes, min_samples=min_samples)


def assignment_agreement(
    assignments: Sequence[Tensor | NDArray[Any] | Sequence[int]],
    labels: Tensor | NDArray[Any] | Sequence[int],
    *,
    min_samples: int = MIN_SAMPLES,
) -> Agreement:
    """How far trainings agree on the parts of each class, from the proxy that each assigns a sample to.

    Args:
        assignments: of at least two trainings, each ``(N,)``, integers: the number of a proxy, a center, a cluster
            within the class of the sample. The order of the numbers does not matter.
        labels: ``(N,)``, integers: the classes of training.
        min_samples: classes with fewer samples are left out.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape or range, and where every class is left out.

    >>> import math
    >>> labels = torch.tensor([0, 1]).repeat_interleave(300)
    >>> first = torch.arange(600) % 3
    >>> second = torch.where(labels == 0, 2 - first, 0)  # class 0: the same three parts; class 1: a single one
    >>> result = assignment_agreement([first, second], labels)
    >>> [round(math.exp(nats), 1) for nats in result.per_class.values()]
    [3.0, 1.0]
    >>> result.left_out
    ()
    """
    min_samples = check.positive_int("min_samples", min_samples)
    classes = _integers("labels", labels)
    runs = [_integers(f"assignments[{run}]", given, len(classes)) for run, given in enumerate(assignments)]
    if len(runs) < 2:
        raise ValueError(f"assignments must be those of at least two trainings, got {len(runs)}")

    numbers, counts = np.unique(classes, return_counts=True)
    if counts.max(initial=0) < min_samples:
        raise ValueError(
            f"labels must hold a class of at least min_samples={min_samples} samples, got at most "
            f"{counts.max(initial=0)}"
        )
    by_class = np.split(np.argsort(classes, kind="stable"), counts.cumsum()[:-1])
    kept = {int(c): samples for c, samples in zip(numbers, by_class, strict=True) if len(samples) >= min_samples}

    scores = np.array(  # (classes, pairs, 2)
        [
            [_beyond_chance(first[samples], second[samples]) for first, second in combinations(runs, 2)]
            for samples in tqdm(kept.values(), desc="agreement per class", delay=2)
        ]
    )
    nats = scores[..., 0]
    return Agreement(
        mean=float(nats.mean()),
        per_class=dict(zip(kept, nats.mean(axis=1).tolist(), strict=True)),
        pairs=tuple(nats.mean(axis=0).tolist()),
        normalized=float(scores[..., 1].mean()),
        left_out=tuple(int(c) for c in numbers if int(c) not in kept),
    )


def _beyond_chance(first: NDArray[np.int64], second: NDArray[np.int64]) -> tuple[float, float]:
    """Mutual information minus that expected by chance, in nats and as a part of the most that it could be."""
    # Here, since importing them takes longer than importing this package.
    from sklearn.metrics import mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information

    contingency = contingency_matrix(first, second, sparse=True)
    by_chance = expected_mutual_information(contingency, len(first))
    nats = float(mutual_info_score(None, None, contingency=contingency) - by_chance)
    most = (_entropy(first) + _entropy(second)) / 2 - by_chance
    # scikit-learn calls two runs alike that both split nothing.
    return nats, nats / most if most > 1e-9 else 0.0


def _entropy(assignment: NDArray[np.int64]) -> float:
    shares = np.unique(assignment, return_counts=True)[1] / len(assignment)
    return float(-(shares * np.log(shares)).sum())


def _integers(name: str, value: object, count: int | None = None) -> NDArray[np.int64]:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    if array.ndim != 1 or count not in (None, len(array)):
        raise ValueError(f"{name} must be of shape ({'N' if count is None else count},), got {array.shape}")
    return array.astype(np.int64)
