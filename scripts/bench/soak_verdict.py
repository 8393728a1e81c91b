"""Checks the samples of a soak: slopes, drifts, and their bounds.

Called by `soak`. It never measures.
"""

import math
import statistics

# Bounds: growth of resident memory in MB/h, and growth of the p99 from the second quarter
# of the judged time to the last.
SLOPE_MAX, DRIFT_MAX = 1.0, 0.05

# Allowed growth of descriptors, because the number of sessions varies between samples.
DESCRIPTORS_SHARE, DESCRIPTORS_SPARE = 0.02, 4

# Shortest judged time and fewest windows. Below them, results are warm-up and noise.
JUDGED_MIN = 1800.0
WINDOWS_MIN = 20


def slope(samples, key, warm_up):
    """Returns (growth per hour, its standard error) by least squares.

    Each process has its own level, because an upgrade starts a new process. None: too few
    samples."""
    by_process = {}
    for one in samples:
        begun = by_process.setdefault(one["pid"], (one["at"], []))
        if one["at"] - begun[0] >= warm_up:
            begun[1].append((one["at"] / 3600.0, one[key]))
    across = products = ups = 0.0
    count = levels = 0
    for _, points in by_process.values():
        if len(points) < 3:
            continue
        middle_x = statistics.fmean(x for x, _ in points)
        middle_y = statistics.fmean(y for _, y in points)
        across += sum((x - middle_x) ** 2 for x, _ in points)
        products += sum((x - middle_x) * (y - middle_y) for x, y in points)
        ups += sum((y - middle_y) ** 2 for _, y in points)
        count, levels = count + len(points), levels + 1
    if across <= 0 or count - levels < 2:
        return None
    found = products / across
    rest = max(0.0, ups - found * products)
    return found, math.sqrt(rest / (count - levels - 1) / across)


def quarters(samples, warm_up):
    """Returns the samples of the second and of the last quarter of the judged time."""
    judged = [one for one in samples if one["at"] >= warm_up]
    if not judged:
        return [], []
    begin, end = judged[0]["at"], judged[-1]["at"]
    place = lambda one: (one["at"] - begin) / max(end - begin, 1e-9)  # noqa: E731
    second = [one for one in judged if 0.25 <= place(one) < 0.5]
    return second, [one for one in judged if place(one) >= 0.75]


def drift(samples, warm_up, value):
    """Returns the relative change of the median from the second quarter to the last, and the
    number of windows in each."""
    parts = [[value(one) for one in part] for part in quarters(samples, warm_up)]
    parts = [[one for one in part if one is not None] for part in parts]
    if not all(parts):
        return None
    before, after = map(statistics.median, parts)
    if before <= 0:
        return None
    return {"before": before, "after": after, "share": after / before - 1.0,
            "windows": [len(part) for part in parts]}


def enough(found):
    return found is not None and min(found["windows"]) >= WINDOWS_MIN


def judge(run):
    """Returns all promises: {"name", "held" (None: not judged), "text"}."""
    samples, warm_up = run["samples"], run["options"]["warm_up"]
    judged = [one for one in samples if one["at"] >= warm_up]
    long_enough = bool(judged) and judged[-1]["at"] - judged[0]["at"] >= JUDGED_MIN
    verdict = [work(run), losses(run), broken(run)]
    verdict.append(growth(samples, warm_up, long_enough))
    # With upgrades, some sessions are in an old process, which the samples do not include.
    steady = long_enough and not run["upgrades"]
    verdict.append(descriptors(judged, samples, warm_up, steady))
    verdict += latency(samples, warm_up, long_enough, run["options"]["foreign"])
    return verdict


def promise(name, held, text):
    return {"name": name, "held": held, "text": text}


def work(run):
    """Checks that every load generator did work, because an idle one proves nothing."""
    idle = [name for name, done in run["done"].items() if not done]
    text = ", ".join(f"{name} {done:,}" for name, done in run["done"].items())
    # Before the end of the run, the first windows may be missing.
    held = not idle if run["complete"] or not idle else None
    return promise("load made", held, text)


def losses(run):
    errors = {
        f"{load}: {kind}": count
        for load, kinds in run["errors"].items() for kind, count in kinds.items() if count
    }
    sums = {"refused": 0, "reset": 0, "wrong": 0}
    for what, count in errors.items():
        for kind in sums:
            sums[kind] += count if kind in what else 0
    text = "{refused} refused, {reset} reset, {wrong} bytes wrong".format(**sums)
    rest = ", ".join(f"{what} {count}" for what, count in errors.items())
    return promise("nothing lost", not errors, text + (f" ({rest})" if rest else ""))


def broken(run):
    text = f"{run['reloads']} reloads, {run['upgrades']} upgrades"
    if run["broken"]:
        text += ": " + "; ".join(run["broken"][:5])
    return promise("every change taken", not run["broken"], text)


def growth(samples, warm_up, long_enough):
    found = slope(samples, "rss_mb", warm_up)
    if found is None:
        return promise("memory", None, "too few samples")
    anonymous = slope(samples, "rss_anon_mb", warm_up)
    text = f"RSS {found[0]:+.3f} MB/h (standard error {found[1]:.3f}), anonymous {anonymous[0]:+.3f}"
    held = found[0] < SLOPE_MAX if long_enough else None
    return promise("memory", held, text + f"; bound {SLOPE_MAX} MB/h")


def descriptors(judged, samples, warm_up, long_enough):
    if not judged:
        return promise("descriptors", None, "too few samples")
    least, most = min(one["fds"] for one in judged), max(one["fds"] for one in judged)
    found = drift(samples, warm_up, lambda one: one["fds"])
    text = f"{least} to {most}"
    if found is None:
        return promise("descriptors", None, text)
    change = found["after"] - found["before"]
    text += f"; median {found['before']:.0f}, then {found['after']:.0f}"
    flat = change <= max(DESCRIPTORS_SPARE, DESCRIPTORS_SHARE * found["before"])
    return promise("descriptors", flat if long_enough else None, text)


def latency(samples, warm_up, long_enough, foreign_max):
    def quiet(one):
        return one["foreign"] <= foreign_max

    raw = drift(samples, warm_up, lambda one: one["p99"])
    still = drift(samples, warm_up, lambda one: one["p99"] if quiet(one) else None)
    ratio = drift(samples, warm_up, lambda one: one["p99"] / one["direct_p99"]
                  if quiet(one) and one["p99"] and one["direct_p99"] else None)
    # Quiet windows decide if there are enough, because other processes affect the rest.
    decides = "quiet" if enough(still) else "raw"
    lines = []
    for name, found in [("raw", raw), ("quiet", still)]:
        text = "too few windows"
        if found is not None:
            text = (
                f"{found['before'] * 1e6:.0f} us, then {found['after'] * 1e6:.0f} us: "
                f"{found['share']:+.1%} ({found['windows'][0]} and {found['windows'][1]} windows)"
            )
        judge_it = long_enough and name == decides and enough(found)
        held = found["share"] < DRIFT_MAX if judge_it else None
        lines.append(promise(f"p99, {name}", held, text + f"; bound {DRIFT_MAX:.0%}"))
    if ratio is not None:
        text = f"{ratio['before']:.2f}, then {ratio['after']:.2f}: {ratio['share']:+.1%}"
        lines.append(promise("p99 over direct", None, text))
    return lines


def lines(verdict):
    marks = {True: "kept", False: "BROKEN", None: "-"}
    width = max(len(one["name"]) for one in verdict)
    return [f"{one['name']:<{width}}  {marks[one['held']]:<6}  {one['text']}" for one in verdict]
