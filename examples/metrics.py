#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Metrics of margo_agent.py for Prometheus: reads `status --json` on stdin, prints the text format on stdout.

With node_exporter's textfile collector, by cron:

    margo-agent status --json | python3 metrics.py > /var/lib/node_exporter/margo.prom.tmp && mv /var/lib/node_exporter/margo.prom.tmp \\
        /var/lib/node_exporter/margo.prom

Alarms that are worth having: margo_certificate_end_seconds - time() < 7 * 86400, time() - margo_last_poll_seconds > 3600,
margo_last_poll_ok == 0, margo_deployments{state="failed"} > 0, margo_outbox > 0 for an hour.
"""
import calendar
import json
import sys
import time

STATES = ("pending", "installing", "installed", "failed", "removing", "removed")


def find_seconds(text):
    """RFC 3339 in UTC to Unix seconds; 0 where there is none."""
    return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")) if text else 0


def quote(text):
    """A label's value."""
    return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def make_lines(status):
    """The metrics, each with its help and type."""
    last = status["lastPoll"]
    states = [deployment["state"] for deployment in status["deployments"]]
    metrics = [
        ("info", "Version and profile of the agent.", {"version": status["version"], "profile": status["profile"]}, 1),
        ("enrolled", "Whether the WFM knows this device.", {}, int(status["enrolled"])),
        ("certificate_end_seconds", "When the own certificate ends, Unix time.", {}, find_seconds(status["identity"]["notAfter"])),
        ("desired_version", "Version of the accepted desired state, as far as it is a number.", {}, status["desiredState"]["version"] or 0),
        ("last_poll_seconds", "When the last poll was, Unix time.", {}, find_seconds(last["at"])),
        ("last_poll_ok", "Whether it ended as it should.", {}, int(last["result"] in ("unchanged", "applied"))),
        ("outbox", "Reports that wait for the WFM.", {}, status["outbox"]),
        *(("deployments", "Deployments by state.", {"state": state}, states.count(state)) for state in STATES),
        *(("deployment_failed", "Whether a deployment has failed.", {"name": item["name"], "code": item["error"]["code"]},
           int(item["state"] == "failed")) for item in status["deployments"])]
    known = set()
    for name, meaning, labels, value in metrics:
        if name not in known:
            yield f"# HELP margo_{name} {meaning}"
            yield f"# TYPE margo_{name} gauge"
            known.add(name)
        inside = ",".join(f"{key}={quote(item)}" for key, item in labels.items())
        yield f"margo_{name}{'{' + inside + '}' if inside else ''} {value if isinstance(value, (int, float)) else 0}"


if __name__ == "__main__":
    print("\n".join(make_lines(json.load(sys.stdin))))
