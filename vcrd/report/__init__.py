"""Makes one page of a run from its records: `python -m vcrd report`.

`run` reads the records, `bins` reduces them, `charts` draws them, and `page` writes the HTML. Needs matplotlib
and no torch.
"""
