"""A miner that looks at the loss, by config."""

from powerful_benchmarker import factories
from powerful_benchmarker.api_parsers.base_api_parser import BaseAPIParser


class MinerFactory(factories.MinerFactory):
    """The benchmarker's, which also passes one of ``loss_funcs`` to a miner that names it as its ``loss_func``."""

    def _create_general(self, miner_type, loss_funcs=None):
        miner, params = self.getter.get("miner", yaml_dict=miner_type, return_uninitialized=True)
        if "loss_func" not in params:
            return super()._create_general(miner_type)
        return miner(**params | {"loss_func": loss_funcs[params["loss_func"]]})


# Arguments that the benchmarker passes to this factory, by the name that it looks for.
BaseAPIParser.default_kwargs_mining_funcs = lambda self: {"loss_funcs": lambda: self.loss_funcs}
