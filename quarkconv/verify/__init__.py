"""The verb verify: structure, bytes, and numbers against references that share no code with the kernels.

To add a routing, add one row to the table in ``routing.py`` and a golden made with the model's own code.
"""
