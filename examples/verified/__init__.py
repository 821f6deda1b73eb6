"""External validity: an exact verifier of worked arithmetic, and a data set of the student's own samples."""
