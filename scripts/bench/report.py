"""Analyses samples: ratios to HAProxy in each round, with median, minimum and maximum.

Called by `peers`. Formats the results as a table, as JSON and as an SVG chart. It never
measures.
"""

import json
import statistics
from xml.sax.saxutils import escape

REFERENCE = "haproxy"

# Compared measures and their headings. Except for the first, less is better.
MEASURES = [("rate", "rate"), ("cpu", "balancer CPU"), ("busy", "machine busy"), ("p99", "p99")]


def ratios(rounds, name, measure):
    """Returns the ratios of the candidate to HAProxy, for every round that has both."""
    found = []
    for samples in rounds:
        mine, reference = samples.get(name), samples.get(REFERENCE)
        if not mine or not reference:
            continue
        # A failed measurement has no value, and a ratio needs a value above 0.
        if mine.get(measure) is not None and reference.get(measure):
            found.append(mine[measure] / reference[measure])
    return found


def spread(values):
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def median_of(rounds, name, measure):
    mine = [samples[name] for samples in rounds if samples.get(name)]
    values = [sample[measure] for sample in mine if sample[measure] is not None]
    return statistics.median(values) if values else None


def analyse(workload, rounds):
    """Returns the results of a workload in a set-up."""
    names = []
    for samples in rounds:
        names += [name for name in samples if name not in names]
    rows = {}
    for name in names:
        mine = [samples[name] for samples in rounds if samples.get(name)]
        errors = {}
        for sample in mine:
            for kind, count in sample["errors"].items():
                errors[kind] = errors.get(kind, 0) + count
        rows[name] = {
            "ratio": {key: spread(ratios(rounds, name, key)) for key, _ in MEASURES},
            "absolute": {
                key: median_of(rounds, name, key)
                for key in ("rate", "cpu", "load", "busy", "p50", "p99", "p99.9")
            },
            "foreign_max": max((sample["foreign"] for sample in mine), default=0.0),
            "failed": len(rounds) - len(mine),
            "errors": errors,
        }
    return {"workload": workload.name, "title": workload.title, "unit": workload.unit,
            "family": workload.family, "rows": rows}


# --- text ---

def amount(value, unit):
    """Formats the CPU time of one unit."""
    if value is None:
        return "-"
    return f"{value * 1e3:.0f} ms" if unit == "GiB" else f"{value * 1e6:.2f} us"


def rate(value, unit):
    if value is None:
        return "-"
    return f"{value:.2f} GiB/s" if unit == "GiB" else f"{value / 1e3:.1f} k/s"


def cell(found, digits=2):
    if found is None:
        return "-"
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f}..{found['max']:.{digits}f})"


def columns(rows):
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return lines


def table(results):
    lines = [head for head in heading(results)]
    for setup in results["setups"]:
        lines += ["", f"=== {setup['title']} ===",
                  "ratios to haproxy of the same round: median (min..max)"]
        for one in setup["workloads"]:
            open_loop = one["family"] == "open-loop"
            lines += ["", f"{one['title']}   [{one['unit']}]"]
            rows = [["", "rate x", "CPU x", "busy x"] + (["p99 x"] if open_loop else [])
                    + ["rate", "CPU each", "load each", "busy each", "p50", "p99"]]
            for name, row in one["rows"].items():
                ratio, absolute = row["ratio"], row["absolute"]
                marks = "*" if row["errors"] else ""
                marks += "?" if row["failed"] else ""
                marks += "!" if row["foreign_max"] > 0.10 else ""
                is_direct = name == "direct"
                cells = [name + marks]
                cells += [cell(ratio[key]) for key in ("rate",)]
                cells += ["-" if is_direct else cell(ratio["cpu"]), cell(ratio["busy"])]
                cells += [cell(ratio["p99"])] if open_loop else []
                cells += [
                    rate(absolute["rate"], one["unit"]),
                    "-" if is_direct else amount(absolute["cpu"], one["unit"]),
                    amount(absolute["load"], one["unit"]),
                    amount(absolute["busy"], one["unit"]),
                    amount(absolute["p50"], ""), amount(absolute["p99"], ""),
                ]
                rows.append(cells)
            lines += columns(rows)
        if setup["idle"]:
            lines += ["", "idle sessions: resident memory of the balancer per session"]
            rows = [["", "bytes", "sessions"]]
            for name, found in setup["idle"].items():
                rows.append([name, f"{found['bytes_per_session']:.0f}", str(found["sessions"])])
            lines += columns(rows)
    lines += ["", "* some answers were errors (see results.json)",
              "? at least one measurement failed",
              "! in at least one measurement, other processes used more than 10% of the host"]
    return "\n".join(lines)


