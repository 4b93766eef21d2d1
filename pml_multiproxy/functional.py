r"""The equations of the multi-proxy entropy loss, as pure functions on tensors.

Nothing here knows of PyTorch Metric Learning. The symbols are those of the page *Method* (``docs/method.md``):

=====================  ===============================================================================
:math:`B, D`           batch size, embedding size
:math:`C, K`           number of classes, proxies per class
:math:`x_i, y_i`       embedding and label of sample :math:`i`
:math:`w_{ck}`         proxy :math:`k` of class :math:`c`
:math:`s(x, w)`        similarity: larger is nearer; the negated value of a distance
:math:`\sigma, \tau`   ``scale`` of the logits, ``temperature`` of the assignment to proxies
=====================  ===============================================================================

Entropies are in nats. The functions compute in the dtype that they are given; :func:`compute_dtype` says which one the
loss gives them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_USAGE = 1e-6
"""The usage of a proxy is taken to be at least this much, so that its logarithm stays finite."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest dtype among the tensors, and at least ``float32``.

    >>> compute_dtype(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float16))
    torch.float32
    >>> compute_dtype(torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.float64))
    torch.float64
    """
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def norm_eps(dtype: torch.dtype) -> float:
    """The smallest norm that :func:`normalize` divides a vector of this dtype by.

    It is the one of :func:`torch.nn.functional.normalize`, 1e-12, except for ``float16``: that dtype can hold neither
    1e-12 nor the gradient of so short a vector.

    >>> norm_eps(torch.float32), norm_eps(torch.float16)
    (1e-12, 0.0009765625)
    """
    return 2.0**-10 if dtype == torch.float16 else 1e-12


def keep_short(vectors: Tensor, source: torch.dtype) -> Tensor:
    """Vectors that were cast from the dtype ``source``, changed so that :func:`normalize` treats them as before.

    Only vectors shorter than :func:`norm_eps` of ``source`` change: they become shorter than that of their new dtype.

    >>> half = torch.tensor([[2.0**-12, 0.0]], dtype=torch.float16)
    >>> normalize(half), normalize(half.float()), normalize(keep_short(half.float(), half.dtype))
    (tensor([[0.2500, 0.0000]]), tensor([[1., 0.]]), tensor([[0.2500, 0.0000]]))
    """
    before, now = norm_eps(source), norm_eps(vectors.dtype)
    if before == now:
        return vectors
    is_short = torch.linalg.vector_norm(vectors.detach(), dim=-1, keepdim=True) < before
    return torch.where(is_short, vectors * (now / before), vectors)


def normalize(vectors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    r"""Scales each row to unit :math:`L_2` norm, with finite values and gradients for every finite input.

    .. math:: \hat x = x \,/\, \max(\lVert x \rVert_2, \epsilon)

    :math:`\epsilon` is :func:`norm_eps` of the dtype of the vectors.

    Args:
        vectors: ``(N, D)``, floating point.
        dtype: to compute in; default: :func:`compute_dtype` of the vectors.

    Returns:
        ``(N, D)``, of that dtype.

    >>> normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e30, 4e30]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000],
            [0.6000, 0.8000]])
    """
    eps = norm_eps(vectors.dtype)
    vectors = vectors.to(dtype or compute_dtype(vectors))
    # The squares of a long row would overflow. Dividing it first changes neither the result nor, as the direction does
    # not depend on the length, the gradient: so the divisor needs none.
    scaled = vectors / vectors.detach().abs().amax(dim=1, keepdim=True).clamp_min(1)
    length: Tensor = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / length.clamp_min(eps)


def assignment(own_similarities: Tensor, temperature: float) -> Tensor:
    r"""How a sample is distributed over the proxies of its own class.

    .. math:: q_i(k) = \operatorname{softmax}_k\!\big(s(x_i, w_{y_i,k}) / \tau\big)

    Args:
        own_similarities: ``(B, K)``, the similarities to the proxies of each sample's class.
        temperature: :math:`\tau`, in units of the similarity.

    Returns:
        ``(B, K)``, rows sum to 1.

    >>> assignment(torch.tensor([[0.5, 0.5]]), temperature=0.1)
    tensor([[0.5000, 0.5000]])
    """
    return F.softmax(own_similarities / temperature, dim=-1)


def pool_max(similarities: Tensor, scale: float, temperature: float) -> Tensor:
    r"""Class similarity by the nearest proxy: :math:`z_i(c) = \max_k s(x_i, w_{ck})`.

    Similarities that are equal to the last bit share the gradient.

    Args:
        similarities: ``(B, C, K)``.
        scale: not used; there so that the poolings are exchangeable.
        temperature: not used.

    Returns:
        ``(B, C)``.

    >>> pool_max(torch.tensor([[[0.1, 0.7], [0.2, 0.3]]]), scale=10.0, temperature=0.1)
    tensor([[0.7000, 0.3000]])
    """
    return similarities.amax(dim=-1)


def pool_softmax(similarities: Tensor, scale: float, temperature: float) -> Tensor:
    r"""Class similarity by the softmax-weighted mean of its proxies, as in SoftTriple.

    .. math:: z_i(c) = \sum_k \operatorname{softmax}_k\!\big(s(x_i, w_{ck}) / \tau\big)\, s(x_i, w_{ck})

    Args:
        similarities: ``(B, C, K)``.
        scale: not used; there so that the poolings are exchangeable.
        temperature: :math:`\tau`, in units of the similarity.

    Returns:
        ``(B, C)``.

    >>> pool_softmax(torch.tensor([[[0.4, 0.4], [0.0, 1.0]]]), scale=10.0, temperature=0.1)
    tensor([[0.4000, 1.0000]])
    """
    largest, below = _relative_to_largest(similarities)
    return largest + (F.softmax(below / temperature, dim=-1) * below).sum(dim=-1)


def pool_logsumexp(similarities: Tensor, scale: float, temperature: float) -> Tensor:
    r"""Class similarity by a soft maximum: with it, the class distribution is the softmax over *all* proxies, summed by
    class.

    .. math:: z_i(c) = \tfrac{1}{\sigma} \log \sum_k \exp\!\big(\sigma\, s(x_i, w_{ck})\big)

    Args:
        similarities: ``(B, C, K)``.
        scale: :math:`\sigma`, in units of 1 / similarity.
        temperature: not used; there so that the poolings are exchangeable.

    Returns:
        ``(B, C)``.

    >>> pool_logsumexp(torch.zeros(1, 1, 2), scale=1.0, temperature=0.1)  # log 2
    tensor([[0.6931]])
    """
    largest, below = _relative_to_largest(similarities)
    return largest + torch.logsumexp(scale * below, dim=-1) / scale


def _relative_to_largest(similarities: Tensor) -> tuple[Tensor, Tensor]:
    """The largest similarity, ``(B, C)``, and all relative to it: large numbers would lose digits when scaled."""
    # Detached: a number that is subtracted here and added later leaves the gradient as it is.
    largest = similarities.detach().amax(dim=-1)
    return largest, similarities - largest.unsqueeze(-1)


def classification_loss(class_similarities: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    r"""Cross-entropy of the target class, which has to win by a margin.

    .. math:: \mathrm{CE}_i = -\log \operatorname{softmax}_c\!\big(\sigma\,(z_i(c) - m\,1[c = y_i])\big)_{y_i}

    Args:
        class_similarities: ``(B, C)``.
        labels: ``(B,)``, long, in ``[0, C)``.
        scale: :math:`\sigma`, in units of 1 / similarity.
        margin: :math:`m`, in units of the similarity.

    Returns:
        ``(B,)``, in nats.

    >>> classification_loss(torch.zeros(1, 2), torch.tensor([0]), scale=10.0, margin=0.0)  # log 2
    tensor([0.6931])
    """
    own = labels.unsqueeze(1)
    with_margin = class_similarities.scatter_add(1, own, torch.full_like(own, -margin, dtype=class_similarities.dtype))
    return F.cross_entropy(scale * with_margin, labels, reduction="none")


def entropy(logits: Tensor) -> Tensor:
    r"""Entropy of the softmax of each row.

    .. math:: H = -\sum_j p_j \log p_j, \qquad p = \operatorname{softmax}(\text{logits})

    Args:
        logits: ``(B, N)``.

    Returns:
        ``(B,)``, in nats, from 0 to :math:`\log N`.

    >>> entropy(torch.tensor([[0.0, 0.0], [0.0, -1000.0]]))  # log 2; 0 where one outcome is certain
    tensor([0.6931, 0.0000])
    """
    log_probabilities = F.log_softmax(logits, dim=-1)
    return (log_probabilities.exp() * -log_probabilities).sum(dim=-1)


def perplexity(distributions: Tensor) -> Tensor:
    r"""Over how many outcomes each row is spread.

    .. math:: \exp H(p) = \exp\Big(-\sum_j p_j \log p_j\Big)

    Args:
        distributions: ``(B, N)``, rows sum to 1, zeros allowed.

    Returns:
        ``(B,)``, from 1 to :math:`N`.

    >>> perplexity(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0]]))
    tensor([4., 1.])
    """
    spread: Tensor = torch.special.entr(distributions).sum(dim=-1).exp()
    return spread


def inter_class_entropy(class_similarities: Tensor, scale: float) -> Tensor:
    r"""Entropy of the class distribution. Maximised, it keeps that distribution smooth.

    .. math:: H_\mathrm{inter}(i) = -\sum_c p_i(c) \log p_i(c), \qquad
        p_i = \operatorname{softmax}_c\!\big(\sigma\, z_i(c)\big)

    Args:
        class_similarities: ``(B, C)``.
        scale: :math:`\sigma`, in units of 1 / similarity.

    Returns:
        ``(B,)``, in nats, from 0 to :math:`\log C`.

    >>> inter_class_entropy(torch.zeros(1, 2), scale=10.0)  # log 2
    tensor([0.6931])
    """
    return entropy(scale * class_similarities)


def intra_class_entropy(own_similarities: Tensor, temperature: float) -> Tensor:
    r"""Entropy of the assignment. Minimised, every sample commits to a proxy.

    .. math:: H_\mathrm{intra}(i) = -\sum_k q_i(k) \log q_i(k)

    Args:
        own_similarities: ``(B, K)``, the similarities to the proxies of each sample's class.
        temperature: :math:`\tau`, in units of the similarity.

    Returns:
        ``(B,)``, in nats, from 0 to :math:`\log K`.

    >>> intra_class_entropy(torch.tensor([[0.5, 0.5]]), temperature=0.05)  # log 2
    tensor([0.6931])
    """
    return entropy(own_similarities / temperature)


def cross_view_entropy(own_similarities: Tensor, temperature: float, views: int) -> Tensor:
    r"""Cross-entropy of the assignment of each view of a sample to those of its other views. Minimised, all views of a
    sample commit to the same proxy.

    .. math:: H_\mathrm{intra}(i, a) = \frac{1}{V - 1} \sum_{b \ne a} -\sum_k q_i^a(k) \log q_i^b(k)

    For two views it is :math:`H(q^a) + \mathrm{KL}(q^a \Vert q^b)`. Both sides get a gradient. Where all views are
    equal, it is :func:`intra_class_entropy`.

    Sources: the idea, without classes, is that of IMSAT (Hu et al., *Learning Discrete Representations via Information
    Maximizing Self-Augmented Training*, ICML 2017) and IIC (Ji, Henriques, Vedaldi, *Invariant Information Clustering*,
    ICCV 2019).

    Args:
        own_similarities: ``(B, K)``, the similarities to the proxies of each sample's class: ``views`` blocks of equal
            length, of which row ``i`` of every block is a view of the same sample.
        temperature: :math:`\tau`, in units of the similarity.
        views: :math:`V`, at least 2.

    Returns:
        ``(B,)``, in nats, at least 0; over the views of a sample, on average at least the mean of their entropies.

    >>> same, other = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.4]])
    >>> cross_view_entropy(torch.cat([same, same]), temperature=0.1, views=2)  # log 2
    tensor([0.6931, 0.6931])
    >>> cross_view_entropy(torch.cat([same, other]), temperature=0.1, views=2)
    tensor([0.8133, 0.6931])
    """
    log_q = F.log_softmax(own_similarities / temperature, dim=-1)
    by_view = torch.unflatten(log_q, 0, (views, -1))
    others = (by_view.sum(dim=0, keepdim=True) - by_view) / (views - 1)
    return (by_view.exp() * others).sum(dim=-1).flatten().neg()


def usage_sums(assignments: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    r"""The sum of the assignment over the samples of each class, :math:`n\,\bar q_c`, for :func:`moved_usage`.

    Such sums can be added up over processes.

    Args:
        assignments: ``(B, K)``, rows sum to 1. Rows of zeros do not count; values that are not finite count as zero.
        labels: ``(B,)``, long, in ``[0, C)``.
        num_classes: :math:`C`.

    Returns:
        ``(C, K)``. Carries no gradient.

    >>> usage_sums(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([1, 1]), num_classes=2)
    tensor([[0.0000, 0.0000],
            [1.5000, 0.5000]])
    """
    counted = assignments.detach().nan_to_num(0.0, 0.0, 0.0)
    return counted.new_zeros(num_classes, counted.shape[1]).index_add_(0, labels, counted)


def moved_usage(usage: Tensor, sums: Tensor, momentum: float) -> Tensor:
    r"""The running mean of the assignment, updated with one batch.

    .. math:: u_c \leftarrow m^n u_c + (1 - m^n)\,\bar q_c

    :math:`\bar q_c` is the mean of :math:`q_i` over the :math:`n` samples of class :math:`c` in the batch. The momentum
    is per sample, so that the size of the batch makes no difference.

    Args:
        usage: ``(C, K)``, rows sum to 1.
        sums: ``(C, K)``, :math:`n\,\bar q_c`: of :func:`usage_sums`. Where :math:`n = 0`, the usage stays.
        momentum: :math:`m`, per sample, from 0 to 1.

    Returns:
        ``(C, K)``, of the dtype of ``sums``.

    >>> moved_usage(torch.tensor([[0.5, 0.5], [0.5, 0.5]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]]), momentum=0.5)
    tensor([[0.8750, 0.1250],
            [0.5000, 0.5000]])
    """
    count = sums.sum(dim=1, keepdim=True)  # rows of assignments sum to 1
    mean = sums / count.clamp_min(1)
    return torch.lerp(mean, usage.to(mean.dtype), torch.pow(momentum, count))


def balance(assignments: Tensor, own_usage: Tensor) -> Tensor:
    r"""Negated cross-entropy between assignment and usage. Minimised, it assigns samples to proxies that are used
    little.

    .. math:: \sum_k q_i(k) \log \max\!\big(u_{y_i}(k),\, 10^{-6}\big)

    With :math:`u` held fixed, the gradient of its mean over a class is that of maximising the entropy of the usage.

    Args:
        assignments: ``(B, K)``, rows sum to 1.
        own_usage: ``(B, K)``, the usage of each sample's class, rows sum to 1. Gets no gradient.

    Returns:
        ``(B,)``, in nats. At least :math:`-\log K` on average over the samples that ``own_usage`` is the mean of; a
        single sample may lie below.

    >>> balance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]))  # -log 2
    tensor([-0.6931])
    """
    return (assignments * own_usage.detach().clamp_min(MIN_USAGE).log()).sum(dim=-1)


def neighbor_loss(
    similarities: Tensor,
    assignments: Tensor,
    smoothed: Tensor,
    labels: Tensor,
    temperature: float,
    views: int,
    left_out: Tensor | None = None,
) -> Tensor:
    r"""Contrast between the samples of a batch. Samples of a class are neighbours as far as they share proxies.

    .. math::

        N_i = -\sum_j t_{ij} \log \operatorname{softmax}_{j \ne i}\!\big(s(x_i, x_j) / \tau_N\big), \qquad
        t_{ij} \propto \begin{cases}
            1 & j \text{ is another view of sample } i \\
            \bar q_i^\top M_{y_i}\, \bar q_j & y_j = y_i \\
            0 & y_j \ne y_i \text{ or } j = i
        \end{cases}

    The targets :math:`t` of a sample sum to 1 and get no gradient. :math:`\bar q_i` is the assignment of sample
    :math:`i`, averaged over its views. The kernel :math:`M_c(k, l) = \exp\big((s(w_{ck}, w_{cl}) - 1) / \tau\big)`,
    with the temperature :math:`\tau` of the assignment, says how near two proxies of a class are; for other distances
    than the cosine, the 1 is the mean of the similarities of both proxies to themselves. With one proxy per class,
    :math:`N` is supervised contrast.

    Sources. The loss is ours; its kin: SupCon (Khosla et al., *Supervised Contrastive Learning*, NeurIPS 2020), whose
    targets are the same for all samples of a class; MaskCon (Feng, Patras, CVPR 2023), with targets from the
    similarities of embeddings; class-conditional InfoNCE (Chen et al., *Perfectly Balanced*, ICML 2022).

    Args:
        similarities: ``(B, B)``, between embeddings, finite; the diagonal does not count.
        assignments: ``(B / V, K)``, :math:`\bar q`.
        smoothed: ``(B / V, K)``, :math:`\bar q_i^\top M_{y_i}`.
        labels: ``(B,)``, long.
        temperature: :math:`\tau_N`, in units of the similarity.
        views: :math:`V`: the batch is so many blocks of equal length, and row ``i`` of every block is a view of the
            same sample.
        left_out: ``(B,)``, bool: samples that are nobody's neighbours and not in the softmax; ``None``: there are none.

    Returns:
        ``(B,)``, in nats, at least 0; 0 for a sample without neighbours.

    >>> similarities = torch.tensor([[1.0, 0.8, 0.1], [0.8, 1.0, 0.2], [0.1, 0.2, 1.0]])
    >>> assignments, labels = torch.ones(3, 1), torch.tensor([0, 0, 1])  # one proxy: both of class 0 are neighbours
    >>> neighbor_loss(similarities, assignments, assignments, labels, temperature=0.2, views=1)
    tensor([0.0298, 0.0486, 0.0000])
    """
    targets = neighbor_targets(assignments, smoothed, labels, views, left_out)
    log_softmax = neighbor_log_softmax(similarities, temperature, left_out)
    return 0 - (targets * log_softmax).sum(dim=1)  # not -0 for a sample without neighbours


def neighbor_targets(
    assignments: Tensor, smoothed: Tensor, labels: Tensor, views: int, left_out: Tensor | None = None
) -> Tensor:
    """The targets :math:`t` of :func:`neighbor_loss`, ``(B, B)``; arguments as there.

    >>> one_proxy, labels = torch.ones(3, 1), torch.tensor([0, 0, 1])
    >>> neighbor_targets(one_proxy, one_proxy, labels, views=1)
    tensor([[0., 1., 0.],
            [1., 0., 0.],
            [0., 0., 0.]])
    """
    sources = labels[: len(assignments)]
    targets = (smoothed.detach() @ assignments.detach().T).masked_fill_(sources.unsqueeze(1) != sources, 0)
    targets = torch.cat([targets.fill_diagonal_(1)] * views)
    targets = torch.cat([targets] * views, dim=1).fill_diagonal_(0)
    if left_out is not None:
        targets.masked_fill_(left_out, 0)
    return targets / targets.sum(dim=1, keepdim=True).clamp_min_(torch.finfo(targets.dtype).tiny)


def neighbor_log_softmax(similarities: Tensor, temperature: float, left_out: Tensor | None = None) -> Tensor:
    """The logarithm of the softmax in :func:`neighbor_loss`, ``(B, B)``; arguments as there. It is finite.

    >>> neighbor_log_softmax(torch.eye(3), temperature=0.2)[0, 1:]
    tensor([-0.6931, -0.6931])
    """
    # Not minus infinity: times a target of zero, it would be NaN.
    logits, lowest = similarities / temperature, 0.5 * torch.finfo(similarities.dtype).min
    if left_out is not None:
        logits = logits.masked_fill_(left_out, lowest)
    return F.log_softmax(logits.fill_diagonal_(lowest), dim=1)


class Terms(NamedTuple):
    """The terms in the loss of each sample: each ``(B,)``, in nats.

    They come from :func:`classification_loss`, :func:`intra_class_entropy` or :func:`cross_view_entropy`,
    :func:`inter_class_entropy` and :func:`balance`.

    >>> Terms(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.25]), torch.tensor([-0.5])).inter
    tensor([0.2500])
    """

    classification: Tensor
    intra: Tensor
    inter: Tensor
    balance: Tensor


def sample_loss(
    terms: Terms, num_classes: int, per_class: int, intra_weight: float, inter_weight: float, balance_weight: float
) -> Tensor:
    r"""The loss of each sample, without the neighbour term.

    .. math::

        \ell_i = \mathrm{CE}_i + \lambda_\mathrm{intra} H_\mathrm{intra}(i)
        + \lambda_\mathrm{inter} \big(\log C - H_\mathrm{inter}(i)\big)
        + \lambda_\mathrm{balance} \Big(\log K + \sum_k q_i(k) \log u_{y_i}(k)\Big)

    Args:
        terms: each ``(B,)``.
        num_classes: :math:`C`.
        per_class: :math:`K`.
        intra_weight: :math:`\lambda_\mathrm{intra}`.
        inter_weight: :math:`\lambda_\mathrm{inter}`.
        balance_weight: :math:`\lambda_\mathrm{balance}`.

    Returns:
        ``(B,)``, in nats. The constants make the mean of each term at least 0, over the samples that the usage is the
        mean of; the loss of a single sample may be negative.

    >>> terms = Terms(*torch.tensor([[1.0], [0.5], [0.25], [-0.5]]))
    >>> sample_loss(terms, 1, 1, intra_weight=1.0, inter_weight=1.0, balance_weight=1.0)
    tensor([0.7500])
    """
    loss = torch.add(terms.classification, terms.intra, alpha=intra_weight)
    loss = torch.sub(loss, terms.inter, alpha=inter_weight)
    loss = torch.add(loss, terms.balance, alpha=balance_weight)
    return loss + (inter_weight * math.log(num_classes) + balance_weight * math.log(per_class))
