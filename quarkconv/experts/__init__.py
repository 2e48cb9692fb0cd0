"""Routed experts: their names, layouts and ranks, and what the model's config says about them.

To add an expert naming, add one row to ``NAMINGS`` in ``naming.py``.
"""
