"""Files → rows → conversations → tokens and labels: everything that happens to the data before a model sees it.

Olive's user script is dataset.py. Belongs here: code that reads or converts data, without settings file or model.
"""
