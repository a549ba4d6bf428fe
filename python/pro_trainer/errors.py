"""What stops a run."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """The run had to stop: loss, gradient or weights are no longer finite numbers."""
