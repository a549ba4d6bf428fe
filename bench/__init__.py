"""Benchmarks: one engine, suites of cases, a file a provider, one report.

``engine`` (cases and their truth, the interleaved rounds, memory, the results file), ``suites``
(what is measured), ``providers`` (who takes part), ``report`` (tables, plots and pages),
``roofline`` (what the machine can do), ``trust`` (the peers of ``pro-kernels check --full``),
``cli``.

    python -m bench loss --preset cpu-small
"""
