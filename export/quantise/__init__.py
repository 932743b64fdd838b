"""Models with convolutions in 8 bits, as many as a loss of quality allows."""
