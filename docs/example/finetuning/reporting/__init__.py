"""What a run was worth: evaluation, the run record (models/run.json), the report and the model card.

What enters measures a trained model or writes down results.
"""
