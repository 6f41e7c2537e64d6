"""Measurements: kernels and whole training steps beside their peers. `make bench` runs all of it."""
