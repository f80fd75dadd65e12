"""Many pairs: what to do (`plan`), doing it (`worker`), where (`local`, `inline`), and what was done (`ledger`).

Work crosses processes as places and comes back as outcomes, never as arrays. A runner is one function,
``run(items, stop) -> outcomes``.
"""
