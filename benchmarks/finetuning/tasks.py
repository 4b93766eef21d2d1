"""The four tasks: their parts, network, batches, and the schedules that validation chooses from."""

import copy
import csv
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ..retrieval.tasks import Data, Task
from ..retrieval.training import DEVICE
from . import images, text
from .sources import path_of

TRAINED, HELD_OUT = 0.45, 0.6
"""Of the photographs of each condition, in the order they were taken: up to the first part to train with, up to the
second for validation, the others for the test."""
SENTENCES = {"train": 12, "val": 6, "test": 30}
"""Of each intent."""


class Options(NamedTuple):
    data: str | None
    cache: Path
    whole: bool = False
    """Train all blocks of the image network, on images instead of stored activations."""
    size: int = 112


class Model(nn.Module):
    """A pretrained body and a new head, called with the numbers of samples."""

    def __init__(self, store, body, head):
        super().__init__()
        self.store, self.body, self.head = store, body, head

    def forward(self, numbers, views=0, generator=None):
        numbers = numbers.cpu()
        x = self.store.views(numbers, views, generator) if views else self.store.plain(numbers)
        return self.head(self.body(x.to(DEVICE)))

    def train(self, mode=True):
        """Batch norm stays in evaluation mode and keeps the statistics of pretraining."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def rows_of(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def numbered(names):
    return torch.tensor(np.unique(names, return_inverse=True)[1])


def parts(coarse, fine, *masks):
    data = Data(torch.arange(len(fine)), coarse, fine)
    return [data.where(mask) for mask in masks]


def image_task(options, name, archive, rows, made_of, **settings):
    """``made_of``: the parts to train with, to validate and to test on."""
    pixels = images.read(path_of(options.data, archive), [row["image"] for row in rows])
    network = images.pretrained()
    if options.whole:
        store = images.Pixels(pixels, options.size)
        body = nn.Sequential(images.Lower(network), images.Upper(network))
    else:
        train, validation, _ = made_of
        training = torch.cat([train.x, validation.x])
        path = options.cache / f"{name}-{options.size}.pt"
        store = images.Activations.load(path, images.Lower(network), pixels, training, options.size)
        small = DEVICE == "cpu"
        body = images.UpperOfSmallMaps(network, store.side) if small else images.Upper(network)

    def make_network():
        return Model(store, copy.deepcopy(body), nn.Linear(1280, 128))

    return Task(*made_of, make_network, 128, None, 64, views=2, **settings)


def leaves(options):
    """Three crops, then the 15 conditions: twelve diseases, and healthy leaves of each crop."""
    rows = rows_of(path_of(options.data, "leaves/labels.csv"))
    coarse, fine = (
        numbered([row["crop"] for row in rows]),
        numbered([f"{row['crop']} {row['condition']}" for row in rows]),
    )
    place = torch.empty(len(rows))
    for c in fine.unique():
        of = (fine == c).nonzero().squeeze(1).tolist()
        ordered = sorted(of, key=lambda i: order_of(rows[i]["photo"]))
        place[ordered] = torch.arange(len(of)) / len(of)
    masks = place < TRAINED, (place >= TRAINED) & (place < HELD_OUT), place >= HELD_OUT
    return image_task(options, "leaves", "leaves/images128.zip", rows, parts(coarse, fine, *masks))


def order_of(photo):
    """The tag of the photographer and the number: neighbours may show the same leaf."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", photo)]


def cars_unseen(options):
    """Training on car models 0 to 97, 20 of them held out for validation; the test has models 98 to 195."""
    rows = rows_of(path_of(options.data, "cars196/labels.csv"))
    labels = torch.tensor([int(row["class"]) for row in rows])
    held_out = torch.isin(labels, torch.randperm(98, generator=torch.Generator().manual_seed(0))[:20])
    masks = (labels < 98) & ~held_out, held_out, labels >= 98
    return image_task(options, "cars", "cars196/images144.zip", rows, parts(labels, labels, *masks), per_class=4)


def text_task(options, made_of, texts, **settings):
    transformer, tokenizer = text.pretrained(options.cache)
    store, body = text.Sentences(tokenizer, texts), text.MeanOfTokens(transformer)

    def make_network():
        return Model(store, copy.deepcopy(body), nn.Identity())

    return Task(*made_of, make_network, 384, None, 64, views=2, **settings)


def clinc(options):
    """Sentences, domains, intents and splits, the shortest sentences first: batches are evaluated in this order."""
    data, domain_of = text.utterances(options.data)
    for split, kept in SENTENCES.items():
        of_intent = defaultdict(list)
        for pair in data[split]:
            of_intent[pair[1]].append(pair)
        data[split] = [pair for found in of_intent.values() for pair in found[:kept]]
    data = {split: sorted(found, key=lambda pair: len(pair[0])) for split, found in data.items()}
    texts, intents = zip(*(pair for found in data.values() for pair in found), strict=True)
    split = torch.arange(3).repeat_interleave(torch.tensor([len(found) for found in data.values()]))
    return list(texts), numbered([domain_of[intent] for intent in intents]), numbered(intents), split


def clinc_text_coarse(options):
    """Ten domains, then the 150 intents."""
    texts, domains, intents, split = clinc(options)
    return text_task(options, parts(domains, intents, *(split == part for part in range(3))), texts)


def clinc_text_unseen(options):
    """Training on 75 intents, 15 of them held out for validation; the test has the other 75."""
    texts, _, intents, split = clinc(options)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0)).argsort()[intents]
    known = split == 0
    masks = known & (order < 60), known & (order >= 60) & (order < 75), (split == 2) & (order >= 75)
    return text_task(options, parts(intents, intents, *masks), texts, per_class=4)


TASKS = {
    "leaves": leaves,
    "clinc-text-coarse": clinc_text_coarse,
    "clinc-text-unseen": clinc_text_unseen,
    "cars-unseen": cars_unseen,
}
SCHEDULES = {
    "leaves": [{"lr": 1e-3, "epochs": 2}, {"lr": 5e-4, "epochs": 4}],
    "clinc-text-coarse": [{"lr": 3e-5, "epochs": 2}, {"lr": 1e-4, "epochs": 2}],
    "clinc-text-unseen": [{"lr": 3e-5, "epochs": 2}, {"lr": 1e-4, "epochs": 2}],
    "cars-unseen": [{"lr": 1e-3, "epochs": 5}, {"lr": 5e-4, "epochs": 5}],
}
"""The learning rate of the body and the number of epochs."""
