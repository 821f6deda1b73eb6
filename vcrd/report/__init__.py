"""What a run did, as one page: `python -m vcrd report`.

`run` reads what its ranks wrote, `charts` draws, `page` puts it together. Needs matplotlib, and no torch.
"""
