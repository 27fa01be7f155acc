"""Base model and adapter as one model: merged, int4 ONNX, and the comparison of answers that an export must pass.

What enters converts a finished run for another program.
"""
