"""Measurements of speed, memory and error. gpu/ has those that `make gpu-check` runs on a GPU."""
