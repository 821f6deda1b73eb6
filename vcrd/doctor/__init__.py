"""Whether a run will work here, asked before it is started: `python -m vcrd doctor`.

Each check is a small function of a `Job` that returns `Finding`s: what was looked at, what was found, and for a fault
the fix. `examination` runs them and gathers those of all processes, `table` shows them. Nothing here changes the
machine: what a check writes it removes again, but for the folder of --run-dir, and what it starts it ends.
"""
