#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Another processor, emulated program by program: the agent's own tests that need no real engine.  Containers cannot be started so.
set -eu
uname -m
python3 -c 'import platform, ssl; print(platform.python_version(), ssl.OPENSSL_VERSION)'
python3 margo_agent.py version
for module in tests.test_status tests.test_plan tests.test_store tests.test_desired_state tests.test_transport; do
    echo "== $module"
    python3 -m unittest -q "$module"
done
python3 -m unittest -q tests.test_agent.Cycle.test_a_reboot_without_network_brings_the_last_state_up
echo "== all is well"
