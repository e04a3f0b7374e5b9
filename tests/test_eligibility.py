"""Eligibility: capacity and rules against the reported capabilities (protocol 8), every operator and every type."""
import unittest

import margo_agent
from tests import support
from tests.support import HELLO

CAPABILITIES = {
    "properties": {"id": "line-4", "vendor": "Example Industries", "cpus": [{"cores": 4, "architecture": "arm64"}, {"cores": 2.5}],
                   "memory": "2Gi", "storage": "64 Gi", "interfaces": [{"type": "ethernet", "speed": 1000}, {"type": "wifi", "speed": 300}],
                   "empty": [], "null": None, "a/b": {"c~d": "deep"}, "number": 4, "text": "4", "flag": True, "flags": [True], "object": {"x": 1},
                   "numbers": [1, 2], "texts": ["a", "b"], "mixed": [1, {"x": 1}]},
    "labels": {"zone": "west", "/vendor": "not a pointer", "shift": [1, 2], "clean": True, "level": 3}}


def match(key, operator, values=..., item=..., selector="propertySelector"):
    """Whether a rule of this one expression makes the device eligible."""
    expression = {"key": key, "operator": operator}
    if values is not ...:
        expression["values"] = values
    if item is not ...:
        expression["itemSelector"] = {"matchExpressions": [dict(zip(("key", "operator", "values"), part)) for part in item]}
    return is_eligible([{selector: {"matchExpressions": [expression]}}])


def is_eligible(rules):
    try:
        margo_agent.check_eligibility({"eligibilityRules": rules}, CAPABILITIES)
        return True
    except margo_agent.ComponentError as error:
        assert error.code == "NOT_ELIGIBLE", error.code
        return False


