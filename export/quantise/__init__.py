"""Models with some convolutions in 8 bits: as many as a given loss of quality allows."""
