"""Turning in place on a GPU, by kernels written in Triton."""
