"""What runs here and whether it is right: the commands ``env``, ``check`` and ``check --full``."""
