"""A plan as pure data, from headers alone: shards of tensors, tensors of pieces of source files; and the manifest.

To add a computation, add a class to ``Piece`` in ``pieces.py`` with a row in ``json.py``, and a ``case`` in
``write/transforms.py`` and in ``verify/expected.py``; mypy names the places that miss it.
"""
