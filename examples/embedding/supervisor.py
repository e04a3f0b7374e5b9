#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A supervisor of your own for margo_agent.py: polls from your process, your logging, your idea of what to do about faults.

    python3 examples/embedding/supervisor.py /etc/margo/agent.yaml [CYCLES]

It runs CYCLES polls (default: for ever), logs by Python's `logging`, and prints a line for each deployment whose state has changed.
Exit code: that of the last poll; 2 for a configuration that cannot be used.
"""
import logging
import os
import sys
import time

sys.path.insert(1, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import margo_agent                                  # noqa: E402


def write_log(level, message, fields):
    """Hands what the agent has to say to `logging`."""
    facts = " ".join(f"{key}={value}" for key, value in fields.items())
    logging.getLogger("margo").log(getattr(logging, level.upper()), "%s %s", message, facts)


def main(path, cycles=float("inf")):
    """Polls as often as it is asked to; the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    margo_agent.log.callback = write_log
    known, code = {}, 0
    while cycles > 0:
        cycles -= 1
        delay = 60.0
        try:
            config = margo_agent.load_config(path)  # read anew each time, as `run` does
            outcome = margo_agent.Agent(config).cycle()
            code, delay = outcome.code, outcome.delay
            for item in margo_agent.status(config)["deployments"]:
                if known.get(item["deploymentId"]) != item["state"]:
                    known[item["deploymentId"]] = item["state"]
                    print(item["name"], item["state"], item["error"]["message"], flush=True)
        except margo_agent.ConfigError as error:    # every fault of the file, with its key
            logging.error("%s", error.message)
            return error.exit
        except margo_agent.MargoError as error:     # Locked, StorageError: another one works, or the disk is full
            logging.warning("%s", error.message)
            code = error.exit
        if cycles > 0:
            time.sleep(delay)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:3])))
