"""Runs powerful-benchmarker with the loss, the miner and the regularizer of pml_multiproxy known to its configs.

Options that are not listed here go to the benchmarker; it requires --experiment_name.
"""

import argparse
import sys

import compat
from even_odd_digits import DigitsTrunk, EvenOddDigits

import pml_multiproxy

compat.apply()
from powerful_benchmarker.runners.single_experiment_runner import SingleExperimentRunner  # noqa: E402


def make_runner(bayes_opt_iters, reproductions, **options):
    """The runner of a single experiment, or of a search if the number of its trials is given."""
    if bayes_opt_iters is None:
        return SingleExperimentRunner(**options)
    compat.accept_old_objective()
    from powerful_benchmarker.runners.bayes_opt_runner import BayesOptRunner

    return BayesOptRunner(bayes_opt_iters, reproductions, **options)


def register_with(runner):
    from miner_factory import MinerFactory

    pml_multiproxy.register()
    runner.register("factory", MinerFactory)
    runner.register("dataset", EvenOddDigits)
    runner.register("model", DigitsTrunk)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dataset_root", default="datasets", help="default: %(default)s")
    parser.add_argument("--root_experiment_folder", default="experiments", help="default: %(default)s")
    parser.add_argument("--global_db_path", help="one SQLite file for the records of all experiments")
    parser.add_argument("--merge_argparse_when_resuming", action="store_true", help="new options change a resumed run")
    parser.add_argument("--bayes_opt_iters", type=int, metavar="N", help="search, with so many trials")
    parser.add_argument("--reproductions", type=int, default=0, metavar="N", help="of the best trial of a search")
    # The benchmarker reads the rest of sys.argv itself.
    options, sys.argv[1:] = parser.parse_known_args()
    runner = make_runner(**vars(options))
    register_with(runner)
    runner.run()


if __name__ == "__main__":
    main()
