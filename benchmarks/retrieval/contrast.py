"""The losses over pairs that need more than PML's documented call."""

import torch
from pytorch_metric_learning import losses, miners
from torch import nn


class EasyPositives(nn.Module):
    """NT-Xent of each sample with the nearest sample of its class, against all samples of other classes.

    Xuan, Stylianou, Pless, *Improved Embeddings with Easy Positive Triplet Mining*, WACV 2020; Levi et al., *Rethinking
    Preventing Class-Collapsing in Metric Learning with Margin-based Losses*, ICCV 2021.
    """

    def __init__(self, **settings):
        super().__init__()
        self.contrast = losses.NTXentLoss(**settings)
        self.miner = miners.BatchEasyHardMiner(pos_strategy="easy", neg_strategy="all")

    def forward(self, embeddings, labels):
        return self.contrast(embeddings, labels, self.miner(embeddings, labels))


class SoftmaxAndInstances(nn.Module):
    """NormalizedSoftmax, plus NT-Xent between the views of a sample, against all other samples of the batch.

    As Grafit (Touvron et al., ICCV 2021) and ANCOR (Bukchin et al., CVPR 2021) learn fine classes from coarse labels.
    """

    def __init__(
        self, num_classes, size, views, temperature=0.05, contrast_temperature=0.07, contrast_weight=1.0
    ):
        super().__init__()
        self.views, self.weight = views, contrast_weight
        self.softmax = losses.NormalizedSoftmaxLoss(num_classes, size, temperature=temperature)
        self.contrast = losses.NTXentLoss(temperature=contrast_temperature)

    def forward(self, embeddings, labels):
        samples = torch.arange(len(labels) // self.views, device=labels.device).repeat(self.views)
        return self.softmax(embeddings, labels) + self.weight * self.contrast(embeddings, samples)


class Spread(nn.Module):
    """Supervised contrast, plus InfoNCE between the views of a sample against the other samples of its class.

    Chen et al., *Perfectly Balanced: Improving Transfer and Robustness of Supervised Contrastive Learning*, ICML 2022.
    """

    def __init__(self, views, temperature=0.1, conditional_weight=0.5):
        super().__init__()
        self.views, self.weight = views, conditional_weight
        self.supervised = losses.SupConLoss(temperature=temperature)
        self.conditional = losses.NTXentLoss(temperature=temperature)

    def forward(self, embeddings, labels):
        samples = torch.arange(len(labels) // self.views, device=labels.device).repeat(self.views)
        same_sample = samples.unsqueeze(0) == samples.unsqueeze(1)
        positive = same_sample.clone().fill_diagonal_(False)
        negative = (labels.unsqueeze(0) == labels.unsqueeze(1)) & ~same_sample
        pairs = (*positive.nonzero(as_tuple=True), *negative.nonzero(as_tuple=True))
        supervised, conditional = self.supervised(embeddings, labels), self.conditional(embeddings, labels, pairs)
        return (1 - self.weight) * supervised + self.weight * conditional
