"""One training step: the official procedure against the trainer's, the same lists and weights.

``python -m bench --training``. ``cases`` says what is measured, ``providers`` makes the steps,
``runner`` times them (``weigh``: their memory, each in a process of its own), ``targets``,
``tables`` and ``plots`` make the report.
"""
