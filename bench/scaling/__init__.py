"""How the head loss scales over ranks: predicted for GPUs, measured on two CPU cores over gloo.

``wire`` (the collectives of a step and what they take), ``predict`` (time and memory of a step by
layout of the ranks), ``measure`` and ``worker`` (gloo runs on this machine), ``page`` and ``plots``
(docs/scaling.md). ``python -m bench.scaling`` prints the predictions and rewrites the page.
"""
