"""The verb convert: planner, conversion, ranks, model card.

To add a target: one file in :mod:`quarkconv.targets`; nothing here changes.
"""
