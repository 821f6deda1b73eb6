"""Checks, before a run starts, whether it will work here: `python -m vcrd doctor`.

Each check is a small function that takes a `checks.Job` and returns `Finding`s: what was looked at, what was seen, and
for a problem the fix. `examination` runs all checks and gathers the findings of all processes; `findings` merges them
into one table. The modules `gpus`, `packages`, `extension`, `environment`, `network` and `link` hold the checks.

The doctor does not change the machine. It removes every file that it writes, except the folder of --run-dir, and ends
every process and thread that it starts.
"""
