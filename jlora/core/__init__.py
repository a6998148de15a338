"""The transform: partition, combine, merge, quantize and lift. Needs jax only."""
