"""Measures how costs grow: a pick with the number of backends, memory with the number of
sessions, a reload with the size of the configuration.

Called by `peers` for --series. It measures only Tidegate, prints tables, and draws one
panel per series.
"""

import http.client
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import candidates
import measure
from report import columns, text

SESSIONS = [1_000, 3_000, 5_000, 7_000, 9_000]
BACKENDS = [10, 100, 1_000, 10_000]
RELOADS = 7

COLOURS = ["#0b6e4f", "#4a6fa5", "#c77d3a", "#8a4f9e", "#b03a48", "#6bbf95", "#888888"]

# Lines with more points have no marks at their points.
MARKED_MAX = 50


def measured(options, root, directory, cpus):
    """Returns the three series: {title: ..., x: ..., y: ..., lines: {name: [[x, y], ...]}}."""
    return [picks(root), memory(options, root, directory, cpus), reloads(root, directory, cpus)]


# --- a pick ---

def picks(root):
    """Measures the time of a pick in ns with benches/pick.rs."""
    print("picks: cargo bench --bench pick", file=sys.stderr)
    out = subprocess.run(
        ["cargo", "bench", "--quiet", "--bench", "pick", "--", "^pick/"],
        cwd=root, capture_output=True, text=True, check=True,
    ).stdout
    units = {"ps": 1e-3, "ns": 1.0, "µs": 1e3, "us": 1e3, "ms": 1e6}
    lines = {}
    # pick/random/64 [newline] time: [low unit, middle unit, high unit]
    pattern = r"pick/([\w-]+)/(\d+)\s+time:\s+\[\S+ \S+ (\S+) (\S+) \S+ \S+\]"
    for policy, backends, value, unit in re.findall(pattern, out):
        lines.setdefault(policy, []).append([int(backends), float(value) * units[unit]])
    if not lines:
        raise RuntimeError("cannot parse the output of benches/pick.rs")
    return {"title": "a pick", "x": "backends", "y": "ns", "lines": lines}


# --- memory ---

def memory(options, root, directory, cpus):
    setup = measure.Setup("pinned", options, root, directory, cpus)
    lines = {}
    try:
        setup.start([])
        for make in (candidates.TidegateRing, candidates.TidegateEpoll):
            for wanted in SESSIONS:
                print(f"memory: {make.name}, {wanted} sessions", file=sys.stderr)
                found = setup.idle(make, wanted)
                if found is not None:
                    whole = found["sessions"] * found["bytes_per_session"] / 2**20
                    lines.setdefault(make.name, []).append([found["sessions"], whole])
    finally:
        setup.stop()
    return {"title": "memory of idle sessions", "x": "sessions", "y": "MiB", "lines": lines}


# --- a reload ---

def reloads(root, directory, cpus):
    lines = {}
    for policy in ("weighted-round-robin", "source-hash"):
        for count in BACKENDS:
            print(f"reload: {policy}, {count} backends", file=sys.stderr)
            lines.setdefault(policy, []).append([count, reload_millis(root, directory, policy, count)])
    return {"title": "a reload that changes one weight", "x": "backends", "y": "ms", "lines": lines}


