"""One training step: the official procedure and TRL's DPO against the trainer's, the same lists.

``python -m bench --training``. ``cases`` says what is measured, ``workload`` makes model and lists,
``providers`` and ``pairs`` (DPO) make the steps of ``steps``, ``truth`` says what they must give,
``runner`` times them (``weigh``: their memory, each in a process of its own), ``targets``,
``tables`` and ``plots`` make the report.
"""
