"""How a picture goes through the network: whole, streamed exactly, or in overlapped tiles."""
