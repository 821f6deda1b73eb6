"""What a run with a teacher will cost, before it is started: `python -m vcrd plan`.

`traffic` says which bytes go from whom to whom, `costs` what that takes in seconds, memory and GPUs, `choice` which
payload is the best. Pure functions of a `Scenario`; nothing here opens a connection.
"""
