"""Bytes on a disk: the files of a model, JSON files, system limits, the page cache."""
