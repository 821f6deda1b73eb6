"""A real language model as teacher and student: does the calibration help there? See compare.py."""
