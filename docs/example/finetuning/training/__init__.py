"""Olive's pass with packing, early stopping and progress; batches and their loss, checkpoints, tiny models.

Belongs here: code that changes weights or is needed meanwhile. It measures nothing and prints only progress.
"""
