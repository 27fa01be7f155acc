"""What a run needs, estimated before it starts: hardware, model facts, token counts, memory, time, cost and advice.

Belongs here: code that inspects or calculates; it downloads nothing, and trains only the demo model.
"""
