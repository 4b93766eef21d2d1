"""The losses over pairs that PML has only as parts: each is NT-Xent with pairs of its own.

PML's ``NTXentLoss`` compares every positive with every negative pair of the batch; here a row of the similarities is
compared with itself, which gives the same value in far less time and memory.
"""

import torch
from pytorch_metric_learning import losses
from torch import nn


def similarities(embeddings):
    directions = nn.functional.normalize(embeddings)
    return directions @ directions.T


def info_nce(similarity, positive, negative, temperature):
    """As ``NTXentLoss``: each pair of ``positive`` against the pairs of ``negative`` in its row, on the mean."""
    logits = similarity / temperature
    others = logits.masked_fill(~negative, torch.finfo(logits.dtype).min).logsumexp(dim=1, keepdim=True)
    return nn.functional.softplus(others - logits)[positive].mean()


def equal(labels):
    return labels.unsqueeze(0) == labels.unsqueeze(1)


def others(mask):
    """Without the pair of each row with itself."""
    return mask.clone().fill_diagonal_(False)


class EasyPositives(nn.Module):
    """NT-Xent of each sample with the nearest sample of its class, against all samples of other classes.

    ``NTXentLoss`` with ``BatchEasyHardMiner(pos_strategy="easy", neg_strategy="all")``: Xuan, Stylianou, Pless,
    *Improved Embeddings with Easy Positive Triplet Mining*, WACV 2020; Levi et al., *Rethinking Preventing
    Class-Collapsing in Metric Learning with Margin-based Losses*, ICCV 2021.
    """

    def __init__(self, temperature=0.07):
        super().__init__()
        self.temperature = temperature

    def forward(self, embeddings, labels):
        similarity, same = similarities(embeddings), equal(labels)
        nearest = similarity.masked_fill(~others(same), -2).argmax(dim=1, keepdim=True)
        positive = others(same) & torch.zeros_like(same).scatter(1, nearest, True)
        return info_nce(similarity, positive, ~same, self.temperature)


class SoftmaxAndInstances(nn.Module):
    """NormalizedSoftmax, plus NT-Xent between the views of a sample, against all other samples of the batch.

    As Grafit (Touvron et al., ICCV 2021) and ANCOR (Bukchin et al., CVPR 2021) learn fine classes from coarse labels.
    """

    def __init__(self, num_classes, size, views, temperature=0.05, contrast_temperature=0.07, contrast_weight=1.0):
        super().__init__()
        self.views, self.weight, self.temperature = views, contrast_weight, contrast_temperature
        self.softmax = losses.NormalizedSoftmaxLoss(num_classes, size, temperature=temperature)

    def forward(self, embeddings, labels):
        same = equal(samples_of(labels, self.views))
        negative = self.negatives(same, labels)
        contrast = info_nce(similarities(embeddings), others(same), negative, self.temperature)
        return self.softmax(embeddings, labels) + self.weight * contrast

    def negatives(self, same, labels):
        return ~same


class SoftmaxWithinClasses(SoftmaxAndInstances):
    """NormalizedSoftmax, plus InfoNCE between the views of a sample against the other samples of its class."""

    def negatives(self, same, labels):
        return equal(labels) & ~same


class Spread(nn.Module):
    """Supervised contrast, plus InfoNCE between the views of a sample against the other samples of its class.

    Chen et al., *Perfectly Balanced: Improving Transfer and Robustness of Supervised Contrastive Learning*, ICML 2022.
    """

    def __init__(self, views, temperature=0.1, conditional_weight=0.5):
        super().__init__()
        self.views, self.weight, self.temperature = views, conditional_weight, temperature
        self.supervised = losses.SupConLoss(temperature=temperature)

    def forward(self, embeddings, labels):
        same = equal(samples_of(labels, self.views))
        conditional = info_nce(similarities(embeddings), others(same), equal(labels) & ~same, self.temperature)
        return (1 - self.weight) * self.supervised(embeddings, labels) + self.weight * conditional


class MaskCon(nn.Module):
    """NormalizedSoftmax, plus a contrast between all samples of the batch, whose targets depend on their similarity.

    Feng & Patras, *MaskCon: Masked Contrastive Learning for Coarse-Labelled Dataset*, CVPR 2023. They take the samples
    to compare with from a queue, embedded by a running mean of the network; here they are those of the batch.
    """

    def __init__(
        self,
        num_classes,
        size,
        views,
        temperature=0.05,
        contrast_temperature=0.1,
        contrast_weight=1.0,
        target_temperature=0.05,
        target_weight=0.5,
    ):
        super().__init__()
        self.views, self.weight, self.temperature = views, contrast_weight, contrast_temperature
        self.target_temperature, self.target_weight = target_temperature, target_weight
        self.softmax = losses.NormalizedSoftmaxLoss(num_classes, size, temperature=temperature)

    def forward(self, embeddings, labels):
        similarity, same = similarities(embeddings), equal(samples_of(labels, self.views))
        other_views, among = others(same).to(embeddings.dtype), equal(labels) & ~same
        soft = soft_targets(similarity.detach(), other_views, among, self.target_temperature)
        target = torch.lerp(other_views / other_views.sum(dim=1, keepdim=True), soft, self.target_weight)
        logits = similarity / self.temperature
        log_shares = logits.fill_diagonal_(torch.finfo(logits.dtype).min).log_softmax(dim=1)
        contrast = -(target * log_shares).sum(dim=1).mean()
        return self.softmax(embeddings, labels) + self.weight * contrast


def soft_targets(similarity, other_views, among, temperature):
    """1 for other views of a sample; relative to the nearest, for the pairs of ``among``; then divided by the sum."""
    lowest = torch.finfo(similarity.dtype).min
    logits = (similarity / temperature).masked_fill(~among, lowest)
    shares = (logits - logits.amax(dim=1, keepdim=True)).exp() * among
    targets = other_views + shares
    return targets / targets.sum(dim=1, keepdim=True)


def samples_of(labels, views):
    """The number of the sample that each row is a view of."""
    return torch.arange(len(labels) // views, device=labels.device).repeat(views)
