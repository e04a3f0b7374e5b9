"""Records: named tuples that cost little to define."""
import unittest

import margo_agent
from margo_agent import define

Point = define("Point", "x y name", "A place.", 0, "")
Owned = define("Owned", "deployment_id", "What belongs to a deployment.")


class Records(unittest.TestCase):
    def test_fields_are_given_by_place_or_by_name_and_the_last_may_be_left_out(self):
        for point in (Point(1, 2, "a"), Point(1, y=2, name="a"), Point(name="a", x=1, y=2), Point(1, name="b", y=2)._replace(name="a")):
            self.assertEqual((point.x, point.y, point.name), (1, 2, "a"))
            self.assertEqual(point, (1, 2, "a"))
        self.assertEqual(Point(1), (1, 0, ""))
        self.assertEqual(Point(1)._asdict(), {"x": 1, "y": 0, "name": ""})

    def test_what_is_no_field_is_refused_and_what_has_no_default_is_needed(self):
        for make in (lambda: Point(), lambda: Point(1, 2, "a", 4), lambda: Point(1, z=3), lambda: Point(1)._replace(z=3)):
            with self.assertRaisesRegex(TypeError, "Point has the fields x y name"):
                make()

    def test_none_changes_or_takes_a_further_field(self):
        for name in ("x", "other"):
            with self.assertRaises(AttributeError):
                setattr(Point(1), name, 2)

    def test_ids_are_told_apart_without_regard_to_case(self):
        self.assertEqual(Owned("AB-c").key, "ab-c")
        self.assertFalse(hasattr(Point(1), "key"))

    def test_every_record_says_what_it_is(self):
        records = [item for item in vars(margo_agent).values() if isinstance(item, type) and issubclass(item, margo_agent.Record)]
        self.assertGreater(len(records), 40)
        self.assertEqual([record.__name__ for record in records if not record.__doc__], [])


if __name__ == "__main__":
    unittest.main()
