"""Many pairs: from ids to results, and a record of what was done.

From the outside in:

- `request`: what is asked for; `run`: a batch from beginning to end; `summary`: what came of it; `ledger`: what was
  done with every pair; `lock`: who may write; `gather`, `order`, `stacks`: parts become one file;
- `feed`, `manifest`: where pairs come from; `plan`: which pairs there are, and which go together;
  `apart`: no result over an input;
- `local`, `inline`: where it is done, in processes or beside a GPU; `worker`, `together`: one item, on the CPU or
  on a GPU;
- `store`: where results go; `job`: the words that all of them share.

Work crosses processes as places and comes back as outcomes, never as arrays. A runner is one function
from items to outcomes: `Pool.run`, or `inline.run`.
"""
