"""Preference losses on a real model and real ranked lists, side by side.

Every method starts from the same model, sees the same lists in the same number of optimizer steps,
and is measured on the same held-out lists. ``run`` trains and scores, ``report`` makes page and
plot of what was found. Only numbers leave the study: no text of the data is kept.
"""
