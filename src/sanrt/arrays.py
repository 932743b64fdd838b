"""The array type that the network takes and gives."""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
"""float32, mostly (B, C, H, W)."""
