"""The trainer: options, loss, steps, checkpoints, several ranks."""
