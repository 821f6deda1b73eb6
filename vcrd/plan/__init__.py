"""Computes the costs of a distillation run before it starts: `python -m vcrd plan`.

`scenario` holds the input, `traffic` counts the bytes between ranks, `costs` computes seconds, memory and GPUs,
`choice` chooses the best payload, and `table` prints the result. They are pure functions of a `Scenario` and
open no connection.
"""
