"""Train a text embedding with topics as labels, and retrieve intents, with sentence-transformers.

    pip install "sentence-transformers[train]"
    python examples/text_sentence_transformers.py

Text, tokenizer and a small random transformer are made here (text_data.py). Prints MAP@R of the intents, which no loss
has seen, before training and after it with one view, with dropout as the second view, and with a second wording as the
second view. With --checkpoints FOLDER, a run that was interrupted goes on where it was.

The same on several processes, where the batch size is that of each:

    torchrun --standalone --nproc-per-node 2 examples/text_sentence_transformers.py
"""

import argparse
import gc
import os
import tempfile
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainingArguments
from text_data import COARSE, load_data, make_model, map_at_r
from torch import distributed

from pml_multiproxy.sentence_transformers import MultiProxyEntropyLoss, SentenceTransformerTrainer

VIEWS = {
    "one view": (1, ["text"]),
    "dropout as second view": (2, ["text"]),
    "second wording as second view": (2, ["text", "other_wording"]),
}


def train(name, epochs, folder):
    views, columns = VIEWS[name]
    transformers.set_seed(0)
    model = make_model()
    loss = MultiProxyEntropyLoss(model, len(COARSE), 10, views=views)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=48,
        learning_rate=1e-3,
        # The proxies start at unit norm, and stand a larger step than the transformer.
        learning_rate_mapping={r"loss_func\.proxies": 1e-2},
        save_strategy="epoch",
        save_total_limit=1,
        disable_tqdm=True,
        logging_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    data = Dataset.from_list(load_data()[0]).select_columns([*columns, "label"])
    trainer = SentenceTransformerTrainer(model, arguments, data, loss=loss)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)
    return trainer


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15, metavar="N", help="default: %(default)s")
    parser.add_argument("--views", choices=VIEWS, help="only these; default: all")
    parser.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="default: none are kept")
    args = parser.parse_args(argv)
    transformers.set_seed(0)
    is_first = os.environ.get("RANK", "0") == "0"  # torchrun sets it
    if is_first:
        print(f"| training | MAP@R |\n|---|---|\n| none | {map_at_r(make_model()):.1f} |", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name in [args.views] if args.views else VIEWS:
            trainer = train(name, args.epochs, Path(args.checkpoints or temporary) / name.replace(" ", "-"))
            if is_first:
                print(f"| {name} | {map_at_r(trainer.model):.1f} |", flush=True)
    if distributed.is_initialized():
        del trainer
        gc.collect()  # DistributedDataParallel, which holds the process group: train_ddp.py says more
        distributed.barrier()  # the first process is still testing
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
