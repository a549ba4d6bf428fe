"""What scores candidates: one file for each kind of reward."""
