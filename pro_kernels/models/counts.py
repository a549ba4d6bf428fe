"""What the models of this process left out so far."""

from __future__ import annotations

from collections import Counter

# padded_tokens, run_tokens: of batches that ran distinct rows, as in ``Distinct``.
# labelled_tokens: of calls with labels, which make no logits.
COUNTS: Counter[str] = Counter()
