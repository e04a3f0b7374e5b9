"""The tests; tests/shards.py runs them side by side."""
import os
import sys

if os.environ.get("MARGO_AGENT"):                   # the tests import that margo_agent.py instead of the one of the repository
    sys.path.insert(0, os.path.dirname(os.path.abspath(os.environ["MARGO_AGENT"])))


def load_tests(loader, _, pattern):
    """Called by `python3 -m unittest`, which looks no further then."""
    from tests import shards
    return shards.Shards([loader.discover(os.path.dirname(__file__), pattern or "test*.py", shards.ROOT)])