class Operators(unittest.TestCase):
    def check(self, table):
        for expected, *arguments in table:
            with self.subTest(expression=arguments):
                self.assertIs(match(*arguments), expected)

    def test_in_and_not_in(self):
        """C-206, C-207, C-208: exact, case-sensitive, one type; an absent key is false for both."""
        self.check((
            (True, "/vendor", "In", ["Other", "Example Industries"]), (False, "/vendor", "In", ["example industries"]),
            (False, "/vendor", "NotIn", ["Example Industries"]), (True, "/vendor", "NotIn", ["Other"]),
            (False, "/absent", "In", ["x"]), (False, "/absent", "NotIn", ["x"]),
            (True, "/number", "In", [4.0]), (False, "/number", "In", ["4"]), (False, "/text", "In", [4]), (True, "/text", "NotIn", [4]),
            (True, "/flag", "In", [True]), (False, "/flag", "In", [1]), (False, "/number", "In", [True]), (False, "/flag", "In", [True, False]),
            (True, "/numbers", "In", [2, 9]), (False, "/numbers", "NotIn", [2]), (True, "/numbers", "NotIn", [9]), (True, "/texts", "In", ["a"]),
            (False, "/empty", "In", ["a"]), (False, "/empty", "NotIn", ["a"]), (False, "/null", "In", ["a"]), (False, "/null", "NotIn", ["a"]),
            (False, "/object", "In", ["a"]), (False, "/object", "NotIn", ["a"]), (False, "/interfaces", "NotIn", ["a"]),
            (False, "/flags", "In", [True]), (False, "/flags", "NotIn", [False]),
            (False, "/mixed", "In", [1]), (False, "/vendor", "In", []), (False, "/vendor", "In", "Example Industries"),
            (False, "/vendor", "In", ["Example Industries", 1]), (False, "/vendor", "In", [None]), (False, "/vendor", "In")))

    def test_exists_and_does_not_exist(self):
        """C-209: any type, also null; values are omitted."""
        self.check((
            (True, "/null", "Exists"), (True, "/object", "Exists"), (False, "/absent", "Exists"), (True, "/absent", "DoesNotExist"),
            (False, "/vendor", "DoesNotExist"), (False, "/vendor", "Exists", []), (False, "/absent", "DoesNotExist", ["x"]),
            (False, "absent", "DoesNotExist"), (False, "/bad~2", "DoesNotExist"), (False, "", "DoesNotExist")))

    def test_greater_and_less(self):
        """C-210: exactly one number, strictly; booleans and texts of the device are no numbers."""
        self.check((
            (True, "/cpus/0/cores", "Gt", [3]), (False, "/cpus/0/cores", "Gt", [4]), (True, "/cpus/1/cores", "Lt", ["2.6"]),
            (False, "/cpus/1/cores", "Lt", [2.5]), (True, "/number", "Gt", ["3"]), (False, "/text", "Gt", [3]), (False, "/flag", "Gt", [0]),
            (False, "/number", "Gt", [3, 2]), (False, "/number", "Gt", []), (False, "/number", "Gt", ["many"]), (False, "/number", "Gt", [False]),
            (False, "/number", "Gt", 3), (False, "/absent", "Lt", [3]), (False, "/numbers", "Gt", [0]), (False, "/number", "Gt", ["nan"]),
            (True, "/number", "Lt", [10 ** 399]), (False, "/number", "Gt", [10 ** 399]), (True, "/number", "Lt", ["1e999"]),
            (False, "/number", "Lt", ["inf"]), (False, "/number", "Lt", ["1_000"]), (False, "/number", "Lt", [" 9"]), (False, "/number", "Lt", [""])))

    def test_numbers_that_no_float_holds_are_compared_all_the_same(self):
        """A document that asks for them fails or fits by itself, and never the agent."""
        self.check(((False, "/number", "Gt", [10 ** 399]), (True, "/number", "Lt", [10 ** 399]), (False, "/number", "Lt", [-10 ** 399])))

    def test_contains_all_and_any(self):
        """C-211: one element must satisfy; inner keys are relative to it; no values."""
        fast_wifi = [("/type", "In", ["wifi"]), ("/speed", "Gt", [500])]
        self.check((
            (True, "/interfaces", "ContainsAll", ..., [("/type", "In", ["wifi"]), ("/speed", "Lt", [500])]),
            (False, "/interfaces", "ContainsAll", ..., fast_wifi), (True, "/interfaces", "ContainsAny", ..., fast_wifi),
            (False, "/interfaces", "ContainsAny", ..., [("/type", "In", ["canbus"])]), (True, "/interfaces", "ContainsAll", ..., [("/type", "Exists")]),
            (False, "/empty", "ContainsAny", ..., [("/type", "Exists")]), (False, "/texts", "ContainsAny", ..., [("/type", "Exists")]),
            (False, "/mixed", "ContainsAny", ..., [("/x", "Exists")]), (False, "/absent", "ContainsAll", ..., [("/x", "DoesNotExist")]),
            (False, "/interfaces", "ContainsAll", ["wifi"], [("/type", "Exists")]), (False, "/interfaces", "ContainsAll"),
            (False, "/interfaces", "ContainsAll", ..., []), (False, "/interfaces", "ContainsAny", ..., [("type", "Exists")])))

    def test_what_is_no_operator_is_false(self):
        """C-212"""
        for operator in ("in", "ContainersAny", None, 7, [], ""):
            self.assertFalse(match("/vendor", operator, ["Example Industries"]))
            self.assertFalse(match("/vendor", operator))

    def test_keys_are_pointers_into_properties_and_exact_label_names(self):
        """C-205"""
        self.check((
            (True, "/a~1b/c~0d", "In", ["deep"]), (False, "/a/b", "Exists"), (True, "/cpus/0", "Exists"), (False, "/cpus/2", "Exists"),
            (False, "/cpus/01", "Exists"), (False, "/cpus/-1", "Exists"), (False, "/cpus/-", "Exists"), (False, "vendor", "Exists"),
            (False, None, "Exists"), (False, 7, "Exists")))
        for expected, *arguments in ((True, "zone", "In", ["west"]), (False, "/zone", "Exists"), (True, "/vendor", "In", ["not a pointer"]),
                                     (True, "shift", "In", [2]), (True, "clean", "In", [True]), (True, "level", "Gt", [2]),
                                     (True, "absent", "DoesNotExist"), (False, "Zone", "Exists")):
            self.assertIs(match(*arguments, selector="labelSelector"), expected)


TRUE = {"matchExpressions": [{"key": "/vendor", "operator": "Exists"}]}
FALSE = {"matchExpressions": [{"key": "/vendor", "operator": "DoesNotExist"}]}
LABEL = {"matchExpressions": [{"key": "zone", "operator": "Exists"}]}


