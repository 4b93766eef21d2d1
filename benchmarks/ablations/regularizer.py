"""What ProxyEntropyRegularizer does to SoftTripleLoss and MultiProxyEntropyLoss (see clinc.py for the task).

"Sibling cosine" is the mean cosine between proxies of one class after training. Writes results/regularizer.csv, one row
per run, goes on from what it holds, and makes results/regularizer.md of it.
"""

import torch
from pytorch_metric_learning.losses import SoftTripleLoss

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.regularizers import ProxyEntropyRegularizer

from ..clinc import (
    SIZE,
    Data,
    ResidualHead,
    make_optimizer,
    make_parser,
    map_at_r,
    publish,
    run_all,
    train,
)

K = 10


def soft_triple(**kwargs):
    return SoftTripleLoss(10, SIZE, centers_per_class=K, **kwargs)


def ours(**kwargs):
    return MultiProxyEntropyLoss(10, SIZE, K, **kwargs)


CONFIGURATIONS = {
    f"{name}, K={K}, {f'regularizer at weight {weight}' if weight else 'no regularizer'}": {
        "make_loss": make_loss,
        "weight": weight,
    }
    for name, make_loss in (("SoftTriple", soft_triple), ("MultiProxyEntropy", ours))
    for weight in (0, 0.1, 1)
}


@torch.no_grad()
def sibling_cosine(loss_func):
    proxies = loss_func.fc.T.unflatten(0, (10, K)) if isinstance(loss_func, SoftTripleLoss) else loss_func.proxies
    directions = torch.nn.functional.normalize(proxies, dim=-1)
    cosines = directions @ directions.mT
    return ((cosines.sum() - 10 * K) / (10 * K * (K - 1))).item()


def main(argv=None):
    args = make_parser(__doc__, seeds=3).parse_args(argv)
    data = Data(args.data)

    def run(seed, make_loss, weight):
        regularizer = {"weight_regularizer": ProxyEntropyRegularizer(K), "weight_reg_weight": weight} if weight else {}
        head, loss_func = ResidualHead(), make_loss(**regularizer)
        train(data.x_train, data.domain_train, head, loss_func, make_optimizer(head, loss_func), epochs=10)
        return {"sibling_cosine": sibling_cosine(loss_func), "map_at_r": map_at_r(data, head)}

    rows = run_all("regularizer", CONFIGURATIONS, args.seeds, run)
    publish("regularizer", rows, CONFIGURATIONS, {"sibling_cosine": "sibling cosine", "map_at_r": "MAP@R"})


if __name__ == "__main__":
    main()
