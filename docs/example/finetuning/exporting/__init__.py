"""Base model and adapter as one model: merged, small ONNX, and the comparison that an export must pass.

Belongs here: code that converts a finished run for another program.
"""
