"""Benchmarks: one case table, one runner, one report; the peers are optional.

``cases`` says what is measured, ``inputs`` makes it, ``providers`` and ``peers`` are the
contenders, ``runner`` times them (``memory`` weighs them, each in a process of its own), ``report``
turns the numbers into Markdown and plots. From a checkout: ``python -m bench --preset quick``.
"""
