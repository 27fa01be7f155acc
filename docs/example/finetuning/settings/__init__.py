"""olive-config.yaml, read once into one frozen object; which settings are allowed, and why others are refused.

Belongs here: code that reads, checks or passes on settings. The packages above take the Settings object, not the file.
"""
