"""What starting by k-means does to the first epochs and to the end result (see clinc.py for the task).

Writes results/kmeans_start.csv, one row per run, goes on from what it holds, and makes results/kmeans_start.md of it.
"""

from pml_multiproxy import MultiProxyEntropyLoss

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

EPOCHS = (1, 2, 5, 10, 20)
CONFIGURATIONS = {
    f"K={k}, {start}": {"proxies_per_class": k, "start": start} for k in (10, 30) for start in ("random", "k-means")
}


def main(argv=None):
    args = make_parser(__doc__, seeds=3).parse_args(argv)
    data = Data(args.data)

    def run(seed, proxies_per_class, start):
        head, loss_func = ResidualHead(), MultiProxyEntropyLoss(10, SIZE, proxies_per_class)
        if start == "k-means":
            loss_func.init_proxies(data.x_train, data.domain_train)
        results = {}

        def after_epoch(epoch):
            if epoch in EPOCHS:
                results[f"epoch_{epoch}"] = map_at_r(data, head)

        train(
            data.x_train,
            data.domain_train,
            head,
            loss_func,
            make_optimizer(head, loss_func),
            max(EPOCHS),
            after_epoch=after_epoch,
        )
        return results

    rows = run_all("kmeans_start", CONFIGURATIONS, args.seeds, run)
    publish("kmeans_start", rows, CONFIGURATIONS, {f"epoch_{epoch}": f"MAP@R after epoch {epoch}" for epoch in EPOCHS})


if __name__ == "__main__":
    main()
