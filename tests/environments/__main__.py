"""python3 -m tests.environments NAME...: tries each environment and prints how it went; see __init__.py."""
import subprocess
import sys
import time

from tests.environments import Broken, ENVIRONMENTS


def main():
    names = sys.argv[1:] or ["unit"]
    broken = 0
    for name in ENVIRONMENTS if names == ["all"] else names:
        began = time.monotonic()
        print(f"=== {name}: {ENVIRONMENTS[name].__doc__}", flush=True)
        try:
            ENVIRONMENTS[name]()
            verdict = "all is well"
        except (Broken, subprocess.TimeoutExpired) as error:
            verdict = f"FAILED: {error}"
            broken += 1
        print(f"=== {name}: {verdict}, {time.monotonic() - began:.0f} s", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