def reload_millis(root, directory, policy, count):
    """Returns the median time of a reload in ms, from the request to the answer. The answer
    is sent when the new table is published."""
    place = tempfile.mkdtemp(prefix="reload-", dir=directory)
    admin, path = os.path.join(place, "admin.sock"), os.path.join(place, "tidegate.toml")
    port = measure.free_ports(1)

    def write(weight):
        words = [
            f'[process]\nworkers = 1\npin = false\n[admin]\nlisten = "unix:{admin}"\n'
            f'[log]\nlevel = "error"\n[frontend.web]\nbind = ["127.0.0.1:{port}"]\npool = "web"\n'
            f'[pool.web]\nbalance = "{policy}"\n'
        ]
        for number in range(count):
            host = f"127.{1 + number // 60_000}.{number // 250 % 250}.{number % 250 + 1}"
            share = weight if number == 0 else 1
            words.append(f'[[pool.web.backend]]\naddress = "{host}:9"\nweight = {share}\n')
        # Replaced by rename, because the file watcher must not read a partial file.
        with open(path + ".new", "w") as file:
            file.write("".join(words))
        os.rename(path + ".new", path)

    write(1)
    program = os.path.join(root, "target/release/tidegate")
    process = subprocess.Popen(
        [program, "run", "--config", path], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while not os.path.exists(admin) or not measure_ready(admin):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the balancer did not start")
            time.sleep(0.02)
        took = []
        for turn in range(RELOADS):
            write(2 + turn)
            began = time.monotonic()
            answer = ask(admin, "POST", "/v1/reload")
            if answer.status != 200:
                raise RuntimeError(f"reload rejected: {answer.status}")
            # If the file watcher reloaded first, the request changes nothing.
            if answer.changed:
                took.append((time.monotonic() - began) * 1e3)
        if not took:
            raise RuntimeError("the file watcher reloaded first each time")
        return statistics.median(took)
    finally:
        candidates.end(process)


class Answer:
    def __init__(self, status, body):
        self.status, self.body = status, body
        self.changed = status == 200 and b'"changed":true' in body.replace(b" ", b"")


def ask(admin, method, path):
    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(admin)
        connection.request(method, path)
        response = connection.getresponse()
        return Answer(response.status, response.read())
    finally:
        connection.close()


def measure_ready(admin):
    try:
        return ask(admin, "GET", "/ready").status == 200
    except OSError:
        return False


# --- results ---

def table(found):
    lines = []
    for one in found:
        xs = sorted({x for points in one["lines"].values() for x, _ in points})
        rows = [[f"{one['title']} ({one['y']})"] + [f"{x:,} {one['x']}" for x in xs]]
        for name, points in one["lines"].items():
            at = dict(map(tuple, points))
            rows.append([name] + [f"{at[x]:,.2f}" if x in at else "-" for x in xs])
        lines += columns(rows) + [""]
    return "\n".join(lines)


WIDTH, HEIGHT, LEFT, GAP = 960, 300, 70, 80


def chart(found, heading, title="How Tidegate's costs grow"):
    """Returns an SVG with a panel per series. Axes start at 0, or are logarithmic if the
    values span more than a factor of 20."""
    body, y = [text(16, 24, title, 16, "bold"), text(16, 42, heading, 10)], 70
    for one in found:
        body += panel(one, y)
        y += HEIGHT + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" '
        f'viewBox="0 0 {WIDTH} {y}" font-family="sans-serif">\n'
        '<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def panel(one, top):
    points = [point for line in one["lines"].values() for point in line]
    across = scale([x for x, _ in points], LEFT, WIDTH - 240)
    up = scale([y for _, y in points], top + HEIGHT, top + 20)
    shown = [text(16, top, f"{one['title']}: {one['y']}", 13, "bold")]
    for value in across.marks:
        at = across(value)
        shown.append(f'<line x1="{at:.1f}" y1="{top + 20}" x2="{at:.1f}" y2="{top + HEIGHT}" stroke="#ddd"/>')
        shown.append(text(at - 14, top + HEIGHT + 16, f"{value:,.6g}", 10))
    for value in up.marks:
        at = up(value)
        shown.append(f'<line x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - 240}" y2="{at:.1f}" stroke="#ddd"/>')
        shown.append(text(16, at + 4, f"{value:,.6g}", 10))
    shown.append(text(WIDTH - 300, top + HEIGHT + 32, one["x"], 10))
    for number, (name, line) in enumerate(one["lines"].items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in sorted(line))
        shown.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in line if len(line) <= MARKED_MAX else []:
            shown.append(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{colour}"/>')
        place = top + 30 + 18 * number
        shown.append(f'<rect x="{WIDTH - 215}" y="{place - 9}" width="11" height="11" fill="{colour}"/>')
        shown.append(text(WIDTH - 198, place + 1, name, 11))
    return shown


def scale(values, low, high):
    """Returns a function from a value to a position between the pixels `low` and `high`. Its
    attribute `marks` has the values of the grid lines."""
    smallest, largest = min(values), max(values)
    if smallest > 0 and largest / smallest > 20:
        first, last = math.floor(math.log10(smallest)), math.ceil(math.log10(largest))
        place = lambda value: low + (math.log10(value) - first) / (last - first) * (high - low)  # noqa: E731
        place.marks = [10.0 ** power for power in range(first, last + 1)]
    else:
        largest = max(largest, 1e-9)
        step = 10.0 ** math.floor(math.log10(largest))
        step = step / 2 if largest / step < 3 else step
        end = math.ceil(largest / step) * step
        place = lambda value: low + value / end * (high - low)  # noqa: E731
        place.marks = [step * number for number in range(round(end / step) + 1)]
    return place
