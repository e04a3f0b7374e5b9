"""Requirements are traced: every MUST of an implemented profile is shown by a test that cites it, or says in the list why it is not."""
import unittest

from tests import conformance


class Rules(unittest.TestCase):
    def test_every_must_of_an_implemented_profile_is_shown(self):
        cited, profiles = conformance.find_citations(), conformance.find_implemented()
        missing = [f"{rule.number} {rule.words}" for rule in conformance.load_rules()
                   if rule.strength.startswith("MUST") and profiles & set(rule.profiles) and rule.number not in cited and not rule.open]
        self.assertEqual(missing, [])

    def test_no_test_cites_a_rule_that_is_not_there(self):
        known = {rule.number for rule in conformance.load_rules()}
        cited = {number for number in conformance.find_citations() if number.startswith(("C-", "E-"))}
        self.assertEqual(cited - known, set())

    def test_what_is_open_is_really_not_shown(self):
        cited = conformance.find_citations()
        self.assertEqual([rule.number for rule in conformance.load_rules() if rule.open and rule.number in cited], [])

    def test_the_page_says_what_the_list_says(self):
        with open(conformance.PAGE, encoding="utf-8") as file:
            self.assertEqual(file.read(), conformance.make_page(), "run python3 -m tests.conformance")


if __name__ == "__main__":
    unittest.main()
