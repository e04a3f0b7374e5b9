#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A hook for margo_agent.py: no update while the line produces, for components whose vendor asks for that by an extension of its own.

In the agent's configuration, with this file made executable and owned by the agent's user:

    hooks: {run: [/usr/lib/margo/hook.py], timeout: 60s}

In the ApplicationDeployment, beside a component's `name` and `properties`:

    x-example-industries-extensions: {updateOnlyWhenIdle: true}

The agent calls it with the event as argument (before-install, after-install, before-update, after-update, before-removal,
after-removal) and the facts as JSON on stdin.  The exit code of a `before` event decides: anything but 0 fails the component, what
stands on stderr tells the fleet manager why, and the agent tries again later, with growing delays.
"""
import json
import os
import sys

PRODUCING = "/run/line/producing"                   # the line's controller keeps this file while it produces


def main():
    """0: go on; 1: not now."""
    facts = json.load(sys.stdin)
    wishes = facts["extensions"]["component"].get("x-example-industries-extensions", {})
    if facts["event"] == "before-update" and wishes.get("updateOnlyWhenIdle") is True and os.path.exists(PRODUCING):
        sys.stderr.write(f"the line is producing; {facts['component']} {facts['revision']} has to wait\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
