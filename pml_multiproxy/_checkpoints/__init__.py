"""Checkpoints of all ranks together: written whole or not at all, loaded whole or not at all.

Two files for what users call, on what the others offer:

- ``saving``: :func:`~pml_multiproxy.distributed.save_checkpoint`.
- ``loading``: :func:`~pml_multiproxy.distributed.load_checkpoint`.
- ``fail_together``: an error on one rank becomes one on every rank.
- ``folders``: the folder of a step, which appears when it is complete.
- ``checksums``: whether a file has changed since it was saved.
- ``files``, ``metadata``: the files of PyTorch's distributed checkpoints, read without executing anything.
- ``optimizer_state``: an optimizer's state by the names of its parameters.
- ``room``: the memory that a checkpoint is read into, if it fits.
- ``settings``: those of the losses, to notice others.
- ``target``: the module and optimizer that it replaces, all or nothing.
"""
