"""How the head loss scales over ranks, measured on two CPU cores over gloo, and what they send.

``wire`` (the bytes of a step's collectives), ``measure`` and ``worker`` (gloo runs on this
machine). ``python -m bench ranks`` measures and rewrites the block of docs/scaling.md.
"""
