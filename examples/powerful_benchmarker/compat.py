"""What powerful-benchmarker 0.9.33, written for PML 0.9.92, needs beside PML 2 and today's PyTorch and Ax.

Each fix looks first whether it is needed, and says why it may be.
"""

from functools import wraps
from inspect import signature

import torch
from pytorch_metric_learning.testers.base_tester import BaseTester
from pytorch_metric_learning.utils import common_functions, logging_presets
from record_keeper import RecordKeeper, RecordWriter
from record_keeper import utils as record_keeper_utils


def apply():
    """All of them but the one for the search, before the first import of the benchmarker."""
    declare_operators()
    bring_back_identity()
    accept_save_figures()
    accept_old_name_of_group()
    count_records_of_ensembles()
    leave_out_tensors()
    let_splits_be_their_own_reference()
    do_without_record_keeper()


def declare_operators():
    # A build of torchvision for CUDA cannot load its operators beside PyTorch for the CPU, but counts on two of them.
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


def bring_back_identity():
    # PML dropped its own when PyTorch got one.
    if not hasattr(common_functions, "Identity"):
        common_functions.Identity = torch.nn.Identity


def accept_save_figures():
    # record-keeper no longer saves figures, so PML no longer asks whether to.
    get_record_keeper = logging_presets.get_record_keeper
    if "save_figures" in signature(get_record_keeper).parameters:
        return

    @wraps(get_record_keeper)
    def accepting(*args, save_figures=False, **kwargs):
        return get_record_keeper(*args, **kwargs)

    logging_presets.get_record_keeper = accepting


def accept_old_name_of_group():
    # record-keeper renamed the argument to parent_name.
    update_records = RecordKeeper.update_records
    if "input_group_name_for_non_objects" in signature(update_records).parameters:
        return

    @wraps(update_records)
    def accepting(self, *args, parent_name="", input_group_name_for_non_objects="", **kwargs):
        return update_records(self, *args, parent_name=parent_name or input_group_name_for_non_objects, **kwargs)

    RecordKeeper.update_records = accepting


def count_records_of_ensembles():
    # They have no epoch, so the benchmarker gives the name of a state for it, which record-keeper now tries to sort.
    if not hasattr(record_keeper_utils, "separate_iterations_from_series"):
        return
    update_records = RecordKeeper.update_records

    @wraps(update_records)
    def counting(self, records, global_iteration, *args, parent_name="", **kwargs):
        if isinstance(global_iteration, str):
            from powerful_benchmarker.utils.common_functions import try_getting_db_count

            global_iteration = try_getting_db_count(self, parent_name) + 1  # as the benchmarker does a moment later
        return update_records(self, records, global_iteration, *args, parent_name=parent_name, **kwargs)

    RecordKeeper.update_records = counting


def leave_out_tensors():
    # PML 2 records the parameters of losses too, element by element, and record-keeper drops them only when it saves.
    # With an iteration's record at 32 bytes a number, an epoch on StanfordOnlineProducts would take 35 GB.
    append = RecordWriter.append
    if "save_lists" in append.__code__.co_names:
        return

    @wraps(append)
    def leaving_out(self, group_name, series_name, value, iteration):
        if self.save_lists or not isinstance(value, torch.Tensor) or value.numel() <= 1:
            append(self, group_name, series_name, value, iteration)

    RecordWriter.append = leaving_out


class OwnReference(dict):
    """The references of each split: itself, unless told otherwise."""

    def __missing__(self, split):
        return [split]


def let_splits_be_their_own_reference():
    # PML 2 tests pairs of a split and its references, and names tables after them; the benchmarker knows only splits.
    get_splits = getattr(BaseTester, "get_splits_to_compute_embeddings", None)
    if get_splits is None:
        return
    init = BaseTester.__init__

    @wraps(init)
    def init_with_references(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.reference_split_names = OwnReference()

    @wraps(get_splits)
    def get_splits_with_references(self, dataset_dict, splits):
        return get_splits(self, dataset_dict, [(split, [split]) for split in splits or dataset_dict])

    BaseTester.__init__ = init_with_references
    BaseTester.get_splits_to_compute_embeddings = get_splits_with_references


def do_without_record_keeper():
    # The benchmarker makes hooks with none, only to ask for the names of tables; PML 2 looks those up in it.
    hooks = logging_presets.HookContainer
    if "hash_map" not in hooks.record_group_name.__code__.co_names:
        return
    init = hooks.__init__

    @wraps(init)
    def init_with_record_keeper(self, record_keeper, *args, **kwargs):
        init(self, record_keeper or RecordKeeper(), *args, **kwargs)

    hooks.__init__ = init_with_record_keeper


def accept_old_objective():
    # Ax replaced the name of the objective and its direction by a dictionary of objectives.
    from ax.service.ax_client import AxClient, ObjectiveProperties

    create_experiment = AxClient.create_experiment
    if "objective_name" in signature(create_experiment).parameters:
        return

    @wraps(create_experiment)
    def accepting(self, *args, objective_name, minimize, **kwargs):
        objectives = {objective_name: ObjectiveProperties(minimize=minimize)}
        return create_experiment(self, *args, objectives=objectives, **kwargs)

    AxClient.create_experiment = accepting
