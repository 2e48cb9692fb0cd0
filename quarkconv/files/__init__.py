"""Bytes on a disk: the files of a model, JSON files, system limits, the page cache; ranges of remote files over HTTP.

To add a storage: implement :class:`quarkconv.files.base.Files` and return it from :func:`quarkconv.hub.locate.locate`.
"""
