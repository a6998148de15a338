"""Partition, combine, merge, quantize and lift; needs jax only."""
