"""Everything that needs a GPU, in one command: ``python -m bench gpu --out FOLDER``.

Offline, with the torch and Triton that are there; ``make bench-gpu`` is the same. FOLDER gets
``gpu.json`` and ``gpu.md`` (builds, tests, kernels beside what their bytes take at the rate of a
copy) and, of the loss's preset ``gpu`` with every peer that is installed, ``results.json``,
``report.md`` and plots; ``step`` the same of training steps of a model of half a billion
parameters. ``kernels`` is what is measured of one backend, ``jobs`` runs it and the other commands
against the clock.
"""
