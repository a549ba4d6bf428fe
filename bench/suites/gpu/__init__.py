"""What a card must tell us, in one command: ``python -m bench gpu`` (``make gpu-round``).

``parts`` is what is measured, in order; ``kernels`` are the kernels alone; ``jobs`` runs them
against the clock, offline, with the torch and Triton that are there.
"""
