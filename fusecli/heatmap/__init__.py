"""Attention ``[H, N, M]`` becomes something to look at: numbers, pictures, pages."""
