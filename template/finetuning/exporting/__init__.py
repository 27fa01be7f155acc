"""Base model and adapter as one model: merged, int4 ONNX, and the comparison that an export must pass.

Belongs here: code that converts a finished run for another program.
"""
