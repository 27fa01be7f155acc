"""The results of a run: evaluation, the run record (models/run.json), the report and the model card.

Belongs here: code that measures a trained model or writes results.
"""
