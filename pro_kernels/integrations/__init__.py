"""Other people's trainers with the losses of this package."""
