"""Launchers: grids, constants and buffers of the kernels in `jit`, each beside its torch twin.

To add one: a function that imports its kernel when it is called, and `*_reference`, which computes the same in torch.
"""