class Rules(unittest.TestCase):
    def test_any_rule_all_selectors_all_expressions(self):
        """C-204"""
        both = {"matchExpressions": TRUE["matchExpressions"] + FALSE["matchExpressions"]}
        for expected, rules in ((True, []), (True, [{}]), (True, [{"propertySelector": TRUE}]), (False, [{"propertySelector": FALSE}]),
                                (True, [{"propertySelector": FALSE}, {"propertySelector": TRUE}]), (False, [{"propertySelector": both}]),
                                (True, [{"propertySelector": TRUE, "labelSelector": LABEL}]),
                                (False, [{"propertySelector": FALSE, "labelSelector": LABEL}]),
                                (False, [{"propertySelector": {}}]), (False, [{"propertySelector": {"matchExpressions": []}}]),
                                (False, [{"labelSelector": []}]), (False, [7]), (False, [{"propertySelector": {"matchExpressions": [7]}}])):
            with self.subTest(rules=rules):
                self.assertIs(is_eligible(rules), expected)

    def test_the_reason_names_rule_selector_and_expression(self):
        with self.assertRaises(margo_agent.ComponentError) as caught:
            margo_agent.check_eligibility({"eligibilityRules": [{"propertySelector": FALSE}, {"labelSelector": {"matchExpressions": [
                {"key": "zone", "operator": "Gt", "values": ["x\x1b"]}]}}]}, CAPABILITIES)
        for words in ("eligibilityRules[0]: propertySelector /vendor DoesNotExist is false", "eligibilityRules[1]: labelSelector zone Gt", "because"):
            self.assertIn(words, caught.exception.message)
        self.assertNotIn("\x1b", caught.exception.message)


    def test_a_thousand_reasons_still_make_a_status_that_a_wfm_takes(self):
        """C-136: whatever a document makes the agent say is bounded; the first words are those that help."""
        rule = {"propertySelector": {"matchExpressions": [{"key": "/vendor", "operator": "In", "values": ["x" * 300]}]}}
        with self.assertRaises(margo_agent.ComponentError) as caught:
            margo_agent.check_eligibility({"eligibilityRules": [rule] * 10000}, CAPABILITIES)
        self.assertLess(len(caught.exception.message), 5000)
        self.assertTrue(caught.exception.message.startswith("eligibilityRules[0]: propertySelector /vendor In"))
        self.assertTrue(caught.exception.message.endswith("..."))


class Capacity(unittest.TestCase):
    def lack(self, rules=None, **required):
        try:
            margo_agent.check_eligibility({"capacityRequirements": required, "eligibilityRules": rules}, CAPABILITIES)
        except margo_agent.ComponentError as error:
            return error.code, error.message
        return None

    def test_one_cpus_entry_must_do(self):
        """C-203: cores are never summed; an entry without architecture does not count where one is asked for."""
        for expected, cpu in ((True, {"cores": 4}), (False, {"cores": 4.5}), (True, {"cores": 2, "architectures": ["amd64", "arm64"]}),
                              (False, {"cores": 0.5, "architectures": ["amd64"]})):
            self.assertIs(self.lack(cpu=cpu) is None, expected)
        self.assertIn("4.5 cores", self.lack(cpu={"cores": 4.5})[1])

    def test_memory_and_storage_are_compared_in_bytes(self):
        for expected, key, value in ((True, "memory", "2048Mi"), (False, "memory", "2049Mi"), (True, "storage", "64Gi"), (False, "storage", "1Ti")):
            self.assertIs(self.lack(**{key: value}) is None, expected)
        code, message = self.lack(memory="4Gi")
        self.assertEqual((code, message), ("INSUFFICIENT_CAPACITY", "memory: 4Gi are needed, there are 2Gi"))

    def test_capacity_comes_before_rules(self):
        """C-201, C-202"""
        self.assertEqual(self.lack([{"propertySelector": FALSE}], memory="4Gi")[0], "INSUFFICIENT_CAPACITY")
        self.assertEqual(self.lack([{"propertySelector": FALSE}], memory="1Gi")[0], "NOT_ELIGIBLE")

    def test_a_demand_beyond_all_measure_is_not_met_and_breaks_nothing(self):
        """C-200: such a document fails alone, it never ends the cycle."""
        for need in ({"memory": "9" * 30 + "Gi"}, {"storage": "9" * 40 + "Ei"}, {"cpu": {"cores": 10 ** 399}}, {"cpu": {"cores": float("inf")}}):
            self.assertEqual(self.lack(**need)[0], "INSUFFICIENT_CAPACITY")

    def test_what_a_device_does_not_say_it_does_not_have(self):
        with self.assertRaises(margo_agent.ComponentError):
            margo_agent.check_eligibility({"capacityRequirements": {"memory": "1Ki"}}, {"properties": {"id": "x"}})


