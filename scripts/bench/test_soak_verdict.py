"""Tests of the verdict of a soak on generated samples.

Run by scripts/test. Starts no process and reads no file.
"""

import unittest

import soak_verdict


def run_of(hours=2.0, growth=0.0, slower=0.0, leak=0.0, foreign=0.02, **more):
    """Returns a run with a sample per 10 s and noise without a trend. `growth` is in MB/h,
    `slower` is the increase of the p99 at the end as a share, `leak` is in descriptors per
    hour."""
    samples = []
    for number in range(1, int(hours * 360) + 1):
        at, wave = number * 10.0, (number * 7919 % 13 - 6) / 6
        late = at / (hours * 3600)
        samples.append({
            "at": at, "pid": 1, "rss_mb": 15 + growth * at / 3600 + 0.05 * wave,
            "rss_anon_mb": 7 + growth * at / 3600, "fds": round(600 + wave + leak * at / 3600),
            "p99": 5e-4 * (1 + slower * late + 0.02 * wave), "direct_p99": 3e-4,
            "foreign": foreign,
        })
    run = {
        "samples": samples, "options": {"warm_up": 600.0, "foreign": 0.1}, "complete": True,
        "errors": {"steady": {}}, "broken": [], "reloads": 1440, "upgrades": 0,
        "done": {"steady": 1000},
    }
    run.update(more)
    return run


def held(run):
    return {one["name"]: one["held"] for one in soak_verdict.judge(run)}


class Verdict(unittest.TestCase):
    def test_steady_run_keeps_every_promise(self):
        found = held(run_of())
        self.assertEqual({name for name, kept in found.items() if kept is None},
                         {"p99, raw", "p99 over direct"})
        self.assertNotIn(False, found.values())

    def test_memory_growth_above_the_bound_is_found(self):
        self.assertIs(held(run_of(growth=0.8))["memory"], True)
        self.assertIs(held(run_of(growth=1.2))["memory"], False)

    def test_each_process_has_its_own_level_of_memory(self):
        run = run_of()
        for one in run["samples"][360:]:
            one["pid"], one["rss_mb"] = 2, one["rss_mb"] + 50
        self.assertIs(held(run)["memory"], True)

    def test_latency_growth_above_the_bound_is_found(self):
        self.assertIs(held(run_of(slower=0.05))["p99, quiet"], True)
        self.assertIs(held(run_of(slower=0.2))["p99, quiet"], False)

    def test_raw_latency_decides_without_quiet_windows(self):
        found = held(run_of(slower=0.2, foreign=0.5))
        self.assertEqual((found["p99, raw"], found["p99, quiet"]), (False, None))

    def test_leaked_descriptors_are_found(self):
        self.assertIs(held(run_of(leak=30))["descriptors"], False)

    def test_single_loss_breaks_the_promise(self):
        run = run_of(errors={"ledger": {"wrong": 1}, "steady": {}})
        self.assertIs(held(run)["nothing lost"], False)
        self.assertIs(held(run_of(broken=["a reload was refused"]))["every change taken"], False)

    def test_idle_load_generator_breaks_the_promise(self):
        self.assertIs(held(run_of(done={"steady": 0}))["load made"], False)

    def test_slopes_of_a_short_run_are_not_judged(self):
        found = held(run_of(hours=0.3, growth=50, slower=3))
        self.assertEqual((found["memory"], found["p99, quiet"]), (None, None))


if __name__ == "__main__":
    unittest.main()
