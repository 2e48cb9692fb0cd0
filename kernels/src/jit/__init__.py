"""Jitted code: what runs on the GPU. Import a module of this package only to launch it: it imports Triton.

To add a kernel: a function called `*_kernel` here, whose docstring gives its grid and what one program computes; its
launcher and torch twin in `launch`; a variant in `tests/kernels/compile_ahead.py`.
"""
