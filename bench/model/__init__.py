"""What the kernels should cost on a card: predictions, from its copy bandwidth and matmul rate.

``cards`` (the numbers of a card), ``costs`` (bytes, flops, launches of every case), ``occupancy``
(warps an SM holds), ``resources`` (registers and shared memory, read from the built binaries),
``page`` (docs/performance.md). ``python -m bench --model`` prints the tables.
"""
