"""Training and evaluation of the small reasoner that ships in lethe_mini/reasoner."""
