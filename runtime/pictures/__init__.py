"""Picture files: formats, decoding and encoding, object stores, what a run reads and writes."""
