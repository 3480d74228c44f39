"""What decode.py says of what it measured: rows, ratios and tables."""

import statistics

from benchmarks.speed.workers import Worker

MB = 1e6


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def bytes_to_move(facts: dict, state: dict) -> int:
    """What one step must read: every weight once, and the keys and values of all held tokens."""
    return facts["weight_bytes"] + state["kv_bytes"]


def make_row(worker: Worker, cell: dict, fill: dict, turns: list[dict], bandwidth: float) -> dict:
    """A row of the table, with times in seconds.

    cell: batch and length; fill, turns: the worker's answers to `fill` and `steps`; bandwidth: in
    bytes per second.
    """
    row = {"system": worker.label, "policy": worker.policy, **cell}
    problem = next((x for x in (fill, *turns) if "error" in x), None)
    if problem is not None:
        row["out_of_memory"] = problem.get("out_of_memory", False)
        return {**row, "error": problem["error"]}
    steps = [seconds for turn in turns for seconds in turn["step_seconds"]]
    low, middle, high = quartiles(steps)
    last = turns[-1]
    # Between the first and the last step the cache grows by one token a step.
    mean = {"kv_bytes": (fill["kv_bytes"] + last["kv_bytes"]) / 2}
    move = bytes_to_move(worker.facts, mean)
    row |= {
        "first_token_seconds": fill["seconds"],
        "step_seconds": middle,
        "step_quartiles": [low, high],
        "turn_medians": [statistics.median(turn["step_seconds"]) for turn in turns],
        "tokens_per_second": cell["batch"] / middle,
        "tokens_held": last["tokens"],
        "kv_bytes": last["kv_bytes"],
        "kv_allocated": last["kv_allocated"],
        "memory_peak": max(turn["peak"] for turn in (fill, *turns)),
        "bytes_to_move": move,
        "bandwidth": bandwidth,
        "bound_seconds": move / bandwidth,
        "reached": move / bandwidth / middle,
        "chosen": last["chosen"],
    }
    if rounds := fill.get("round_seconds"):
        row["round_seconds"] = statistics.median(rounds)
        row["step_with_rounds"] = middle + row["round_seconds"] / worker.settings["interval"]
    return row


def find(rows: list[dict], **keys) -> dict | None:
    """The row with these values, if it has figures."""
    matches = (r for r in rows if all(r.get(key) == value for key, value in keys.items()))
    return next((row for row in matches if "error" not in row), None)


def baseline(rows: list[dict], row: dict) -> dict | None:
    """Our full cache at the same batch and length, in the row's mode. Other engines are compared
    with the compiled one, where there is one."""
    modes = ["ours compiled", "ours eager"]
    if row["system"].startswith("ours"):
        modes = [row["system"]]
    cell = {"batch": row["batch"], "length": row["length"], "policy": "full"}
    found = (find(rows, system=mode, **cell) for mode in modes)
    return next((one for one in found if one is not None), None)


def speedup(of: dict, against: dict, together: bool = True) -> float:
    """How many times as fast `of` is.

    together: the two took turns, so the machine was the same, and the median of the turns' ratios
    counts. Otherwise it is the ratio of the medians.
    """
    if not together:
        return against["step_seconds"] / of["step_seconds"]
    pairs = zip(against["turn_medians"], of["turn_medians"], strict=True)
    return statistics.median(b / a for b, a in pairs)


HEADER = (
    "| batch | length | system | policy | held | ms a step | quartiles | with rounds | tokens/s | "
    "x full | first token s | KV MB | peak MB | must move MB | bound ms | reached |\n"
    "|---:|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def table_row(row: dict) -> str:
    """A line of the table."""
    head = f"| {row['batch']} | {row['length']:,} | {row['system']} | {row['policy']} |"
    if "error" in row:
        said = "out of memory" if row.get("out_of_memory") else row["error"]
        return head + f" {said} |" + " |" * 11
    low, high = (1e3 * seconds for seconds in row["step_quartiles"])
    rounds = f"{1e3 * row['step_with_rounds']:.2f}" if "step_with_rounds" in row else ""
    ratio = f"{row['times_full']:.2f}" if row.get("times_full") else ""
    cells = [
        f"{row['tokens_held']:,.0f}",
        f"{1e3 * row['step_seconds']:.2f}",
        f"{low:.2f} to {high:.2f}",
        rounds,
        f"{row['tokens_per_second']:.1f}",
        ratio,
        f"{row['first_token_seconds']:.2f}",
        f"{row['kv_bytes'] / MB:,.1f}",
        f"{row['memory_peak'] / MB:,.0f}",
        f"{row['bytes_to_move'] / MB:,.0f}",
        f"{1e3 * row['bound_seconds']:.2f}",
        f"{row['reached']:.0%}",
    ]
    return f"{head} {' | '.join(cells)} |"


def by_batch(rows: list[dict]) -> str:
    """Throughput and peak memory, with a row per policy and a column per batch size, as in the
    paper's tables 2 and 3 (arXiv 2511.06029)."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    lines = []
    for length in dict.fromkeys(row["length"] for row in rows):
        for title, key, scale, form in (
            ("tokens/s", "tokens_per_second", 1, "{:,.1f}"),
            ("peak GB", "memory_peak", 1e9, "{:,.2f}"),
        ):
            lines += ["", f"{title} at {length:,} tokens by batch size", ""]
            lines.append("| system | policy | " + " | ".join(map(str, batches)) + " |")
            lines.append("|---|---|" + "---:|" * len(batches))
            for system, policy in dict.fromkeys((row["system"], row["policy"]) for row in rows):
                cells = []
                for batch in batches:
                    keys = {"system": system, "policy": policy, "batch": batch, "length": length}
                    row = next((r for r in rows if r.items() >= keys.items()), None)
                    cells.append(_figure(row, key, scale, form))
                lines.append(f"| {system} | {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(row: dict | None, key: str, scale: float, form: str) -> str:
    """One figure of a row, or what stands in its place."""
    if row is None:
        return "-"
    if "error" in row:
        return "out of memory" if row.get("out_of_memory") else "-"
    return form.format(row[key] / scale)


def agreement(rows: list[dict]) -> list[str]:
    """How many tokens, from the start, every system chose as our full cache did.

    Engines round bfloat16 differently, so texts part at some point. A system that disagrees at once
    runs other weights.
    """
    lines = []
    for row in rows:
        base = None if "error" in row else baseline(rows, row)
        if base is None or row["system"].startswith("ours"):
            continue
        if row["batch"] != 1 or row["policy"] != "full":
            continue
        pairs = list(zip(base["chosen"], row["chosen"], strict=False))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        where = f"{row['system']} {row['policy']} at {row['length']:,}"
        lines.append(f"{where}: the first {same} of {len(pairs)} tokens are ours")
    return lines
