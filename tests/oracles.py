"""What is right, said slowly: plain Python on lists and floats, one definition after the other.

Nothing here is shared with the package or shaped like it. Where the package sorts, these rank with
tuples; where it iterates, these solve exactly, in fractions. The tests hold the two equal.
Scores are lists, a head's slots in the order of the text; `newer` means a later slot.
"""

import math
from fractions import Fraction

# -- arXiv 2511.06029 ------------------------------------------------------------------------------


def hoyer(values):
    """Eq. 1. One value, or none that is not zero, is as uniform as can be: 0."""
    root = math.sqrt(len(values))
    if len(values) < 2 or max(values) == 0:
        return 0.0
    return (root - math.fsum(values) / math.hypot(*values)) / (root - 1)


def breakpoint(ranked, segments, tau, kind):
    """Algorithm 1's breakpoint in scores that fall, or None. Parts that are empty are dropped."""
    n = len(ranked)
    parts = [(n * i // segments, n * (i + 1) // segments) for i in range(segments)]
    parts = [(start, stop) for start, stop in parts if start < stop]
    if kind == "global":
        found = [start for start, _ in parts if start > 0 and ranked[0] > tau * ranked[start]]
    elif kind == "segment":
        found = [start for start, stop in parts if ranked[start] <= tau * ranked[stop - 1]]
    else:
        found = []
    return found[0] if found and found[0] > 0 else None


def rasr(masses, gamma):
    """Eq. 5 of one token that received these masses, oldest first."""
    return math.fsum(mass * gamma ** (len(masses) - 1 - t) for t, mass in enumerate(masses))


# -- budgets ---------------------------------------------------------------------------------------


def fair_shares(total, weights, floors, holds):
    """The shares before rounding, in fractions: water-filling between floors and holds.

    Layer i gets clamp(level * weight, floor, hold), at the one level where they add up. The sum is
    piecewise linear in the level, so it is bisected over the levels where a layer meets a bound.
    """
    weights = [Fraction(w) for w in weights]
    if sum(weights) <= 0:
        weights = [Fraction(1)] * len(weights)
    floors = [min(f, h) for f, h in zip(floors, holds, strict=True)]
    total = min(max(total, sum(floors)), sum(holds))

    def at(level):
        return [
            min(max(level * w, Fraction(f)), Fraction(h))
            for w, f, h in zip(weights, floors, holds, strict=True)
        ]

    levels = {Fraction(0)}
    levels |= {Fraction(b) / w for bs in (floors, holds) for b, w in zip(bs, weights) if w}  # noqa: B905
    levels = sorted(levels)
    low, high = 0, len(levels) - 1
    top = sum(at(levels[high]))
    if top < total:  # all that have weight are full: those without any share the rest evenly
        idle = [i for i, w in enumerate(weights) if not w]
        rest = fair_shares(
            total - sum(x for i, x in enumerate(at(levels[high])) if i not in idle),
            [1] * len(idle),
            [floors[i] for i in idle],
            [holds[i] for i in idle],
        )
        shares = at(levels[high])
        for i, share in zip(idle, rest, strict=True):
            shares[i] = share
        return shares
    while high - low > 1:
        middle = (low + high) // 2
        if sum(at(levels[middle])) <= total:
            low = middle
        else:
            high = middle
    a, b = sum(at(levels[low])), sum(at(levels[high]))
    step = 0 if a == b else (total - a) / (b - a)
    return at(levels[low] + step * (levels[high] - levels[low]))


def is_largest_remainder(parts, shares, error=Fraction(1, 500)):
    """Are the integers `parts` the exact `shares`, rounded by largest remainder?

    They are if no layer is a whole token further from its share than another. Which of equal
    remainders goes up is free, and so is `error`, what floats may miss.
    """
    off = [part - share for part, share in zip(parts, shares, strict=True)]
    return sum(off) == 0 and max(off) - min(off) <= 1 + error


# -- what a round keeps ----------------------------------------------------------------------------


def best(scores, count, among):
    """The `count` best slots among some, as a set; of equals, the newer. NaN is the worst."""
    value = [-math.inf if math.isnan(score) else score for score in scores]
    return set(sorted(among, key=lambda slot: (value[slot], slot), reverse=True)[:count])


def always(positions, protected, recent, distinct=None, count=0):
    """The slots that stay whatever their scores, a set per head: protected, recent, and of the rest
    the last `count` that are distinct.

    positions: [head][slot]; protected: first positions that stay; recent: last slots that stay;
    distinct: [head][slot] bool, or None.
    """
    slots = range(len(positions[0]))
    stay = [
        {slot for slot in slots if row[slot] < protected or slot >= len(slots) - recent}
        for row in positions
    ]
    for head, mine in enumerate(stay if distinct else ()):
        rest = [slot for slot in slots if slot not in mine and distinct[head][slot]]
        mine |= set(rest[max(0, len(rest) - count) :])
    return stay


def prune(scores, always, share, salient):
    """The slots kept, head by head: those of `always` (a set per head), and the best of the rest.

    scores: [head][slot]; share: slots there are in all; salient: how many of a head's best stand
    out. All heads keep as many as the one that needs most.
    """
    slots = range(len(scores[0]))
    wanted = max(
        len(stay | best(row, salient, slots)) for row, stay in zip(scores, always, strict=True)
    )
    target = max(min(share, wanted), *(len(stay) for stay in always))
    return [
        sorted(stay | best(row, target - len(stay), sorted(set(slots) - stay)))
        for row, stay in zip(scores, always, strict=True)
    ]


def repeats(keys, near):
    """[slot] -> the highest cosine of each key, less the mean of all, with a newer one that is
    among the last `near`; 0 where none is alike."""
    n, mean = len(keys), [math.fsum(column) / len(keys) for column in zip(*keys, strict=True)]
    keys = [[x - y for x, y in zip(key, mean, strict=True)] for key in keys]
    norms = [math.sqrt(dot(key, key)) or 1.0 for key in keys]
    most = [
        max(
            (dot(keys[i], keys[j]) / norms[i] / norms[j] for j in range(max(i + 1, n - near), n)),
            default=0.0,
        )
        for i in range(n)
    ]
    return [max(0.0, cosine) for cosine in most]


# -- the other policies' scores --------------------------------------------------------------------


def softmax(logits):
    top = max(logits)
    powers = [math.exp(x - top) for x in logits]
    return [x / math.fsum(powers) for x in powers]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def logits(query, keys, seen):
    """A query against the keys; -inf where it may not look. seen: [slot] bool."""
    scale = math.sqrt(len(query))
    return [dot(query, k) / scale if s else -math.inf for k, s in zip(keys, seen, strict=True)]


def pooled(values, kernel, how):
    """A window of `kernel` slots around each; the mean counts slots beyond the ends as zeros."""
    reach = kernel // 2
    around = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [max(part) if how == "max" else math.fsum(part) / kernel for part in around]


def tova(queries, keys, seen):
    """Mean attention of the last query over all heads (arXiv 2401.06104).

    queries: [group][query of the group][D], keys: [group][slot][D], seen: [group][slot].
    """
    rows = [
        softmax(logits(query, k, s))
        for group, k, s in zip(queries, keys, seen, strict=True)
        for query in group
    ]
    return [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]


def snapkv(queries, keys, seen, kernel):
    """One KV head's score (arXiv 2404.14469): the mass of a window of queries, average-pooled.

    queries: [query of the group][time][D], keys: [slot][D], seen: [time][slot].
    """
    rows = [
        softmax(logits(query, keys, s))
        for times in queries
        for query, s in zip(times, seen, strict=True)
    ]
    return pooled([math.fsum(column) for column in zip(*rows, strict=True)], kernel, "mean")


def redundancy(keys, threshold=0.5):
    """One head's redundancy (arXiv 2505.24133): softmax of a key's mean cosine with all others,
    where each other that is alike to several keys forgives the latest of them."""
    n, norms = len(keys), [math.hypot(*key) for key in keys]
    total = [0.0] * n
    for i in range(n):
        cosines = {j: dot(keys[i], keys[j]) / (norms[i] * norms[j]) for j in range(n) if j != i}
        alike = [j for j, cosine in cosines.items() if cosine > threshold]
        for j, cosine in cosines.items():
            if not alike or j != max(alike):
                total[j] += cosine
    return softmax([x / n for x in total])


def rkv(queries, keys, seen, kernel, lam):
    """One KV head's score (arXiv 2505.24133): queries, keys, seen as for snapkv."""
    rows = []
    for t, s in enumerate(seen):
        heads = [logits(times[t], keys, s) for times in queries]
        rows.append(softmax([max(column) for column in zip(*heads, strict=True)]))
    mean = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    parts = zip(pooled(mean, kernel, "max"), redundancy(keys), strict=True)
    return [lam * importance - (1 - lam) * repeat for importance, repeat in parts]
