"""From token ids to batches of rows, and which lists stand in them."""
