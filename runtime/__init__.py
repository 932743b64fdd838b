"""Backends, tiling, picture files and the run pipeline."""
