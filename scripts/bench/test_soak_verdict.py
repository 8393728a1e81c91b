"""Whether a soak's verdict finds what was put into made-up samples.

Run by scripts/test. Starts nothing and reads no files.
"""

import unittest

import soak_verdict


def run_of(hours=2.0, growth=0.0, slower=0.0, leak=0.0, foreign=0.02, **more):
    """A sample each 10 s; `growth` in MB/h, `slower` as a share at the end, `leak`
    in descriptors an hour. A little noise that has no trend."""
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
    def test_a_steady_run_keeps_every_promise(self):
        found = held(run_of())
        self.assertEqual({name for name, kept in found.items() if kept is None},
                         {"p99, raw", "p99 over direct"})
        self.assertNotIn(False, found.values())

    def test_memory_that_grows_faster_than_the_bound_breaks_it(self):
        self.assertIs(held(run_of(growth=0.8))["memory"], True)
        self.assertIs(held(run_of(growth=1.2))["memory"], False)

    def test_each_process_has_its_own_level_of_memory(self):
        run = run_of()
        for one in run["samples"][360:]:
            one["pid"], one["rss_mb"] = 2, one["rss_mb"] + 50
        self.assertIs(held(run)["memory"], True)

    def test_latency_that_creeps_up_breaks_its_bound(self):
        self.assertIs(held(run_of(slower=0.05))["p99, quiet"], True)
        self.assertIs(held(run_of(slower=0.2))["p99, quiet"], False)

    def test_the_raw_latency_decides_where_the_machine_was_never_quiet(self):
        found = held(run_of(slower=0.2, foreign=0.5))
        self.assertEqual((found["p99, raw"], found["p99, quiet"]), (False, None))

    def test_descriptors_that_leak_are_found(self):
        self.assertIs(held(run_of(leak=30))["descriptors"], False)

    def test_a_single_loss_is_one_too_many(self):
        run = run_of(errors={"ledger": {"wrong": 1}, "steady": {}})
        self.assertIs(held(run)["nothing lost"], False)
        self.assertIs(held(run_of(broken=["a reload was refused"]))["every change taken"], False)

    def test_nothing_is_proved_by_a_load_that_did_nothing(self):
        self.assertIs(held(run_of(done={"steady": 0}))["load made"], False)

    def test_a_short_run_is_not_judged_by_its_slopes(self):
        found = held(run_of(hours=0.3, growth=50, slower=3))
        self.assertEqual((found["memory"], found["p99, quiet"]), (None, None))


if __name__ == "__main__":
    unittest.main()
