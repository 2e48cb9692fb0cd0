"""Shared by several tests: small checkpoints, servers, programs."""
