"""Dividing a total over layers: whole tokens that add up exactly, within every layer's bounds."""


def split_budget(
    total: int, weights: list[float], floors: list[int], holds: list[int]
) -> list[int]:
    """Divides `total` tokens over layers in proportion to `weights`, exactly, by largest remainder.

    No layer gets more than it holds nor less than its floor (or what it holds, if that is less).
    The parts add up to `total`, unless the floors need more or the layers hold less.
    """
    floors = [min(floor, hold) for floor, hold in zip(floors, holds, strict=True)]
    total = min(max(total, sum(floors)), sum(holds))
    # A layer's share is level * weight, held within its bounds; more level, more in all. The tiny
    # weight that everyone has lets a layer of weight 0 take what the others cannot hold.
    most = max(weights) or 1.0
    weights = [max(weight / most, 1e-9) for weight in weights]
    low, high = 0.0, (max(holds) + 1) / min(weights)
    for _ in range(100):
        level = (low + high) / 2
        bounds = zip(weights, floors, holds, strict=True)
        shares = [min(max(level * weight, floor), hold) for weight, floor, hold in bounds]
        low, high = (level, high) if sum(shares) < total else (low, level)
    parts = [int(share) for share in shares]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - shares[i])
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def pyramid(layers: int, beta: float = 20.0) -> list[float]:
    """Weights that fall linearly from the first layer to the last, mean 1 (arXiv 2406.02069)."""
    low, high = 1 / beta, 2 - 1 / beta
    return [high - (high - low) * i / max(1, layers - 1) for i in range(layers)]
