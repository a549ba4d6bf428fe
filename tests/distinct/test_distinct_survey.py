"""``distinct_rows`` on every causal LM of transformers that can be made tiny: exact, or refused.

Slow. Prints how many of each there are, and why models are refused (``-s``).
"""

from __future__ import annotations

import collections
import sys
import warnings
from pathlib import Path

import pytest

import pro_kernels as pk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_distinct_rows import assert_same, batch, run  # noqa: E402

from test_attach_survey import NAMES, tiny_model  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tally():
    found: dict[str, list[str]] = collections.defaultdict(list)
    yield found
    for what, kinds in sorted(found.items()):
        print(f"\n{what}: {len(kinds)}: {', '.join(kinds)}")


@pytest.mark.parametrize("kind", NAMES)
def test_exact_or_refused(kind, tally):
    try:
        model = tiny_model(kind)
        want = {left: run(model, batch(left)) for left in (False, True)}
    except Exception as error:
        tally["not made or not run"].append(kind)
        pytest.skip(f"{type(error).__name__}: {error}"[:200])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pk.distinct_rows(model) as rows:
                found = {left: run(model, batch(left)) for left in (False, True)}
    except ValueError as error:
        assert "distinct rows" in str(error) or "model must be" in str(error), error
        tally["refused"].append(f"{kind} ({str(error).partition(': ')[2][:90]})")
        return
    for left in (False, True):
        assert_same(found[left], want[left], rtol=1e-3)
    tally["exact" if rows.saved else "run as they were"].append(kind)
