"""The verb inspect: findings, possible targets, and what engines do with the checkpoint.

To add a fact about an engine, add one row to ``engines.toml`` and run ``make docs``.
"""
