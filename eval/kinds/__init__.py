"""The kinds of scorers, one file a family of answers. `mcit.eval.scorers` is their register."""
