"""DPO in other people's frameworks, with ``pro-kernels run`` and without.

``table`` says what is installed and run, ``prepare`` makes the environments, the model and the
data, ``measure`` runs. ``make frameworks`` does all of it; Linux only.
"""
