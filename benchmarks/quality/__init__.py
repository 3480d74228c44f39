"""How well a model reads and reasons with a pruned cache, at an equal number of tokens held."""
