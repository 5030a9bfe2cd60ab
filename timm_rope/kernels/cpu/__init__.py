"""Turning in place on a CPU, by operations of torch."""
