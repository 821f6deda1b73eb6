"""A teacher on disk: its answers in files, found by the tokens that were asked about.

`files` writes and reads them, `verify` checks them, `command` is `python -m vcrd cache`.
"""
