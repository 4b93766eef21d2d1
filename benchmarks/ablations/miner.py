"""What MultiProxyMiner does to a pair loss that is trained on coarse labels (see clinc.py for the task).

MultiSimilarityLoss alone, MultiProxyEntropyLoss alone, and both together with the miner. Writes results/miner.csv, one
row per run, goes on from what it holds, and makes results/miner.md of it.
"""

from pytorch_metric_learning.losses import MultipleLosses, MultiSimilarityLoss

from pml_multiproxy import MultiProxyEntropyLoss
from pml_multiproxy.miners import MultiProxyMiner

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

CONFIGURATIONS = {
    "frozen features": {"make_loss": None},
    "MultiSimilarity": {"make_loss": MultiSimilarityLoss},
    **{f"MultiProxyEntropy, K={k}": {"make_loss": lambda k=k: MultiProxyEntropyLoss(10, SIZE, k)} for k in (10, 30)},
    **{
        f"K={k} + {weight} MultiSimilarity, {how}": {"make_loss": lambda k=k, w=weight, how=how: joined(k, w, how)}
        for k in (10, 30)
        for weight, how in ((0.1, "all pairs"), (0.1, "with the miner"), (0.3, "with the miner"))
    },
}


def joined(proxies_per_class, weight, how):
    proxy_loss = MultiProxyEntropyLoss(10, SIZE, proxies_per_class)
    miner = MultiProxyMiner(proxy_loss) if how == "with the miner" else None
    return MultipleLosses([proxy_loss, MultiSimilarityLoss()], miners=[None, miner], weights=[1, weight])


def main(argv=None):
    parser = make_parser(__doc__, seeds=5)
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="default: %(default)s")
    args = parser.parse_args(argv)
    data = Data(args.data)

    def run(seed, make_loss):
        head = ResidualHead()
        if make_loss is not None:
            loss_func = make_loss()
            train(data.x_train, data.domain_train, head, loss_func, make_optimizer(head, loss_func), args.epochs)
        return {"map_at_r": map_at_r(data, head)}

    rows = run_all("miner", CONFIGURATIONS, args.seeds, run)
    publish("miner", rows, CONFIGURATIONS, {"map_at_r": "MAP@R"})


if __name__ == "__main__":
    main()
