"""Runs over many pictures: the pipeline, its record, Ray, estimates, and what this machine can do."""
