#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds the Debian package margo-agent with dpkg-deb alone.
#
#   sh examples/packaging/debian.sh FOLDER [AGENT]      # AGENT: a margo_agent.py, such as one of examples/firmware/strip.py
#
# MAINTAINER="Name <address>" is who answers for it; SOURCE_DATE_EPOCH its time (default: that of the agent's file).
set -eu
folder=${1:?usage: sh examples/packaging/debian.sh FOLDER [AGENT]}
here=$(cd "$(dirname "$0")" && pwd)
agent=${2:-$here/../../margo_agent.py}
maintainer=${MAINTAINER:-Example Industries <margo@example.com>}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(stat -c %Y "$agent")}
export SOURCE_DATE_EPOCH
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$agent")-1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 022
root=$work/margo-agent
doc=$root/usr/share/doc/margo-agent
mkdir -p "$root/DEBIAN" "$root/usr/bin" "$root/usr/share/margo-agent" "$root/lib/systemd/system" "$doc/examples" "$folder"

cp "$agent" "$root/usr/share/margo-agent/margo_agent.py"
sed -i '1s,^#!.*,# A module; the command is /usr/bin/margo-agent.,' "$root/usr/share/margo-agent/margo_agent.py"
chmod 644 "$root/usr/share/margo-agent/margo_agent.py"
cat > "$root/usr/bin/margo-agent" <<'END'
#!/usr/bin/python3 -I
"""The command of the agent below /usr/share, which is compiled there."""
import sys

sys.path.insert(0, "/usr/share/margo-agent")
from margo_agent import main  # noqa: E402

sys.exit(main())
END
chmod 755 "$root/usr/bin/margo-agent"
mkdir -p "$root/usr/share/man/man8" "$root/usr/share/bash-completion/completions"
python3 "$here/manual.py" man "$agent" | gzip -9n > "$root/usr/share/man/man8/margo-agent.8.gz"
python3 "$here/manual.py" bash "$agent" > "$root/usr/share/bash-completion/completions/margo-agent"
for unit in "$here/../margo-agent.service" "$here/margo-agent-poll.service" "$here/margo-agent-poll.timer"; do
    sed 's,/usr/bin/python3 -I /usr/local/lib/margo/margo_agent.py,/usr/bin/margo-agent,' "$unit" \
        > "$root/lib/systemd/system/$(basename "$unit")"
done
cp "$here/../agent.yaml" "$here/margo-agent.cron" "$doc/examples/"
sed -i 's,cd /usr/local/lib/margo && exec python3 -m margo_agent,exec margo-agent,; /python3 -m keeps/d' "$doc/examples/margo-agent.cron"
cat > "$doc/copyright" <<END
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: margo-agent

Files: *
Copyright: $(date -u -d "@$SOURCE_DATE_EPOCH" +%Y) the authors of margo-agent
License: Apache-2.0
 On Debian systems the text is in /usr/share/common-licenses/Apache-2.0.
END
cat > "$work/changelog" <<END
margo-agent ($version) stable; urgency=medium

  * Built from margo_agent.py by its packaging example.

 -- $maintainer  $(date -R -u -d "@$SOURCE_DATE_EPOCH")
END
gzip -9n < "$work/changelog" > "$doc/changelog.Debian.gz"

cat > "$root/DEBIAN/control" <<END
Package: margo-agent
Version: $version
Architecture: all
Maintainer: $maintainer
Section: admin
Priority: optional
Depends: python3 (>= 3.7)
Recommends: openssl, podman, netavark | containernetworking-plugins, aardvark-dns, catatonit
Suggests: git
Installed-Size: $(du -sk "$root/usr" | cut -f 1)
Description: Margo workload fleet client for small devices
 The agent polls a Margo Workload Fleet Manager for what this device should
 run, verifies it, has a container engine run it, and reports what came of it.
 It never listens: every connection starts at the device.
END
cat > "$root/DEBIAN/postinst" <<'END'
#!/bin/sh
set -e
if [ "$1" = configure ]; then
    py3compile -p margo-agent
    if [ -d /run/systemd/system ]; then
        systemctl --system daemon-reload
        # what runs goes on with the new version; nothing is started that did not run
        deb-systemd-invoke try-restart margo-agent.service || true
    fi
fi
END
cat > "$root/DEBIAN/prerm" <<'END'
#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    deb-systemd-invoke stop margo-agent.service margo-agent-poll.timer
fi
py3clean -p margo-agent
END
cat > "$root/DEBIAN/postrm" <<'END'
#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then
    systemctl --system daemon-reload
fi
if [ "$1" = purge ]; then
    rm -rf /var/lib/margo-agent
fi
END
chmod 755 "$root/DEBIAN/postinst" "$root/DEBIAN/prerm" "$root/DEBIAN/postrm"
(cd "$root" && find usr lib -type f -exec md5sum {} +) > "$root/DEBIAN/md5sums"
find "$root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
dpkg-deb --root-owner-group -Zxz --build "$root" "$folder/margo-agent_${version}_all.deb"
