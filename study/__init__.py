"""``python -m study``: is PRO better than SFT on the best, and do longer lists help?

``task`` is a made-up task with a known reward, ``known`` the methods compared on it, ``real`` PRO
on real ranked lists, ``training`` what both train with, ``run`` all of it in worker processes, and
``report`` and ``plots`` make a page of the results.
"""
