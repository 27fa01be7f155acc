"""Olive's pass with packing, early stopping and progress; batches and their loss, checkpoints, tiny models.

What enters changes weights or is needed while weights change. It measures nothing and prints only progress.
"""
