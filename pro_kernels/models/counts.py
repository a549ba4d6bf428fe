"""What the models of this process left out so far."""

from __future__ import annotations

from collections import Counter

# padded_tokens, run_tokens: of batches that ran distinct rows, as in ``Distinct``.
# lazy_rows: rows that ``LazyLogits`` stood for; made_rows: those of which logits were made.
COUNTS: Counter[str] = Counter()
