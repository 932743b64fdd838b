"""The reference network in PyTorch, its checkpoints, and the description both share with the runtime.

`spec` imports no torch; `san`, `soca`, `attention` and `checkpoint` do.
"""
