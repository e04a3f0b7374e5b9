#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Builds an OpenWrt package: the agent as bytecode alone, with an init script for procd.
#
#   sh examples/packaging/openwrt.sh FOLDER [AGENT]     # AGENT: a margo_agent.py, such as one of examples/firmware/strip.py
#
# PYTHON is the Python that compiles it (default python3); it has to be of the device's version, such as 3.11 for 3.11.
set -eu
folder=${1:?usage: sh examples/packaging/openwrt.sh FOLDER [AGENT]}
here=$(cd "$(dirname "$0")" && pwd)
agent=${2:-$here/../../margo_agent.py}
python=${PYTHON:-python3}
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$agent")-r1
minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 022
mkdir -p "$work/data/usr/lib/margo" "$work/data/usr/bin" "$work/data/etc/init.d" "$work/data/etc/margo" \
    "$work/data/lib/upgrade/keep.d" "$work/control" "$folder"

"$python" -c 'import py_compile, sys
py_compile.compile(sys.argv[1], sys.argv[2], "margo_agent.py", doraise=True,
                   invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)' "$agent" "$work/data/usr/lib/margo/margo_agent.pyc"
cat > "$work/data/usr/bin/margo-agent" <<'END'
#!/bin/sh
exec python3 /usr/lib/margo/margo_agent.pyc "$@"
END
cp "$here/margo-agent.init" "$work/data/etc/init.d/margo-agent"
chmod 755 "$work/data/usr/bin/margo-agent" "$work/data/etc/init.d/margo-agent"
# what a firmware upgrade has to keep: settings, keys, the state
printf '/etc/margo/\n' > "$work/data/lib/upgrade/keep.d/margo-agent"

cat > "$work/control/control" <<END
Package: margo-agent
Version: $version
Depends: python3-light, python3-openssl, python3-urllib, python3-codecs, python3-email, python3-logging
Architecture: all
Section: utils
License: Apache-2.0
Maintainer: ${MAINTAINER:-Example Industries <margo@example.com>}
Installed-Size: $(du -sb "$work/data" | cut -f 1)
Description: Margo workload fleet client, compiled for Python $minor
END
cat > "$work/control/postinst" <<'END'
#!/bin/sh
# in an image that is being built, IPKG_INSTROOT is its root and nothing can be started
[ -n "$IPKG_INSTROOT" ] || [ ! -e /etc/margo/agent.yaml ] || { /etc/init.d/margo-agent enable; /etc/init.d/margo-agent restart; }
exit 0
END
cat > "$work/control/prerm" <<'END'
#!/bin/sh
[ -n "$IPKG_INSTROOT" ] || { /etc/init.d/margo-agent stop; /etc/init.d/margo-agent disable; }
exit 0
END
chmod 755 "$work/control/postinst" "$work/control/prerm"

# pack FILE FOLDER: a tar+gzip with everything of root and of no time in particular
pack() {
    tar -C "$2" --format=gnu --numeric-owner --owner=0 --group=0 --sort=name --mtime=@0 -cf - . | gzip -9n > "$1"
}
echo 2.0 > "$work/debian-binary"
mkdir "$work/package"
pack "$work/package/data.tar.gz" "$work/data"
pack "$work/package/control.tar.gz" "$work/control"
mv "$work/debian-binary" "$work/package/"
pack "$folder/margo-agent_${version}_all.ipk" "$work/package"
echo "$folder/margo-agent_${version}_all.ipk"
