"""Carrying a plan out: pieces to segments, threads, direct I/O, checksums, staging, resuming."""
