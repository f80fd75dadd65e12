"""Weights learned from pairs: data in memory, objectives, the loop, and an honest table at the end."""
