"""Patience: who is left alone for how long, as pure functions of a record and a moment; see also test_agent.Times."""
import os
import time
import types
import unittest
from unittest import mock

import margo_agent
from margo_agent import Clock, Refused, Silence, Unreachable, Untrusted

NOW = 1000000


def make_config(**poll):
    identity = {"certificate": "c", "key": "k", "trust_bundle": "b"}
    return margo_agent.make_config({"wfm": {"url": "https://x"}, "identity": identity, "poll": poll}, "/", {})


CONFIG = make_config()


def at(now=NOW, boot="", uptime=0):
    return Clock(now, boot, uptime)


class Waits(unittest.TestCase):
    def test_a_wait_ends_with_its_last_second(self):
        wait = margo_agent.make_wait({}, 60, at())
        self.assertEqual([margo_agent.find_wait(wait, at(NOW + passed)) for passed in (0, 1, 59, 60, 61)], [60, 59, 1, 0, 0])

    def test_a_wait_knows_the_boot_it_began_in(self):
        """P-2: so that a clock that is set later neither ends nor prolongs it."""
        wait = margo_agent.make_wait({"failures": 2}, 60, at(NOW, "b", 7))
        self.assertEqual(wait, {"failures": 3, "at": NOW, "delay": 60, "boot": "b", "uptime": 7})
        self.assertEqual(margo_agent.find_wait(wait, at(NOW + 10 ** 8, "b", 8)), 59)

    def test_a_fault_without_an_answer_backs_off_and_an_answer_holds_as_long_as_it_says(self):
        """C-056: 401, 403 and a refused manifest slow nobody down by themselves."""
        self.assertEqual(margo_agent.make_patience({"failures": 2}, Unreachable("x"), at(), 1)["delay"], 8)
        self.assertEqual(margo_agent.make_patience({}, Unreachable("x", retry_after=70), at(), 0)["delay"], 70)
        for error in (Refused("x"), Untrusted("x")):
            self.assertEqual(margo_agent.make_patience({"failures": 2}, error, at(), 1)["delay"], 0)
            error.retry_after = 70
            self.assertEqual(margo_agent.make_patience({"failures": 2}, error, at(), 1)["delay"], 70)

    def test_a_retry_has_jitter_and_waits_as_long_as_somebody_asks_but_not_for_ever(self):
        """P-15: 30 s, doubled up to an hour, a quarter less or more; a registry's own word counts for two hours at most."""
        def delay(failures, asked=None, jitter=0.5):
            return margo_agent.make_retry({"failures": failures}, asked, at(), jitter)["delay"]

        self.assertEqual([delay(n) for n in (0, 1, 2, 20, 2000)], [30, 60, 120, 3600, 3600])
        self.assertEqual([delay(0, jitter=jitter) for jitter in (0, 1)], [22.5, 37.5])
        self.assertEqual([delay(0, asked) for asked in (0, 10, 100, 10 ** 6)], [30, 30, 100, 7200])

    def test_what_is_held_back_is_told_with_its_moment(self):
        wait = margo_agent.make_wait({}, 60, at())
        state = dict(margo_agent.make_state(), patience=wait, waits={"a": wait, "b": dict(wait, delay=5)})
        self.assertEqual(margo_agent.list_waits(state, at(NOW + 10)), [
            {"until": margo_agent.make_time(NOW + 60), "reason": "the WFM or a back-off asks to wait"},
            {"until": margo_agent.make_time(NOW + 60), "reason": "a is not reported again"}])
        self.assertEqual(margo_agent.list_waits(margo_agent.make_state(), at()), [])

    def test_what_looks_like_a_moment_is_none_that_lasts(self):
        """Contract, Patience: a Retry-After that is a moment, in seconds or milliseconds, is understood as one; a day at most."""
        for seconds, expected in ((None, None), (0, 0), (59.5, 59.5), (10 ** 6, 86400), (999999999, 86400), (1700000100, 100), (1700000100000, 100),
                                  (1700000100500, 100.5), (1699999999, 0), (10 ** 9, 0)):
            self.assertEqual(margo_agent.limit_wait(seconds, 1700000000), expected, seconds)


class Silences(unittest.TestCase):
    def test_downtime_is_no_fault_and_comes_first(self):
        """C-230"""
        found = margo_agent.find_silence(margo_agent.make_wait({}, 60, at()), True, 9, at())
        self.assertEqual((type(found), found.exit, found.message), (Silence, 0, "downtime: no request is made"))

    def test_the_reason_and_the_moment_are_named(self):
        wait = margo_agent.make_wait({}, 60, at())
        for patience, starting, left, words in ((wait, 0, 60, "the WFM or a back-off asks"), (wait, 9, 60, "the WFM or a back-off asks"),
                                                ({}, 9, 9, "a fleet that has just started")):
            found = margo_agent.find_silence(patience, False, starting, at())
            self.assertEqual((found.retry_after, found.exit), (left, Silence("x").exit))
            self.assertIn(f"waiting until {margo_agent.make_time(NOW + left)}: {words}", found.message)
        self.assertIsNone(margo_agent.find_silence({}, False, 0, at()))

    def test_the_first_contact_since_a_boot_is_drawn_once(self):
        """P-19: a run that is started again within it waits for the same moment; one whose moment cannot be kept does not wait."""
        memo, keeps = {}, [True]
        store = types.SimpleNamespace(load_memo=lambda: memo, save_memo=lambda: keeps[0])

        def start(uptime, boot="b", known=True, jitter=0.5):
            return margo_agent.load_start(store, CONFIG.poll, known, at(NOW, boot, uptime), jitter)

        self.assertEqual([start(10), start(15, jitter=1), start(39), start(40), start(100)], [30, 25, 1, 0, 0])
        self.assertEqual(start(10, "c", jitter=0.1), 6)
        self.assertEqual([start(10, ""), start(300, "d"), start(299, "e", jitter=1), start(10, "f", known=False)], [0, 0, 60, 0])
        keeps[0] = False
        self.assertEqual(start(10, "g"), 0)