class Deployment(unittest.TestCase):
    """The agent as a process: nothing of what is not eligible is fetched or started."""

    def test_it_is_refused_until_the_device_fits(self):
        """C-200: plan says refuse, the status says why; a label of the operator's makes it eligible at once."""
        import json
        pki = support.Pki(self)
        wfm, engine = support.Wfm(self, pki), support.FakeEngine(self)
        wfm.add_package(support.make_compose())
        device = support.Device(self, pki, wfm, engine)
        document = json.loads(support.make_deployment(registry=wfm.registry))
        document["spec"]["deploymentProfile"]["deviceConstraints"] = {"eligibilityRules": [{"labelSelector": {"matchExpressions": [
            {"key": "hall", "operator": "In", "values": [4]}]}}]}
        wfm.publish(json.dumps(document))
        action, reason = device.plan()[HELLO]
        self.assertEqual(action, "refuse")
        self.assertIn("NOT_ELIGIBLE", reason)
        for _ in range(2):
            device.cycle(1)
        self.assertEqual([status for status in wfm.statuses()], ["failed"])
        self.assertEqual((wfm.requests("registry"), engine.containers()), ([], {}))
        device.set("device.labels", {"hall": 4})
        self.assertEqual(device.plan()[HELLO][0], "install")
        device.cycle(0)
        self.assertEqual(wfm.statuses()[-1], "installed")


class Edges(unittest.TestCase):
    """Words, and values of kinds that nobody expects."""

    def test_the_words_say_what_is_needed_and_what_there_is(self):
        find = margo_agent.find_lack
        self.assertEqual(find({"cpu": {"cores": 2}}, {}), "cpu: 2 cores of any architecture are needed, there are 0")
        self.assertEqual(find({"cpu": {"cores": 2}}, {"cpus": None}), "cpu: 2 cores of any architecture are needed, there are 0")
        self.assertEqual(find({"cpu": {"cores": 2, "architectures": ["arm", "arm64"]}}, {"cpus": [{"cores": 8, "architecture": "amd64"}, {"architecture": "arm"}]}),
                         "cpu: 2 cores of arm or arm64 are needed, there are 0")
        self.assertEqual(find({"memory": "1Gi"}, {}), "memory: 1Gi are needed, there are none")
        self.assertEqual(find({"cpu": {"cores": 2}, "memory": "1Gi", "storage": "1Ki"}, {"cpus": [{"cores": 2}], "memory": "1Gi", "storage": "1024"}), "")

    def test_a_pointer_leads_through_mappings_and_lists_alone(self):
        """C-205: a digit is no place in a text, a text no member of a list, and no list has a place before its first."""
        value = {"list": ["a", "b"], "text": "ab", "0": "zero", "a/b": {"m~n": 1}}
        for pointer, expected in (("/list/0", (True, "a")), ("/list/1", (True, "b")), ("/list/2", (False, None)), ("/list/00", (False, None)),
                                  ("/list/-1", (False, None)), ("/list/a", (False, None)), ("/text/0", (False, None)), ("/text/ab", (False, None)),
                                  ("/0", (True, "zero")), ("/a~1b/m~0n", (True, 1)), ("/0/0", (False, None)), ("/list/1234567890", (False, None))):
            self.assertEqual(margo_agent.find_pointer(value, pointer), expected, pointer)

    def test_what_breaks_the_rules_is_named(self):
        """C-212: false, and a person can see why."""
        for expression, words in (({"operator": "Like"}, "Like is no operator"), ({"operator": "In", "values": "a"}, "values: found 'a'"),
                                  ({"operator": "Exists", "values": []}, "Exists takes no values"), ({"operator": "Gt"}, "Gt takes values"),
                                  ({"operator": "Lt", "values": [1, 2]}, "values must be one number")):
            rule = {"propertySelector": {"matchExpressions": [dict(expression, key="/vendor")]}}
            self.assertIn(words, margo_agent.find_mismatch(rule, {"vendor": "a"}, {}))
        self.assertIs(margo_agent.is_match({"key": "/a", "operator": "In", "values": ["a"]}, lambda key: (True, [])), False)


if __name__ == "__main__":
    unittest.main()
