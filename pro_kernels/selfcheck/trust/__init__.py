"""Paths here, and peers, against fp64: ``pro-kernels check --full``, and ``check`` on one batch."""
