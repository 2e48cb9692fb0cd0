"""A model on ModelScope: its listing and byte ranges, over its HTTP API. It is only read.

Built from the source of ModelScope's own client (``modelscope_hub`` 0.5.1: ``_legacy_api.py``, ``_download.py``,
``config.py``); not run against the service.
"""
