"""From texts to token ids; nothing else in the trainer makes ids."""
