"""The paper's BI degradation, as the training uses it; it ships with the package, where quantisation is judged with it."""

from sanrt.export.bicubic import bicubic, degrade, resize_matrix

__all__ = ["bicubic", "degrade", "resize_matrix"]
