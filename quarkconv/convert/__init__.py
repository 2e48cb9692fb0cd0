"""The verb convert: options, planner, conversion, model card.

To add a target: one file in :mod:`quarkconv.targets`; nothing here changes.
"""
