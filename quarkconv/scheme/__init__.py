"""The scheme of modules: declared by the config, stored in the tensors, and both resolved.

To add a config format, write a reader in ``formats/`` and add one row to ``READERS``.
"""
