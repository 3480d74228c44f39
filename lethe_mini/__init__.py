"""lethe-mini: a reference engine for Lethe, KV-cache pruning for long reasoning (arXiv 2511.06029)."""
