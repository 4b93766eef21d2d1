"""Proxies spread over the processes of a group: what these tell each other, and checkpoints of such a loss."""
