"""Makes clinc150_minilm.npz, which the benchmarks on CLINC150 read, from its public files.

``python -m benchmarks.clinc_features --source DIR --out DIR``

``data_full.json`` and ``domains.json`` are in github.com/clinc/oos-eval (folder data, CC BY 3.0). Needs
``pip install sentence-transformers``, which fetches the encoder all-MiniLM-L6-v2. Utterances out of scope are left out.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from .retrieval.tasks import CLINC as FILE

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SPLITS = "train", "val", "test"


def arrays(data, domains, encode):
    """``data`` and ``domains`` as in the two files; ``encode`` turns a list of texts into an array of features."""
    texts, intents = zip(*(pair for split in SPLITS for pair in data[split]), strict=True)
    domain_of = {intent: domain for domain, found in domains.items() for intent in found}
    intent_names, labels = np.unique(intents, return_inverse=True)
    domain_names, superclasses = np.unique([domain_of[name] for name in intent_names], return_inverse=True)
    features = np.asarray(encode(list(texts)), dtype="float32")
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return {
        "features": features.astype("float16"),
        "label": labels.astype("int16"),
        "superclass": superclasses[labels].astype("int16"),
        "split": np.repeat(np.arange(3, dtype="int8"), [len(data[split]) for split in SPLITS]),
        "label_names": intent_names,
        "superclass_names": domain_names,
    }


def sentence_encoder(model):
    from sentence_transformers import SentenceTransformer

    return lambda texts: SentenceTransformer(model).encode(texts, batch_size=256, show_progress_bar=True)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.clinc_features",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="holds the two JSON files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"where to write {FILE}")
    parser.add_argument("--model", default=MODEL, metavar="NAME", help="name or folder; default: %(default)s")
    args = parser.parse_args(argv)
    data, domains = (json.loads((args.source / name).read_text()) for name in ("data_full.json", "domains.json"))
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez(args.out / FILE, **arrays(data, domains, sentence_encoder(args.model)))


if __name__ == "__main__":
    main()
