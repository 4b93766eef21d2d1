"""Proxies spread over the processes of a group: what these tell each other in a step."""
