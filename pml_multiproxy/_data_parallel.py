"""Which option of ``DistributedDataParallel`` says whether processes keep equal buffers, in this version of PyTorch."""

import inspect

from torch.nn.parallel import DistributedDataParallel

SYNC_BUFFERS = "broadcast_buffers"
if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
    SYNC_BUFFERS = "forward_sync_buffers"  # PyTorch 2.13 and newer warn of the other
