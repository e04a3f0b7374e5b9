"""State and memo of right JSON and wrong form (security 5), without a digest and with the right one: no command ends with a bug."""
import contextlib
import io
import itertools
import json
import os
import random
import time
import unittest
from unittest import mock

import margo_agent
from tests import support
from tests.bench import fuzz

OTHER = "11111111-1111-4111-8111-111111111111"
VALUES = [None, True, 0, -1, 10 ** 18, 1e300, "", [], {}, "x" * 100000, [None], {"a": None}, "a\x1b\n"]
COMMANDS = (["status"], ["status", "--json"], ["status", "hello"], ["history"], ["retry"], ["plan"], ["doctor"], ["run", "--once"])
SEED, SHARE = os.environ.get("MARGO_TEST_SEED", "1"), 1 if os.environ.get("MARGO_TEST_SLOW") == "1" else 0.03


def list_places(value, path=()):
    """The path of each node of a value of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, item in items for place in list_places(item, path + (key,))]


def put(value, path, item):
    """A copy of a value with another item in one place."""
    value = json.loads(json.dumps(value))
    if not path:
        return item
    home = value
    for key in path[:-1]:
        home = home[key]
    home[path[-1]] = item
    return value


def seal(value):
    """A value as JSON, with the digest at its end that the agent itself writes."""
    data = margo_agent.make_json(value)
    return data[:-1] + margo_agent.SUM + margo_agent.sha256_digest(data).encode() + b'"}' if isinstance(value, dict) else data


def spoil(chance, value, places):
    """A copy of a value in which one thing is gone, of another name, there twice, or what stands elsewhere."""
    value = json.loads(json.dumps(value))
    home, other = value, value
    path = chance.choice(places)
    for key in path[:-1]:
        home = home[key]
    for key in chance.choice(places):
        other = other[key]
    item = home[path[-1]]
    kind = chance.randrange(3)
    if kind == 0:
        home[path[-1]] = json.loads(json.dumps(other))
        return value
    del home[path[-1]]
    if kind == 1 and isinstance(home, dict):
        home[chance.choice(["x", "", OTHER.upper(), *home])] = item
    elif kind == 1:
        home += [item, item]
    return value


class Records(unittest.TestCase):
    def test_no_combination_of_the_parts_of_a_record_is_a_bug(self):
        """It is refused by its place, or read, planned on and told of."""
        state = json.loads(fuzz.make_states()[0])
        state.pop("sum")
        (key, whole), = state["deployments"].items()
        running = {name: value for name, value in whole["running"].items() if name != "services"}
        wait = {"delay": 60, "at": 1e9}
        parts = {"state": margo_agent.STATES, "error": (None, whole["error"]), "running": (None, whole["running"], running),
                 "previous": (None, running), "refused": (True, False), "fallback": (True, False), "retry": ({}, whole["retry"], wait),
                 "repair": ({}, whole["retry"], wait), "components": ([], whole["components"])}
        combinations = list(itertools.product(*parts.values()))
        random.Random(SEED).shuffle(combinations)
        refused = 0
        for values in combinations[:int(len(combinations) * max(SHARE, 0.3))]:
            record = dict(whole, **dict(zip(parts, values)))
            with self.subTest(values=values, seed=SEED):
                try:
                    fuzz.read_state(margo_agent.make_json(dict(state, deployments={key: record})))
                except ValueError as error:
                    self.assertIn(f".deployments.{key}.", str(error))
                    refused += 1
        self.assertGreater(refused, 100)


class Forms(support.DeviceCase):
    def setUp(self):
        super().setUp()
        self.wfm.publish(support.make_deployment(registry=self.wfm.registry))
        self.device.cycle()
        self.wfm.publish(support.make_deployment(OTHER, "b", (("web", "9.9.9"),), registry=self.wfm.registry), OTHER)
        self.device.cycle(1)
        self.whole = self.make_whole(self.device.state())
        last = {"at": "2026-11-28T07:48:30Z", "result": "failed", "detail": "x"}
        self.notes = {"checked": "a", "lastPoll": last, "others": [{"owner": "o", "name": "n", "type": "compose", "deploymentId": OTHER}],
                      "etags": {"sha256:aa": "b"}, "escaped": True, "warnedAt": 1.0, "trust": 1.0, "boot": "x", "start": 5.0}
        self.store = margo_agent.Store(self.device.state_dir)
        with mock.patch.dict(os.environ, self.device.env):
            self.memo = self.store.memo_path()

    def make_whole(self, state):
        """A state with something in every part."""
        wait = dict(state["deployments"][OTHER]["retry"], since=time.time())
        fault = {"code": "a", "message": "b", "source": "c"}
        status = {"state": "failed", "error": fault}
        crl = dict(wait, digest=support.digest(b"x"), number=1, key="sha256:cc", thisUpdate=1.0, validity=5, etag="a")
        return dict(
            state, patience=wait, waits={OTHER: wait}, drafts=["a"], pulled=["localhost/x:1"], waiting=support.digest(b"y"), crls={"http://x/a": crl},
            dropped={OTHER: {"state": "failed", "at": "2026-11-28T07:48:30Z", "reason": "x"}}, client={"id": "x", "key": "sha256:aa"},
            outbox=[{"deploymentId": OTHER, "deviceId": "a", "adoptedManifestVersion": 1, "status": status, "components": [dict(status, name="web")]}],
            trust={"source": "https://x", "sequence": 1, "refreshedAt": 1.0, "trustDomain": "factory.example", "strays": "a", "est": "https://x",
                   "crls": ["http://x/a"]},
            est=dict(wait, token="a", used="b", key="k", refused="r"))

    def show(self, state, notes, arguments):
        """(exit code, what is printed) of a command beside a state, its copy and a memo."""
        for name in ("state.json", "state.json.old"):
            support.write(self.store.path(name), seal(state))
        support.write(self.memo, json.dumps(notes))
        output = io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape")
        with mock.patch.dict(os.environ, self.device.env), contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            code = margo_agent.main(["-v", "-c", self.device.config_file, *arguments])
        output.flush()
        return code, output.buffer.getvalue().decode("utf-8", "replace")

    def test_every_command_is_at_home_in_the_whole_state(self):
        """What the places below are taken from is itself accepted."""
        for arguments in COMMANDS[:4]:
            code, text = self.show(self.whole, self.notes, arguments)
            self.assertEqual(code, 0, text)

    def test_no_wrong_type_anywhere_is_a_bug(self):
        """Each node of the state and of the memo in turn, replaced by each of VALUES; most of them before commands that ask nobody."""
        chance = random.Random(SEED)
        jobs = [(place, value, True) for place in list_places(self.whole)[1:] for value in VALUES]
        jobs += [(place, value, False) for place in list_places(self.notes) for value in VALUES]
        chance.shuffle(jobs)
        for number, (place, value, is_state) in enumerate(jobs[:int(len(jobs) * SHARE)]):
            commands = COMMANDS if number % 10 == 0 else COMMANDS[:4]
            state, notes = (put(self.whole, place, value), self.notes) if is_state else (self.whole, put(self.notes, place, value))
            self.check_commands(state, notes, commands, place=place, value=repr(value)[:40])

    def check_commands(self, state, notes, commands, **facts):
        for arguments in commands:
            with self.subTest(command=arguments, seed=SEED, **facts):
                code, text = self.show(state, notes, arguments)
                self.assertIn(code, range(7), text)
                self.assertNotIn("Traceback", text)

    def test_nothing_that_is_gone_misnamed_or_misplaced_is_a_bug(self):
        """Spoilt in one to three places each, with the right digest; some of them where the WFM is asked and something is to be done."""
        chance = random.Random(SEED)
        for number in range(int(2000 * SHARE)):
            state = dict(self.whole, patience={}, waits={}) if number % 2 else self.whole
            for _ in range(chance.choice((1, 1, 2, 3))):
                state = spoil(chance, state, list_places(state)[1:])
            self.check_commands(state, self.notes, COMMANDS if number % 10 == 0 else COMMANDS[:4], number=number)

    def test_a_state_of_another_form_is_named_with_its_place_and_its_copy_counts(self):
        good = margo_agent.make_state()
        for path, value in (("state.json", put(self.whole, ("deployments", support.HELLO, "components"), 5)), ("state.json.old", good)):
            support.write(self.store.path(path), json.dumps(value))
        log = self.device.cycle(1)
        self.assertIn("state.json.deployments." + support.HELLO + ".components: found '5', expected a list", log)
        self.assertIn("the state is taken from its copy", log)


if __name__ == "__main__":
    unittest.main()
