"""Files → rows → conversations → tokens and labels: everything that happens to the data before a model sees it.

Olive's user script is here (dataset.py). What enters reads or turns data; it knows no settings file and no model.
"""
