"""The recipe that made the bundled weights; never in the wheel."""
