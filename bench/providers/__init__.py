"""The contenders, a file each (``base`` says what one is)."""
