"""The tests; tests/shards.py runs them side by side."""
import os


def load_tests(loader, _, pattern):
    """Called by `python3 -m unittest`, which looks no further then."""
    from tests import shards
    return shards.Shards([loader.discover(os.path.dirname(__file__), pattern or "test*.py", shards.ROOT)])
