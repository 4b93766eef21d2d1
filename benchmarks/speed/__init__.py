"""Time and memory of a step, beside PML's losses and three bare matrix products."""
