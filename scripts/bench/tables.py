"""Formats the results of `report` as the tables of docs/performance.md.

Called by `peers`. It never measures.
"""

import report

# The candidates that have a column, and their headings.
COLUMNS = [
    ("tidegate-io_uring", "Tidegate, io_uring"), ("tidegate-epoll", "Tidegate, epoll"),
    ("nginx", "nginx"), ("envoy", "Envoy"), ("bare", "bare relay"),
]


def of(results):
    """Returns a table per set-up. A cell is rate / CPU time relative to HAProxy."""
    columns = [(name, title) for name, title in COLUMNS if name in results["versions"]]
    lines = []
    for setup in results["setups"]:
        lines += [f"{setup['title'][0].upper()}{setup['title'][1:]}.", ""]
        lines += head(["workload", "HAProxy"] + [title for _, title in columns])
        for one in setup["workloads"]:
            cells = [one["title"], absolute(one)]
            lines.append(line(cells + [cell(one["rows"].get(name)) for name, _ in columns]))
        lines.append("")
        if setup["idle"]:
            lines += [idle(setup["idle"]), ""]
    return "\n".join(lines)


def head(titles):
    return [line(titles), "|---|" + "---:|" * (len(titles) - 1)]


def line(cells):
    return "| " + " | ".join(cells) + " |"


def absolute(one):
    found = one["rows"].get(report.REFERENCE)
    if found is None:
        return "-"
    rate, cpu = found["absolute"]["rate"], found["absolute"]["cpu"]
    return f"{report.rate(rate, one['unit'])}, {report.amount(cpu, one['unit'])}"


def cell(row):
    if row is None or row["ratio"]["rate"] is None or row["ratio"]["cpu"] is None:
        return "-"
    return f"{row['ratio']['rate']['median']:.2f} / {row['ratio']['cpu']['median']:.2f}"


def idle(found):
    each = ", ".join(f"{name} {one['bytes_per_session']:,.0f} B" for name, one in found.items())
    sessions = max(one["sessions"] for one in found.values())
    return f"Resident memory per session, with {sessions:,} idle sessions: {each}."
