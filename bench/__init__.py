"""Benchmarks: one case table, one runner, one report; the peers are optional.

``cases`` and ``presets`` say what is measured, ``inputs`` makes it and its fp64 truth,
``providers`` names the contenders (``formulations``: floors, ours, plain PyTorch; ``peers``: other
libraries), ``runner`` goes through the cases (``case_run`` times one, ``memory`` weighs providers,
each in a process of its own, ``ceilings`` measures the machine), ``report`` turns the numbers into
Markdown (``tables``, ``targets``) and plots (``plots``, ``curves``), ``compare`` sets two runs
against each other. ``training`` does the same for whole training steps, ``gpu`` runs all that
needs a GPU, ``model`` predicts, ``scaling`` goes over ranks, ``frameworks`` runs other people's
trainers. From a checkout:
``python -m bench --preset cpu-small``.
"""
