"""Carrying a plan out: pieces to segments, threads, direct I/O, checksums, staging, resuming. Nothing is decided here.

    write.py           any mode: whole.py alone, shares.py and joining.py with other processes, on_ray.py on a cluster
    ranks.py           several plans, one for each rank
    execution.py       one plan, its source and its output: opened, compared, begun, resumed or joined
    executor.py        threads that write shards, segment by segment; claims.py deals the segments out
    destination.py     what an output is: output_directory.py, staging.py; output_objects.py, object_destination.py
    source.py          what a source is: source_files.py, remote_source.py

To add a kind of source, implement ``Source`` (``source.py``); to add a computation, see :mod:`quarkconv.plan`.
"""
