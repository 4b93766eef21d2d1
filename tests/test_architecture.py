"""Who may import what: a new version of PyTorch Metric Learning must concern one file."""

import ast
from pathlib import Path

import pytest
import pytorch_metric_learning

import pml_multiproxy

PACKAGE = Path(pml_multiproxy.__file__).parent
PUBLIC = {"distances", "losses", "miners", "reducers", "regularizers"}
INNER_NAMES = {"_record_these_stats", "lmu", "c_f", "loss_and_miner_utils", "common_functions"}
KNOWN = {"views.py": "takes to_numpy from PML's utils", "visualize.py": "names _record_these_stats"}
FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "_pml.py")
FILES = [
    pytest.param(file, marks=pytest.mark.xfail(reason=KNOWN[file], strict=True)) if file in KNOWN else file
    for file in FILES
]


def faults(source):
    """What of the inner parts of PML a file imports or names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [(node.module, alias.name) for alias in node.names]
        for module, name in names:
            root, *rest = module.split(".")
            if root == pytorch_metric_learning.__name__:
                inner = len(rest) > 1 or not set(rest or [name]) & {*PUBLIC, "", "__version__"} or name[:1] == "_"
                found += [f"{module} {name}"] if inner else []
        used = getattr(node, "id", None) or getattr(node, "attr", None)
        used = node.value if isinstance(node, ast.Constant) else used
        found += [used] if isinstance(used, str) and used in INNER_NAMES else []
    return found


@pytest.mark.parametrize("file", FILES)
def test_only_one_file_knows_the_inner_parts_of_pml(file):
    assert faults((PACKAGE / file).read_text()) == []


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
