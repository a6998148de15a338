"""Kernels written by hand, and which products go through them."""
