"""What a run will need, before it starts: hardware, model facts, token counts, memory, time, cost and advice.

What enters looks or calculates; it trains nothing and downloads nothing.
"""