class Daemon(unittest.TestCase):
    """When the next cycle comes."""

    def delay(self, fault=None, config=CONFIG, **state):
        return margo_agent.make_delay(config, dict(margo_agent.make_state(), **state), fault, at(), 0.5)

    def test_a_refusal_that_was_not_counted_keeps_the_interval(self):
        self.assertEqual(self.delay(Refused("x")), 60)
        self.assertEqual(self.delay(Refused("x"), patience={"failures": 1, "at": NOW, "delay": 0}), 120)
        self.assertEqual(self.delay(Untrusted("x"), patience={"failures": 1, "at": NOW, "delay": 5000}), 5000)

    def test_a_silence_is_slept_through_for_an_interval_at_most(self):
        for left, expected in ((None, 60), (0.2, 1), (20, 20), (500, 60)):
            self.assertEqual(self.delay(Silence("x", retry_after=left)), expected)
        self.assertEqual(self.delay(Silence("x", retry_after=20), patience={"failures": 1, "at": NOW, "delay": 7}), 20)

    def test_a_report_that_was_not_taken_is_tried_when_it_is_due_but_not_at_once(self):
        for delay, expected in ((200, 200), (5, margo_agent.CYCLE_RETRY), (900, 600)):
            waits = {"a": margo_agent.make_wait({}, delay, at())}
            self.assertEqual(self.delay(config=make_config(interval="10m"), waits=waits), expected)

    def test_only_what_has_failed_and_can_be_tried_again_brings_a_cycle_forward(self):
        record = {"state": "failed", "refused": False, "retry": margo_agent.make_wait({}, 30, at())}
        for changes, expected in (({}, 30), ({"state": "installed"}, 60), ({"refused": True}, 60)):
            self.assertEqual(self.delay(deployments={"a": dict(record, **changes)}), expected)


class Windows(unittest.TestCase):
    def setUp(self):
        self.addCleanup(time.tzset)
        zone = mock.patch.dict(os.environ, TZ="UTC")
        zone.start()
        self.addCleanup(zone.stop)
        time.tzset()

    def within(self, window, start, end):
        moments = [time.mktime(time.strptime(text, "%Y-%m-%d %H:%M")) for text in (start, end)]
        return margo_agent.is_within_whole([margo_agent.parse_window(window)], *moments)

    def test_all_the_time_between_two_moments_has_to_lie_in_a_window(self):
        """The draft's 4: a renewal that would be late is not held back by a downtime that ends before."""
        self.assertIs(self.within("Mon 06:00-22:00", "2026-11-30 06:00", "2026-11-30 21:59"), True)
        self.assertIs(self.within("Mon 06:00-22:00", "2026-11-30 06:00", "2026-11-30 22:00"), False)
        self.assertIs(self.within("Mon 06:00-22:00", "2026-11-30 05:59", "2026-11-30 07:00"), False)
        self.assertIs(self.within("12:00-11:00", "2026-11-30 10:00", "2026-11-30 13:00"), False)      # the hole between
        self.assertIs(self.within("Mon 06:00-22:00", "2026-11-30 23:00", "2026-11-30 07:00"), False)  # an end before the start is the start
        self.assertIs(margo_agent.is_within_whole([], NOW, NOW), False)

    def test_a_window_over_midnight_belongs_to_the_day_it_begins_on(self):
        for moment, expected in (("2026-11-30 21:59", False), ("2026-11-30 22:00", True), ("2026-12-01 05:59", True), ("2026-12-01 06:00", False),
                                 ("2026-11-30 05:00", False), ("2026-12-01 22:00", False)):
            self.assertIs(self.within("Mon 22:00-06:00", moment, moment), expected, moment)

    def test_a_window_that_ends_when_it_begins_lasts_a_day(self):
        for moment, expected in (("2026-11-30 05:59", False), ("2026-11-30 06:00", True), ("2026-12-01 05:59", True), ("2026-12-01 06:00", False)):
            self.assertIs(self.within("Mon 06:00-06:00", moment, moment), expected, moment)

    def test_a_clock_before_the_last_state_is_told_with_both_moments(self):
        self.assertEqual(margo_agent.make_clock_fault(0, NOW), "the clock of this device says 1970-01-01T00:00:00Z, and its state was written at"
                         " 1970-01-12T13:46:40Z: set the clock")


if __name__ == "__main__":
    unittest.main()
