"""SoftTripleLoss and MultiProxyEntropyLoss through powerful-benchmarker, on a task that needs no download.

Trained with the labels even and odd, the test images have to retrieve their digit. Options that are not listed here go
to run.py, as --num_epochs_train 2.
"""

import argparse
import csv
import os
import sys
import warnings
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # PML shows a bar for every epoch and test; the one below is enough

import run
from even_odd_digits import configs
from tqdm import tqdm

LOSSES = {
    "SoftTripleLoss": ["soft_triple"],
    "MultiProxyEntropyLoss": ["multi_proxy"],
    "MultiProxyEntropyLoss_with_miner_and_regularizer": ["multi_proxy", "with_miner_and_regularizer"],
}
METRICS = {"precision_at_1": "Precision@1", "r_precision": "R-Precision", "mean_average_precision_at_r": "MAP@R"}


def benchmark(folder, name, *options):
    sys.argv[1:] = ["--root_experiment_folder", str(folder), "--experiment_name", name, *options]
    run.main()


def read_accuracies(folder):
    """Mean and standard error over the folds, in %."""
    (path,) = folder.glob("meta_logs/saved_csvs/MeanAggregator_*_TEST_vs_self.csv")
    with path.open() as file:
        (row,) = csv.DictReader(file)
    return [[100 * float(row[f"{prefix}{metric}_level0"]) for prefix in ("", "SEM_")] for metric in METRICS]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarker_digits"), help="default: %(default)s")
    args, options = parser.parse_known_args()
    if args.out.exists():
        parser.error(f"--out {args.out} exists: remove it or name another")
    warnings.filterwarnings("ignore", "Converting a tensor")  # of PML
    lines = [f"| loss | {' | '.join(METRICS.values())} |", "|---" * (1 + len(METRICS)) + "|"]
    for name, overlays in tqdm(LOSSES.items(), disable=False):
        benchmark(args.out, name, *configs(*overlays), *options)
        benchmark(args.out, name, "--evaluate", "--splits_to_eval", "[test]")
        cells = [f"{mean:.1f} ± {error:.1f}" for mean, error in read_accuracies(args.out / name)]
        lines.append(f"| {' | '.join([name, *cells])} |")
    print(*lines, sep="\n")
    print(f"\nCSV and SQLite (logs.db): {args.out}/*/*/saved_csvs; the accuracies above in */meta_logs/saved_csvs")
    print(f"TensorBoard: tensorboard --logdir {args.out}")


if __name__ == "__main__":
    main()
