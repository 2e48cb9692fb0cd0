"""The verb tune: the fastest launch options on this GPU, for quarkconv's kernels or for an engine's own kernel.

shapes    a checkpoint's headers -> what one rank has of its experts
grid      the tiles worth timing for a shape and a number of tokens
search    the fastest tile by few measurements
tables    the files that engines read; where they are; what was measured beside them
kernels   an engine's kernel, called on random weights
tune      all of it

To add an engine: a class in ``kernels`` and a row of its ``ENGINES``.
"""
