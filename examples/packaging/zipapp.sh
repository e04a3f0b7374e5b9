#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Packs the agent into one executable file, compiled for the Python that makes it; another Python compiles it anew at each start.
#
#   sh examples/packaging/zipapp.sh FILE [AGENT]        # AGENT: a margo_agent.py, such as one of examples/firmware/strip.py
set -eu
file=${1:?usage: sh examples/packaging/zipapp.sh FILE [AGENT]}
agent=${2:-$(dirname "$0")/../../margo_agent.py}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$agent" "$work/margo_agent.py"
# a compiled file lies beside its source in an archive, and holds for as long as the source is the same
python3 -c 'import py_compile, sys
py_compile.compile(sys.argv[1], sys.argv[1] + "c", "margo_agent.py", doraise=True,
                   invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)' "$work/margo_agent.py"
python3 -m zipapp "$work" --output "$file" --python "/usr/bin/env python3" --main margo_agent:main --compress
