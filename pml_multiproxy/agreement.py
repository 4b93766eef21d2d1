r"""Whether trainings with different seeds find the same clusters in each class.

Train twice with different seeds. For each held-out sample, find the nearest proxy of its class in both trainings. If
the proxies found real clusters, both trainings split a class alike. You need no fine labels, and the proxies may come
in any order. :func:`proxy_agreement` compares losses, :func:`assignment_agreement` assignments from any source.

Let one training assign the samples of a class to proxies :math:`U`, the other to :math:`V`. Their agreement is the
mutual information minus its expectation for random clusters of the same sizes, in nats:

.. math::

    A = I(U; V) - \mathbb{E}[I(U; V)]

Take its mean over pairs of trainings and over classes. Read :math:`e^A` as the number of equally large clusters of
a class that both trainings found. Independent assignments give 0 on average. One proxy per class, one proxy that takes
all samples, and one proxy per sample always give 0, since there is nothing to agree on.

Adjusted mutual information (``normalized`` in the result) divides by the entropies; do not compare by it. If one proxy
takes all but a few samples, these few decide the quotient, which can be as large as for a class split into its true
parts. The agreement in nats is small there.

Number of samples. Fewer samples lower the agreement, the more so with more proxies; with few samples, the highest
agreement therefore has too few proxies. Compare settings on the same samples only. On the digits with two views and ten
proxies, 20 held-out samples per class give 0.65 nats and all give 1.10; 50 led to the same choice of settings as all
(``benchmarks/agreement``). The standard deviation over pairs of seeds was 0.1 to 0.2 there, so average over more than
one pair if settings lie closer together.

Limits. The agreement measures whether clusters can be found again, not whether a user wants them: a class that a user
sees as one cluster may split the same way each time. The setting with the highest agreement retrieved no better than
the defaults (``benchmarks/retrieval``). For new classes, validate on held-out classes, whose labels you have.

Sources. Choosing a clustering by its stability: Lange, Roth, Braun, Buhmann, *Stability-Based Validation of Clustering
Solutions*, Neural Computation 16(6), 2004; its pitfalls: Ben-David, von Luxburg, Pál, *A Sober Look at Clustering
Stability*, COLT 2006. The correction for chance: Vinh, Epps, Bailey, *Information Theoretic Measures for Clusterings
Comparison*, JMLR 11, 2010; computed by scikit-learn.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import entropy
from tqdm import tqdm

from . import _check as check
from .inspection import Array, _as_tensor

__all__ = ["Agreement", "assignment_agreement", "proxy_agreement"]

MIN_SAMPLES = 20
"""With 20 samples of a class, ten proxies show about half of their agreement (benchmarks/agreement/results/samples.md).
"""


class Agreement(NamedTuple):
    """The result of :func:`proxy_agreement` and :func:`assignment_agreement`, in nats except for ``normalized``.

    >>> result = assignment_agreement([[0, 0, 1, 1], [1, 1, 0, 0]], labels=[7, 7, 7, 7], min_samples=4)
    >>> sorted(result.per_class)
    [7]
    """

    mean: float
    """Mean over classes and pairs of trainings: maximise this."""

    per_class: dict[int, float]
    """Mean over the pairs, for each class that was not left out: high if the class has many stable clusters."""

    pairs: tuple[float, ...]
    """Mean over the classes, for each pair of trainings in the order (0, 1), (0, 2), ..., (1, 2), ..."""

    normalized: float
    """Mean adjusted mutual information: 1 if the trainings split classes alike, 0 for chance and if one of them splits
    nothing. Do not choose by it, see above."""

    left_out: tuple[int, ...]
    """Classes with fewer than ``min_samples`` samples."""


def proxy_agreement(
    loss_funcs: Sequence[Any], embeddings: Sequence[Array], labels: Array, *, min_samples: int = MIN_SAMPLES
) -> Agreement:
    """How far trained losses split each class alike: :func:`assignment_agreement` of their assignments.

    Let the trainings differ in their seed only, and use held-out samples: trainings agree more on the samples they were
    trained with.

    Args:
        loss_funcs: at least two, each with ``assign(embeddings, labels)``, as
            :class:`~pml_multiproxy.losses.MultiProxyEntropyLoss` has it.
        embeddings: one ``(N, D)`` for each loss: the same samples in the same order, embedded by the network that was
            trained with that loss, in ``eval()`` mode.
        labels: ``(N,)``, integers: the classes of training.
        min_samples: classes with fewer samples are left out.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, shape or range, if embeddings are not finite, or if
            every class would be left out.

    >>> import torch
    >>> from pml_multiproxy import MultiProxyEntropyLoss
    >>> first, second = (MultiProxyEntropyLoss(num_classes=2, embedding_size=8, proxies_per_class=4) for _ in range(2))
    >>> second.proxies.data = first.proxies.data.flip(1)  # the same proxies in another order
    >>> embeddings, labels = torch.randn(400, 8), torch.arange(400) % 2
    >>> round(proxy_agreement([first, second], [embeddings, embeddings], labels).normalized, 6)
    1.0
    """
    if len(loss_funcs) != len(embeddings):
        raise ValueError(f"embeddings must be one tensor for each of {len(loss_funcs)} losses, got {len(embeddings)}")
    classes = check.integers("labels", _as_tensor(labels), len(labels))
    assignments = []
    for run, loss_func in enumerate(loss_funcs):
        if not callable(getattr(loss_func, "assign", None)):
            raise TypeError(
                f"loss_funcs[{run}] must have a method assign(embeddings, labels), got {type(loss_func).__name__}: "
                "pass assignments to assignment_agreement instead"
            )
        points = _as_tensor(embeddings[run])
        check.finite(f"embeddings[{run}]", points)
        assignments.append(loss_func.assign(points, classes.to(points.device))[1])
    return assignment_agreement(assignments, classes, min_samples=min_samples)


def assignment_agreement(
    assignments: Sequence[Array | Sequence[int]], labels: Array | Sequence[int], *, min_samples: int = MIN_SAMPLES
) -> Agreement:
    """How far trainings split each class alike, from the proxy that each training assigns a sample to.

    Args:
        assignments: of at least two trainings, each ``(N,)``, integers: the number of a proxy, center or cluster within
            the class of the sample. The order of the numbers does not matter.
        labels: ``(N,)``, integers: the classes of training.
        min_samples: classes with fewer samples are left out.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, shape or range, or if every class would be left out.

    >>> import math, torch
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
    classes = check.integers("labels", _as_tensor(labels), len(labels)).cpu().numpy()
    runs = [
        check.integers(f"assignments[{run}]", _as_tensor(given), len(labels)).cpu().numpy()
        for run, given in enumerate(assignments)
    ]
    if len(runs) < 2:
        raise ValueError(f"assignments must be those of at least two trainings, got {len(runs)}")
    numbers, counts = np.unique(classes, return_counts=True)
    by_class = np.split(np.argsort(classes), counts.cumsum()[:-1])
    kept = {int(c): samples for c, samples in zip(numbers, by_class, strict=True) if len(samples) >= min_samples}
    if not kept:
        most = counts.max(initial=0)
        raise ValueError(f"labels must hold a class of at least min_samples={min_samples} samples, got at most {most}")

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
        left_out=tuple(int(c) for c in numbers[counts < min_samples]),
    )


def _beyond_chance(first: NDArray[np.int64], second: NDArray[np.int64]) -> tuple[float, float]:
    """Mutual information minus its expectation by chance: in nats, and divided by its maximum."""
    # Imported here because they load slowly.
    from sklearn.metrics import mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information

    contingency = contingency_matrix(first, second, sparse=True)
    by_chance = expected_mutual_information(contingency, len(first))
    nats = float(mutual_info_score(None, None, contingency=contingency) - by_chance)
    entropies = [float(entropy(np.unique(assignment, return_counts=True)[1])) for assignment in (first, second)]
    maximum = sum(entropies) / 2 - by_chance
    # If neither training splits the class, 0 / 0 stands for no agreement.
    return nats, nats / maximum if maximum > 1e-9 else 0.0
