"""What the kernels should cost on a card: predictions, from its copy bandwidth and matmul rate.

``cards`` (the numbers of a card), ``costs`` (bytes, flops, launches of every case). The report of a
GPU run sets them beside its times.
"""
