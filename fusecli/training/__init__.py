"""Weights learned from pairs: data in memory, objectives, the loop, and an honest table at the end.

From the outside in:

- `recipe`: how it goes unless told otherwise; `run`: a training from beginning to end; `files`: what lies beside a
  checkpoint; `keeper`: keeps a run there; `loop`: learning, epoch by epoch; `optim`: the optimizers;
- `start`: where new weights begin; `table`: what the trained fusion is worth, beside what could be used instead;
- `labels`: labels from a table; `targets`: what there is to learn; `objective`: classes and numbers; `match`: which
  picture belongs to a text;
- `represent`: what stands for a pair, one vector; `data`: features of all pairs, and batches of them.
"""
