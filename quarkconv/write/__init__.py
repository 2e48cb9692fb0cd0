"""Carrying a plan out: pieces to segments, threads, direct I/O, checksums, staging, resuming. Nothing is decided here.

To add a kind of source, implement ``Source`` (``source.py``); to add a computation, see :mod:`quarkconv.plan`.
"""
