"""Who may import what: a new version of PyTorch Metric Learning must concern one file."""

import ast
from pathlib import Path

import pml_multiproxy

PACKAGE = Path(pml_multiproxy.__file__).parent
PUBLIC = {"distances", "losses", "miners", "reducers", "regularizers"}
INNER_NAMES = {"_record_these_stats", "lmu", "c_f", "loss_and_miner_utils", "common_functions"}


def faults(source):
    """The inner parts of PML that a file imports or names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            root, *rest = module.split(".")
            inner = len(rest) > 2 or not PUBLIC.issuperset(rest[:1]) or any(name[0] in "_*" for name in rest)
            found += [module] if root == "pytorch_metric_learning" and inner else []
        used = {getattr(node, field, None) for field in ("id", "attr")}
        used |= {node.value} if isinstance(node, ast.Constant) else set()
        found += used & INNER_NAMES
    return found


def test_only_one_file_knows_the_inner_parts_of_pml():
    found = {path.name: faults(path.read_text()) for path in PACKAGE.rglob("*.py") if path.name != "_pml.py"}
    assert not {file: wrong for file, wrong in found.items() if wrong}


def test_that_one_file_would_be_found():
    assert len(faults((PACKAGE / "_pml.py").read_text())) > 3
    for line in (
        "from pytorch_metric_learning.utils import common_functions",
        "import pytorch_metric_learning.utils.inference",
        "from pytorch_metric_learning import utils",
        "from pytorch_metric_learning.losses.mixins import WeightRegularizerMixin",
        "getattr(distance, '_record_these_stats')",
        "c_f.to_device(x)",
    ):
        assert faults(line), line
    assert not faults("from pytorch_metric_learning.losses import BaseMetricLossFunction\nimport torch")
