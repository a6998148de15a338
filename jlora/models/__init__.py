"""Plain Flax decoders; they know nothing of adapters or of 4-bit weights."""
