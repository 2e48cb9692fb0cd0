"""Readers of ``quantization_config``, one file a format."""
