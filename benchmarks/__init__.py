"""Measurements of speed, memory and error. gpu/ holds those that `make gpu-check` runs on a GPU."""
