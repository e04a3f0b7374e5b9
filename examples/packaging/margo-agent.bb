# SPDX-License-Identifier: Apache-2.0
# Yocto recipe: copy it into a layer of yours as recipes-support/margo-agent/margo-agent_VERSION.bb, and beside it, into files/,
# margo_agent.py, LICENSE and examples/margo-agent.service.
SUMMARY = "Device side of Margo workload fleet management, in one file"
DESCRIPTION = "Fetches from a Workload Fleet Manager which applications should run on this device, and makes its containers match."
HOMEPAGE = "https://margo.org"
SECTION = "admin"
LICENSE = "Apache-2.0"
LIC_FILES_CHKSUM = "file://LICENSE;md5=3b83ef96387f14655fc854ddc3c6bd57"

SRC_URI = "file://margo_agent.py \
           file://LICENSE \
           file://margo-agent.service \
           "

S = "${UNPACKDIR}"

inherit python3native systemd

SYSTEMD_SERVICE:${PN} = "margo-agent.service"
# it has no configuration yet
SYSTEMD_AUTO_ENABLE = "disable"

do_install() {
    install -d ${D}${libdir}/margo ${D}${bindir} ${D}${systemd_system_unitdir} ${D}${sysconfdir}/margo
    install -m 0644 ${S}/margo_agent.py ${D}${libdir}/margo/margo_agent.py
    # compiled here: the root file system of a device may be read-only
    ${PYTHON} -m compileall -q -d ${libdir}/margo --invalidation-mode unchecked-hash ${D}${libdir}/margo
    printf '#!/usr/bin/python3 -I\nimport sys\n\nsys.path.insert(0, "%s")\nfrom margo_agent import main\n\nsys.exit(main())\n' \
        ${libdir}/margo > ${D}${bindir}/margo-agent
    chmod 0755 ${D}${bindir}/margo-agent
    sed 's,/usr/bin/python3 -I /usr/local/lib/margo/margo_agent.py,${bindir}/margo-agent,' ${S}/margo-agent.service \
        > ${D}${systemd_system_unitdir}/margo-agent.service
}

FILES:${PN} += "${libdir}/margo ${systemd_system_unitdir}"
CONFFILES:${PN} = "${sysconfdir}/margo/agent.yaml"

RDEPENDS:${PN} = "openssl-bin python3-modules"
RRECOMMENDS:${PN} = "podman"
