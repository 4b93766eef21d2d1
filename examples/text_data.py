"""Shared by the examples on text: generated requests, trained with three topics and retrieved by twelve intents."""

import copy
import os
import random
import tempfile
from functools import cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all is made here; nothing is downloaded

import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch.nn import functional

TOPICS = {
    "travel": {
        "book": ("book reserve get order arrange", "flight train hotel car ferry bus"),
        "delay": ("late delayed waiting stuck behind slow", "departure arrival platform gate terminal schedule"),
        "luggage": ("lost missing damaged broken found packed", "suitcase bag backpack trunk parcel case"),
        "visa": ("apply renew extend need require request", "passport visa permit border embassy stamp"),
    },
    "money": {
        "transfer": ("send transfer move wire pay remit", "rent salary deposit friend landlord invoice"),
        "card": ("blocked stolen declined expired frozen swallowed", "card pin chip terminal cashpoint wallet"),
        "balance": ("show check read print tell list", "balance statement account total history savings"),
        "loan": ("borrow repay refinance owe consolidate lend", "loan mortgage debt interest credit rate"),
    },
    "kitchen": {
        "recipe": ("cook bake roast boil fry grill", "soup bread chicken rice cake pasta"),
        "shopping": ("buy add fetch restock need order", "milk eggs flour apples butter sugar"),
        "timer": ("set start stop pause reset remind", "timer alarm minutes countdown clock hour"),
        "restaurant": ("reserve recommend find suggest review rate", "restaurant table bistro diner terrace menu"),
    },
}
COARSE, FINE = list(TOPICS), [intent for intents in TOPICS.values() for intent in intents]
PREFIXES = ["please", "hey", "could you", "i want to", "hello there", "can someone", "i think we", "right now"]
SUFFIXES = ["today", "for me", "as soon as possible", "thanks", "again", "this week", "if you can", "for my family"]


def sentence(words, rng):
    """One wording of a request: the words that carry its meaning, one of them dropped now and then, among fillers."""
    kept = [word for word in words if rng.random() > 0.2] or words
    return " ".join([rng.choice(PREFIXES), *kept, rng.choice(SUFFIXES)])


@cache
def load_data(per_intent=40):
    """Two lists of rows for training and test: two wordings of each request, the topic as label, the intent."""
    rng = random.Random(0)
    rows = []
    for topic, intents in TOPICS.items():
        for intent, (verbs, nouns) in intents.items():
            for _ in range(2 * per_intent):
                words = [rng.choice(verbs.split()), *rng.sample(nouns.split(), 2)]
                texts = {"text": sentence(words, rng), "other_wording": sentence(words, rng)}
                rows.append({**texts, "label": COARSE.index(topic), "intent": FINE.index(intent)})
    return rows[::2], rows[1::2]


def make_model():
    """A small transformer with random weights, the same ones for each call, that knows the words of the requests."""
    return copy.deepcopy(_random_model())


@cache  # also since Transformers lets only the first of several processes save, once they have found each other
def _random_model():
    # Here, so that the texts alone need none of them.
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    texts = [*PREFIXES, *SUFFIXES, *(words for topic in TOPICS.values() for pair in topic.values() for words in pair)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in texts for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
        BertModel(config).save_pretrained(folder)
        return SentenceTransformer(folder, device="cpu")


@torch.no_grad()
def map_at_r(model):
    """MAP@R of the intents of the test texts, in %."""
    _, test = load_data()
    embeddings = model.encode([row["text"] for row in test], convert_to_tensor=True, show_progress_bar=False)
    calculator = AccuracyCalculator(include=("mean_average_precision_at_r",), k="max_bin_count")
    intents = torch.tensor([row["intent"] for row in test])
    accuracy = calculator.get_accuracy(functional.normalize(embeddings.cpu()), intents)
    return 100 * accuracy["mean_average_precision_at_r"]