def heading(results):
    machine, versions = results["machine"], results["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "direct")
    return [
        f"{machine['cpu']}, {machine['cores']} CPUs; Linux {machine['kernel']}; "
        f"congestion control {machine['congestion_control']}; commit {machine['commit']}",
        named,
        f"{results['rounds']} rounds of {results['seconds']} s, candidates in turn",
    ]


# --- JSON ---

def write_json(path, results):
    with open(path, "w") as file:
        json.dump(results, file, indent=1)
        file.write("\n")


# --- the chart ---

COLOURS = {
    "tidegate-io_uring": "#0b6e4f", "tidegate-epoll": "#6bbf95", "haproxy": "#888888",
    "haproxy-splice": "#bbbbbb", "nginx": "#4a6fa5", "envoy": "#c77d3a", "tidegate-spin": "#2e9e75", "bare": "#b03a48",
}
WIDTH, BAR, GAP, LEFT, RIGHT = 960, 11, 16, 250, 40


def chart(results):
    """Returns an SVG with two columns of bars per workload: rate (longer is better) and
    balancer CPU per unit (shorter is better). HAProxy is 1."""
    legend, y = legend_of(results)
    body, y = [], y + 56
    top = y
    half = (WIDTH - LEFT - RIGHT - 60) / 2
    lanes = {"rate": LEFT, "cpu": LEFT + half + 60}
    tops = {key: top_of(results, key) for key in lanes}
    for setup in results["setups"]:
        body.append(text(16, y, setup["title"], 14, "bold"))
        y += 18
        for one in setup["workloads"]:
            start = y
            body.append(text(16, y + BAR, one["title"], 11))
            shown = [name for name in COLOURS if name in one["rows"] and name != "haproxy"]
            for name in shown:
                for key, left in lanes.items():
                    found = one["rows"][name]["ratio"][key]
                    if found is None or (key == "rate" and one["family"] == "open-loop"):
                        continue
                    body += bar(left, y, half, tops[key], found, COLOURS[name])
                y += BAR + 2
            for key, left in lanes.items():
                at = left + half / tops[key]
                body.append(
                    f'<line x1="{at:.1f}" y1="{start - 3}" x2="{at:.1f}" y2="{y + 1}" '
                    'stroke="#333" stroke-dasharray="3 2"/>'
                )
            y += GAP
        y += 14
    head = [text(16, 24, "Tidegate and other balancers: ratios to HAProxy for the same workload", 16, "bold")]
    head += [
        text(lanes["rate"], top - 26, "rate: longer is better", 11),
        text(lanes["cpu"], top - 26, "balancer CPU per unit: shorter is better", 11),
    ] + legend
    for line in heading(results)[::2]:
        body.append(text(16, y, line, 10))
        y += 14
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 8}" '
        f'viewBox="0 0 {WIDTH} {y + 8}" font-family="sans-serif">\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(head + body) + "\n</svg>\n"
    )


def legend_of(results):
    """Returns the legend, in as many lines as it needs, and the y position of its last
    line."""
    marks, x, y = [], 16, 38
    for name, colour in COLOURS.items():
        if name not in results["versions"] or name == REFERENCE:
            continue
        words = f"{name} {results['versions'][name]}"
        if x + 24 + 7 * len(words) > WIDTH:
            x, y = 16, y + 18
        marks.append(f'<rect x="{x}" y="{y}" width="11" height="11" fill="{colour}"/>')
        marks.append(text(x + 16, y + 10, words, 11))
        x += 36 + 7 * len(words)
    return marks, y


def top_of(results, key):
    """Returns the ratio at the right end of a lane, at most 4, so that one large value does
    not shrink all other bars."""
    medians = [
        row["ratio"][key]["median"]
        for setup in results["setups"] for one in setup["workloads"]
        for name, row in one["rows"].items() if name in COLOURS and row["ratio"][key]
    ]
    return min(max([1.5] + medians) * 1.1, 4.0)


def bar(left, y, half, top, found, colour):
    def scale(value):
        return min(value, top) / top * half

    middle = y + BAR / 2
    return [
        f'<rect x="{left:.1f}" y="{y}" width="{scale(found["median"]):.1f}" height="{BAR}" '
        f'fill="{colour}"/>',
        f'<line x1="{left + scale(found["min"]):.1f}" y1="{middle}" '
        f'x2="{left + scale(found["max"]):.1f}" y2="{middle}" stroke="black" stroke-width="1"/>',
        text(left + scale(max(found["median"], found["max"])) + 4, y + BAR - 2,
             f"{found['median']:.2f}", 9),
    ]


def text(x, y, words, size, weight="normal"):
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{size}" font-weight="{weight}" '
        f'fill="#222">{escape(words)}</text>'
    )
