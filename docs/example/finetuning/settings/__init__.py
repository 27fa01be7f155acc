"""olive-config.yaml, read once into one frozen object; what may stand in it, and why the rest may not.

What enters reads, checks or hands on settings. Every room above takes the Settings object, never the file.
"""
