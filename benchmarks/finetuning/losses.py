"""The losses, and three configurations of each: its documented defaults, and two of the retrieval benchmark's."""

from ..retrieval.contrast import SoftmaxWithinClasses
from ..retrieval.losses import FAMILIES as RETRIEVAL
from ..retrieval.losses import K_MEANS, ONE_PROXY, OURS, UNTRAINED, Family
from ..retrieval.losses import configurations as drawn

INSTANCES = "NormalizedSoftmax + instance contrast"
WITHIN = "NormalizedSoftmax + class-conditional contrast"
SPREAD = "supervised + class-conditional contrast"
REFERENCES = UNTRAINED, K_MEANS
SETTLING = OURS, "SoftTriple"
"""The losses whose mean on validation chooses the schedule of all."""

CHOSEN = {
    "SoftTriple": ((11, 9), (7, 8)),
    "SubCenterArcFace": ((11, 7), (11, 9)),
    "ProxyAnchor": ((6, 8), (1, 7)),
    "NormalizedSoftmax": ((7, 3), (5, 7)),
    "MultiSimilarity": ((6, 11), (8, 10)),
    INSTANCES: ((7, 6), (5, 10)),
    SPREAD: ((9, 6), (3, 4)),
    K_MEANS: ((11, 7), (10, 4)),
}
"""Beside the defaults, the two of the twelve that were best on the validation parts of the retrieval benchmark's tasks
with views: for coarse labels, for new classes."""
TEXT = {"scale": 20.0, "temperature": 0.05}
"""The defaults of :class:`pml_multiproxy.sentence_transformers.MultiProxyEntropyLoss`, from validation on the text."""
OF_IMAGES = {}, {"neighbor_temperature": 0.1}, {"temperature": 0.05, "neighbor_temperature": 0.1}
OF_TEXT = TEXT, {}, TEXT | {"neighbor_weight": 0.0}
"""Changes of our defaults. The lower temperatures come from the validation part of the leaves."""
FAMILIES = {
    OURS: RETRIEVAL[OURS],
    ONE_PROXY: RETRIEVAL[ONE_PROXY],
    SPREAD: RETRIEVAL[SPREAD],
    INSTANCES: RETRIEVAL[INSTANCES],
    WITHIN: Family(SoftmaxWithinClasses, RETRIEVAL[INSTANCES].choices),
    **{name: RETRIEVAL[name] for name in CHOSEN if name not in (SPREAD, INSTANCES)},
}


def applies(loss, task):
    return loss != ONE_PROXY or "unseen" in task


def configurations(loss, task):
    """Without the schedule. Both sums of a softmax and a contrast have the same configurations."""
    peer = INSTANCES if loss == WITHIN else loss
    found = drawn(peer, "views")
    if loss in (OURS, ONE_PROXY):
        changes = OF_TEXT if "text" in task else OF_IMAGES
        return [found[0] | change for change in (changes if loss == OURS else changes[:1])]
    return [found[i] for i in (0, *CHOSEN.get(peer, ((), ()))["unseen" in task])]
