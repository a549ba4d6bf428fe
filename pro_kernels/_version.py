"""The version, alone in a file that the build can read without torch."""

__version__ = "0.2.0"
