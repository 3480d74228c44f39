"""What several benchmarks share: results, the machine's name, policies by name, prompts, plots."""
