"""Causal LMs and other people's trainers on the fused loss; a framework is imported when called."""

from __future__ import annotations

from collections import Counter

# What the models of this process left out so far. padded_tokens, run_tokens: of batches that ran
# distinct rows. lazy_rows: that ``LazyLogits`` stood for; made_rows: of which logits were made.
COUNTS: Counter[str] = Counter()
