"""Adapters of other training systems, one module for each. Importing vcrd imports none of them.

Only `transformers` and `trl` import their system, whose classes they extend.
"""
