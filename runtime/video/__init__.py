"""Video files: what is in them, their frames as RGB, encoders, and how parts become one file."""
