#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""wfm.py: an example Margo Workload Fleet Manager (WFM), for development and demonstration.

It is the server side of Margo's Management Interface 1.0.0-rc.3 in one file, and with --profile signed that of the first preview
release: enough to try any WFM client, strict about what a client may send, and no more than that.  It keeps no users, has no redundancy
and is not meant for a plant.

    sh examples/pki.sh pki                                   # certificates for trying things out
    mkdir -p deployments packages state
    python3 examples/wfm.py --listen 127.0.0.1:8443 --certificate pki/wfm.pem --key pki/wfm.key --trust-bundle pki/bundle.json \\
        --deployments deployments --state state \\
        --registry 127.0.0.1:5000 --packages packages --site-certificate pki/site.pem --site-key pki/site.key

The desired state is a folder of ApplicationDeployment files (*.yaml): those in DEPLOYMENTS/<client id>/ if there is such a folder,
else those in DEPLOYMENTS itself, for every client.  It is looked at on each request.  A changed set gets the next manifestVersion.  While
a file in it is not usable, stderr says why and the set served before stays; if there was none before, that file is left out.
Put files in place by renaming, so that none is read half-written.

Clients prove who they are by mutual TLS 1.3 and are recognised by their SPIFFE ID.  Certificates, keys and the trust bundle are read
anew for each connection, so they can be replaced at run time.

With --profile signed the server alone has a certificate in TLS, an ordinary one.  A client onboards with a certificate of its own, which
must lead to an anchor of the trust bundle, and is given a client id; from then on every request carries an RFC 9421 signature by that
certificate's key, below /api/v1/clients/<client id>/.  Signatures are verified by the openssl command; each counts once and for five minutes.

    python3 examples/wfm.py --profile signed --dialect a --certificate pki/site.pem --key pki/site.key --trust-bundle pki/ca.pem \\
        --root-ca pki/site-ca.pem --deployments deployments --state state

stdout has one line for each listener, a configuration for a client of this WFM, and then one line for each event; the line
`listening https://HOST:PORT` comes when all listeners are ready.  A refusal is told in words, to the client and on stdout.

With --page 127.0.0.1:8080 a browser on this machine sees the fleet: each device, what it should run and what it reported, when it
was last heard.  The page can only be read, has no script, and looks for news every five seconds.

The state directory holds
    clients/<client id>/       desired.json (the last manifest versions), capabilities.json, statuses.json (the latest ones)
    onboarded.json             with --profile signed: the certificate of each client id
    statuses.jsonl             every accepted deployment status: time, client, deploymentId, body
    requests.jsonl             with --log-requests, every request: time, listener, client, method, path, headers, status
    faults.json                put there by you, read on each request: answers to spoil, to see what a client makes of it

faults.json is a list; the first entry that fits a request and is not used up takes effect (a list with a mistake: none, stderr says why):
    "method", "path", "client"   what it fits; left out: anything.  The path may hold * and is the one on the wire, with any prefix
    "times"                      how often; left out: always
    "delay"                      seconds to wait before anything else
    "status", "headers", "body" (text), "problem" (an object, or the name of a problem type)
                                 with "status" or "problem" the request is answered so and not carried out; else the true answer is changed
    "late"                       true: the request is carried out nevertheless, only its answer is replaced
    "close"                      true: the connection is closed instead of an answer (also with "late")
    "corrupt"                    true: one bit of the body is flipped
    "truncate"                   the body is cut after so many bytes and the connection closed, the announced length stays
    [{"method": "GET", "path": "/api/v1/deployments", "status": 503, "headers": {"Retry-After": "120"}, "times": 2}]

Compose Archives are served (--registry) out of PACKAGES/<name>/<tag>/, where the name may have several parts and the folder holds compose.yaml
and what belongs to it; the archive is made from it on request.  A file PACKAGES/<name>/<tag>.tar.gz is served as it is.  The archives are also
there as plain files, /files/<name>/<tag>.tar.gz, for deployments of the time before packages came from registries.
The site's certificate is for the registry and for the discovery document and trust bundle (--mis): ordinary server-side TLS, no SPIFFE.
"""
import argparse
import base64
import collections
import contextlib
import datetime
import fnmatch
import gzip
import hashlib
import hmac
import html
import http.client
import http.server
import io
import ipaddress
import json
import os
import re
import secrets
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import urllib.parse

sys.path.insert(1, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
try:
    from margo_agent import YAMLError, load_yaml
except ImportError:
    sys.exit("wfm.py reads YAML by margo_agent.load_yaml: put margo_agent.py beside it, into the folder above, or on PYTHONPATH")


# ------------------------------------------------------------------------------------------------------------------------------
# 1. Constants
# ------------------------------------------------------------------------------------------------------------------------------

MANIFEST_TYPE = "application/vnd.margo.manifest.v1+json"
BUNDLE_TYPE = "application/vnd.margo.bundle.v1+tar+gzip"
PACKAGE_TYPE = "application/vnd.org.margo.component.compose+json"
PACKAGE_LAYER_TYPE = "application/vnd.org.margo.component.compose.tar+gzip"
OCI_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
OCI_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
IMMUTABLE = "private, max-age=31536000, immutable"

MAX_BODY = 1024 * 1024          # bytes that a client may send
MAX_DEPTH = 64                  # of objects and arrays within each other, that it may send
MAX_VERSION = 2 ** 64 - 1       # manifestVersion is an unsigned 64 bit number
MAX_REFUSALS = 3                # that the fleet page shows of a client
SILENT = 300                    # seconds after which it marks a client as silent
GENERATIONS = 8                 # sets of deployments that stay fetchable, the current one included
TIMEOUT = 30                    # seconds for a handshake, and for each wait for data
LINGER = 2                      # seconds to wait for each piece of a body that is not wanted, and for the peer's goodbye
TOKEN_LIFETIME = 300            # seconds
SIGNATURE_AGE, SIGNATURE_SKEW = 300, 30     # seconds that a signature counts, and that it may come from the future
PARTIAL_CHAIN = 0x80000         # ssl.VERIFY_X509_PARTIAL_CHAIN, which has that name since Python 3.10

NAME = r"[A-Za-z0-9._-]+"
UUID = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
DEVICE_ID = r"[A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*"
EXTENSION = r"x-[a-z][a-z0-9-]*-extensions"
REVISION = (r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
            r"(-(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(\.(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*)?(_[0-9a-zA-Z-]+(\.[0-9a-zA-Z-]+)*)?")

SIZE, LARGE = r"[0-9]+ ?(Ki|Mi|Gi)", r"[0-9]+ ?(Ki|Mi|Gi|Ti|Pi|Ei)"
OBJECT_NAME, APPLICATION_ID, COMPONENT_NAME = "[a-z0-9]([-a-z0-9.]*[a-z0-9])?", "[-a-z0-9]{1,200}", "[a-z0-9-]+"
DURATION, HTTPS, OCI, TEXT = r"\d+m\d+s", "https://.+", "oci://.+", r"(?s).+"
IN_WORDS = {
    UUID: "a UUID such as 3f1d6f0e-5c35-4c9f-9b43-2f6f6c1f7a10",
    DEVICE_ID: "a device id: letters, digits and . _ ~ -, with / between a gateway and its child",
    DEVICE_ID + r"(/\*)?": "a device id such as line-4-cell-2, or gateway/*",
    REVISION: "a version such as 1.0.0, without v, with _ for +",
    SIZE: "a size such as 512Mi or 8Gi",
    LARGE: "a size such as 64Gi or 2Ti",
    OBJECT_NAME: "a name of small letters, digits, - and .",
    APPLICATION_ID: "an application id: small letters, digits and -",
    COMPONENT_NAME: "a name of small letters, digits and -",
    DURATION: "a time such as 2m0s",
    HTTPS: "an address that begins with https://",
    OCI: "an address such as oci://registry.example/name",
    TEXT: "a text that is not empty",
}

STATES = ("failed", "removing", "installing", "pending", "removed", "installed")      # most severe first
HOSTING = ("cpus", "memory", "storage", "peripherals", "interfaces", "otelCollector", "supportedRuntimes", "supportedDeploymentTypes")
PERIPHERALS = ("gpu", "display", "camera", "microphone", "speaker")
INTERFACES = ("ethernet", "wifi", "cellular", "bluetooth", "usb", "canbus", "rs232")
GATEWAY_CODES = ("101", "102", "103")
ROLES = ("Standalone Cluster", "Cluster Leader", "Standalone Device", "Gateway")

PROBLEM_TYPES = "https://docs.margo.org/specification/problem-types#"
PROBLEMS = {
    "invalid-request": (400, "Invalid Request"),
    "semantic-error": (422, "Semantic Error"),
    "not-authorized": (403, "Not Authorized"),
    "gateway-not-found": (404, "Gateway Not Found"),
    "device-not-found": (404, "Device Not Found"),
    "deployment-not-found": (404, "Deployment Not Found"),
    "invalid-bundle": (404, "Invalid Bundle"),
    "server-cannot-generate-response": (406, "Server Cannot Generate Response"),
    "discovery-document-not-found": (404, "Discovery Document Not Found"),
    "spiffe-bundle-not-found": (404, "SPIFFE Bundle Not Found"),
}


# ------------------------------------------------------------------------------------------------------------------------------
# 2. Answers and problems
# ------------------------------------------------------------------------------------------------------------------------------

Request = collections.namedtuple("Request", "method path query headers body client target")     # target: path and query as on the wire
Reply = collections.namedtuple("Reply", "status headers body")
Contact = collections.namedtuple("Contact", "at refusals")                  # at: seconds since the epoch; refusals: {request: why}


class Problem(Exception):
    """An RFC 9457 problem: `kind` is the name of a Margo problem type, or an HTTP status for about:blank."""

    def __init__(self, kind, detail="", headers=None, **members):
        super().__init__(detail)
        status, title = (kind, http.client.responses.get(kind, "Unknown")) if isinstance(kind, int) else PROBLEMS[kind]
        self.status, self.headers = status, headers or {}
        self.document = {"type": "about:blank" if isinstance(kind, int) else PROBLEM_TYPES + kind, "title": title, "status": status}
        if detail:
            self.document["detail"] = detail
        self.document.update(retry_advice(status), **members)

    def reply(self):
        return Reply(self.status, dict({"Content-Type": "application/problem+json"}, **self.headers), make_json(self.document))


def retry_advice(status):
    """What a problem of this status says about trying again."""
    if status in (429, 500, 503):
        return {"retryable": True, "retryAfterSeconds": 5, "backoffStrategy": "exponential"}
    return {"retryable": False, "backoffStrategy": "none"}


def explain(reply):
    """What a refusal says, in words on one line."""
    try:
        document = json.loads(reply.body.decode())
        said = document["errors"] if "errors" in document and "title" not in document else [document]
        words = [item.get("detail") or item.get("message") or item.get("title") or item.get("error") for item in said]
        words += [f"{item['field']} {item['message']}" for item in document.get("errors", ()) if "field" in item]
        return "; ".join(str(word).rstrip(".") for word in words if word)
    except (ValueError, KeyError, TypeError, AttributeError):
        return reply.body.decode(errors="replace")


def make_json(value):
    """JSON in one stable form, as bytes."""
    return json.dumps(value, separators=(",", ":")).encode()


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def now_text():
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def printable(text):
    """Text that came from outside, fit for a line on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def is_accepted(accept, media_type):
    """Whether an Accept header (None: there is none) allows a media type."""
    if accept is None or not accept.strip():
        return True
    ranges = {}
    for item in accept.lower().split(","):
        name, _, parameters = item.partition(";")
        quality = re.search(r"(?:^|;)\s*q\s*=\s*([0-9.]+)", parameters)
        ranges[name.strip()] = not quality or quality.group(1).strip("0.") != ""
    for name in (media_type, media_type.split("/")[0] + "/*", "*/*"):       # the most specific range decides
        if name in ranges:
            return ranges[name]
    return False


def serve_content(request, body, media_type, cache_control):
    """200 with a strong ETag over the body, 304 if the client has it, 406 if it does not want it."""
    if not is_accepted(request.headers.get("Accept"), media_type):
        raise Problem("server-cannot-generate-response", f"this resource is {media_type} only")
    etag = f'"{sha256(body)}"'
    headers = {"ETag": etag, "Cache-Control": cache_control}
    known = [item.strip() for item in (request.headers.get("If-None-Match") or "").split(",")]
    if "*" in known or etag in [item[2:] if item.startswith("W/") else item for item in known]:
        return Reply(304, headers, b"")
    return Reply(200, dict(headers, **{"Content-Type": media_type}), body)


def dispatch(site, routes, request, path):
    """Calls the method of `site` that a table of (pattern, {HTTP method: name of the Python method}) names, with the path's parts."""
    for pattern, methods in routes:
        match = re.fullmatch(pattern, path)
        if match:
            name = methods.get("GET" if request.method == "HEAD" else request.method)
            if not name:
                allowed = sorted(methods) + (["HEAD"] if "GET" in methods else [])
                raise Problem(405, f"{request.method} is not for this resource", {"Allow": ", ".join(allowed)})
            return getattr(site, name)(request, *[urllib.parse.unquote(part) for part in match.groups()])
    raise Problem(404, "there is nothing at this path")


# ------------------------------------------------------------------------------------------------------------------------------
# 3. Checking what a client sends
# ------------------------------------------------------------------------------------------------------------------------------

KINDS = {"string": str, "object": dict, "array": list, "boolean": bool, "number": (int, float), "integer": int}


def is_kind(value, kind):
    return isinstance(value, KINDS[kind]) and (kind == "boolean" or not isinstance(value, bool))


def parse_json(body):
    """One JSON object in UTF-8 without a duplicate member; anything else is #invalid-request."""
    def make_object(pairs):
        value = {}
        for key, item in pairs:
            if key in value:
                raise ValueError(f"the member {key!r} occurs twice in one object")
            value[key] = item
        return value

    def refuse(text):
        raise ValueError(f"{text} is not JSON")

    def make_float(text):
        if abs(float(text)) == float("inf"):
            raise ValueError(f"{text} is too large a number")
        return float(text)

    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=make_object, parse_constant=refuse, parse_float=make_float)
        check_depth(value)
    except (ValueError, RecursionError) as error:
        raise Problem("invalid-request", f"the body is not one JSON document: {error}") from None
    if not isinstance(value, dict):
        raise Problem("invalid-request", "the body is not a JSON object")
    return value


def check_depth(value):
    """Raises ValueError if a value is nested too deeply to be written again."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [child for item in level if isinstance(item, (dict, list)) for child in (item.values() if isinstance(item, dict) else item)]
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


class Inspection:
    """Goes through a document and collects what is wrong in `errors`, one {field, message} each."""

    def __init__(self):
        self.errors = []

    def add(self, field, message):
        self.errors.append({"field": field, "message": message})

    def member(self, parent, where, key, kind, required=True, pattern=None, words=None):
        """The member `key` of an object if it is there and as it should be, else None; `where` is the object's own field path."""
        field = f"{where}.{key}" if where else key
        if key not in parent:
            if required:
                self.add(field, "is missing")
            return None
        value = parent[key]
        if not is_kind(value, kind):
            self.add(field, f"must be of type {kind}")
        elif pattern and not re.fullmatch(pattern, value):
            self.add(field, f"must be {IN_WORDS[pattern]}, not {json.dumps(value)[:60]}")
        elif words and value not in words:
            self.add(field, "must be one of " + ", ".join(words))
        else:
            return value
        return None

    def items(self, parent, where, key, kind, least=0, words=None):
        """The good items of an array member, as (field path, item)."""
        value = self.member(parent, where, key, "array")
        field = f"{where}.{key}" if where else key
        if value is None:
            return []
        if len(value) < least:
            self.add(field, f"needs at least {least} item")
        good = []
        for index, item in enumerate(value):
            if not is_kind(item, kind):
                self.add(f"{field}[{index}]", f"must be of type {kind}")
            elif words and item not in words:
                self.add(f"{field}[{index}]", "must be one of " + ", ".join(words))
            else:
                good.append((f"{field}[{index}]", item))
        return good

    def close(self, detail):
        """Raises #semantic-error if anything was found."""
        if self.errors:
            raise Problem("semantic-error", detail, errors=self.errors)


def check_capabilities(document, device_id, dialect):
    """A DeviceCapabilitiesManifest; raises #semantic-error."""
    if dialect:
        check_older_capabilities(document, device_id, dialect)
        return
    found = Inspection()
    properties = found.member(document, "", "properties", "object")
    labels = found.member(document, "", "labels", "object", required=False)
    for key in document:
        if re.fullmatch(EXTENSION, key):
            found.member(document, "", key, "object")
        elif key not in ("properties", "labels"):
            found.add(key, "is not allowed here; extensions are called x-<name>-extensions, in lower case")
    for key, value in (labels or {}).items():
        check_label(found, f"labels.{key}", value)
    if properties is not None:
        if found.member(properties, "properties", "id", "string", pattern=DEVICE_ID) not in (None, device_id):
            found.add("properties.id", "differs from the device id in the path")
        for key in ("vendor", "modelNumber", "serialNumber"):
            found.member(properties, "properties", key, "string")
        if any(key in properties for key in HOSTING):           # none of them: a gateway that hosts nothing itself
            check_hosting(found, properties, labels)
    found.close("The capabilities were understood but not accepted.")


def check_older_capabilities(document, device_id, dialect):
    """The capabilities of the `signed` profile: dialect a with roles and resources, b flat; device_id: None where the path has none."""
    found = Inspection()
    check_heading(found, document, "device.margo.org/v1alpha1", "DeviceCapabilitiesManifest")
    properties = found.member(document, "", "properties", "object")
    for key in set(document) - {"apiVersion", "kind", "properties"}:
        if dialect == "a" or not re.fullmatch(EXTENSION, key):
            found.add(key, "is not allowed here")
    if properties is not None:
        if found.member(properties, "properties", "id", "string", pattern=DEVICE_ID) not in (None, device_id) and device_id is not None:
            found.add("properties.id", "differs from the device id in the path")
        for key in ("vendor", "modelNumber", "serialNumber"):
            found.member(properties, "properties", key, "string")
        if dialect == "b":
            if "cpus" in properties:
                found.add("properties.cpus", "is called cpu in this generation")
            if any(key in properties for key in ("cpu",) + HOSTING):
                check_hosting(found, properties, None, "properties", "cpu", ("oci",), ("helm", "compose"))
        else:
            check_roles(found, properties)
    found.close("The capabilities were understood but not accepted.")


def check_roles(found, properties):
    """Roles and resources of dialect a; a device that is a gateway and nothing else has no resources."""
    roles = [role for _, role in found.items(properties, "properties", "roles", "string", least=1, words=ROLES)]
    for key in ("cpu", "supportedRuntimes", "supportedDeploymentTypes", "otelCollector") + HOSTING[:5]:
        if key in properties:
            found.add(f"properties.{key}", "is not allowed here in this dialect")
    resources = found.member(properties, "properties", "resources", "object", required=roles != ["Gateway"])
    if resources is not None:
        where = "properties.resources"
        cpu = found.member(resources, where, "cpu", "object")
        if cpu is not None:
            check_cpu(found, f"{where}.cpu", cpu)
        check_equipment(found, resources, where)


def check_heading(found, document, version, kind):
    """The apiVersion and kind that every document of the `signed` profile begins with."""
    found.member(document, "", "apiVersion", "string", words=(version,))
    found.member(document, "", "kind", "string", words=(kind,))


def check_label(found, field, value):
    if isinstance(value, list):
        kinds = {kind for item in value for kind in ("string", "number") if is_kind(item, kind)}
        if len(kinds) > 1 or not all(is_kind(item, "string") or is_kind(item, "number") for item in value):
            found.add(field, "an array must hold strings only or numbers only")
    elif not (is_kind(value, "string") or is_kind(value, "number") or is_kind(value, "boolean")):
        found.add(field, "must be a string, a number, a boolean, or an array of strings or numbers")


def check_hosting(found, properties, labels, where="properties", cpus="cpus", runtimes=("oci", "custom"), types=("helm", "compose", "custom")):
    """The properties of a device that hosts workloads: all of them or none."""
    for field, item in found.items(properties, where, cpus, "object", least=1):
        check_cpu(found, field, item)
    check_equipment(found, properties, where)
    if found.member(properties, where, "otelCollector", "boolean") is False:
        found.add("properties.otelCollector", "must be true for a device that hosts workloads")
    chosen = [item for key, words in (("supportedRuntimes", runtimes), ("supportedDeploymentTypes", types))
              for _, item in found.items(properties, where, key, "string", least=1, words=words)]
    if "custom" in chosen and not labels:
        found.add("labels", "are needed beside `custom`, for applications to select on")


def check_cpu(found, field, item):
    cores = found.member(item, field, "cores", "number")
    if cores is not None and not cores > 0:
        found.add(f"{field}.cores", "must be above 0")
    found.member(item, field, "architecture", "string", required=False, words=("amd64", "arm64", "arm"))


def check_equipment(found, properties, where):
    found.member(properties, where, "memory", "string", pattern=SIZE)
    found.member(properties, where, "storage", "string", pattern=LARGE)
    for field, item in found.items(properties, where, "peripherals", "object"):
        found.member(item, field, "type", "string", words=PERIPHERALS)
        for key in ("manufacturer", "model"):
            found.member(item, field, key, "string", required=False)
    for field, item in found.items(properties, where, "interfaces", "object"):
        found.member(item, field, "type", "string", words=INTERFACES)


def check_status(body, deployment_id, known, dialect):
    """A DeploymentStatusManifest; `known`: the revisions of that deployment that this client was told of (parsed documents, the one of
    the reported manifest version first), [] if it is not known here.  Raises #semantic-error."""
    found = Inspection()
    if dialect:
        check_heading(found, body, "deployment.margo.org/v1alpha1", "DeploymentStatusManifest")
        for key in ("adoptedManifestVersion",) + (("deviceId",) if dialect == "a" else ()):
            if key in body:
                found.add(key, "is not allowed here in this generation")
    reported = found.member(body, "", "deploymentId", "string")
    if reported is not None and reported.lower() != deployment_id.lower():
        found.add("deploymentId", "differs from the deployment id in the path")
    device_id = found.member(body, "", "deviceId", "string", required=False, pattern=DEVICE_ID)
    target = known[0]["metadata"].get("deviceId", "") if known else ""
    if "deviceId" not in body and "/" in target:
        found.add("deviceId", f"is required, the deployment is for a child device ({target})")
    version = None if dialect else found.member(body, "", "adoptedManifestVersion", "integer")
    if version is not None and not 1 <= version <= MAX_VERSION:
        found.add("adoptedManifestVersion", f"must be 1 to {MAX_VERSION}")

    parts = (device_id or "").split("/")
    gateways = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)] if device_id else []
    status = found.member(body, "", "status", "object")
    state = found.member(status, "status", "state", "string", words=STATES) if status is not None else None
    if status is not None:
        check_error(found, "status", status, state, {revision["metadata"]["name"] for revision in known}, gateways, dialect)
    states = {}
    for field, item in found.items(body, "", "components", "object"):
        name = found.member(item, field, "name", "string") or f"({field})"
        if name in states:
            found.add(f"{field}.name", "occurs twice")
        states[name] = found.member(item, field, "state", "string", words=STATES)
        check_error(found, field, item, states[name], {name}, gateways, dialect)
    if known:
        check_components(found, set(states), known)
    severity = [STATES.index(item) for item in states.values() if item]
    if state and severity and len(severity) == len(states) and state != STATES[min(severity)]:
        found.add("status.state", f"must be {STATES[min(severity)]}, the most severe state of the components")
    found.close("The deployment status was understood but not accepted.")


def check_error(found, where, holder, state, sources, gateways, dialect):
    """The `error` object of a status or component; `sources`: who may be named beside a gateway (empty: not known here)."""
    error = found.member(holder, where, "error", "object", required=state == "failed")
    if error is None:
        return
    field = f"{where}.error"
    if dialect == "a":                      # it knows no source
        for key in ("code", "message"):
            found.member(error, field, key, "string", pattern=TEXT)
        if "source" in error:
            found.add(f"{field}.source", "is not allowed here in this dialect")
        return
    code, source, _ = [found.member(error, field, key, "string", pattern=TEXT) for key in ("code", "source", "message")]
    if code in GATEWAY_CODES and source not in [None] + gateways:
        found.add(f"{field}.source", f"code {code} is for gateways, with the gateway's device id as source")
    elif source and sources and source not in sources and source not in gateways:
        found.add(f"{field}.source", "must be " + " or ".join(sorted(map(str, sources))) + ", or the id of the gateway that raised it")


def check_components(found, reported, known):
    """One entry for each component of the revision; those of another known revision may be there too, while they are being removed."""
    names = [{item["name"] for item in revision["spec"]["deploymentProfile"]["components"]} for revision in known]
    missing = min((wanted - reported for wanted in names[:1] or names), key=len)
    for name in sorted(missing):
        found.add("components", f"no entry for the component {name}")
    for name in sorted(reported.difference(*names)):
        found.add("components", f"{name} is no component of this deployment")


# ------------------------------------------------------------------------------------------------------------------------------
# 4. Deployments
# ------------------------------------------------------------------------------------------------------------------------------

Document = collections.namedtuple("Document", "deployment_id name text")        # name: of the file; text: str, for JSON


def parse_deployment(text, dialect=None):
    """The text of an ApplicationDeployment to its value; raises ValueError with all that is wrong.  dialect: of the `signed` profile."""
    value = load_yaml(text)
    if not isinstance(value, dict):
        raise ValueError("it is no YAML mapping")
    found = Inspection()
    metadata = found.member(value, "", "metadata", "object") or {}
    notes = metadata.get("annotations") if dialect == "a" and isinstance(metadata.get("annotations"), dict) else {}
    if dialect:
        check_heading(found, value, "application.margo.org/v1alpha1", "ApplicationDeployment")
    if "id" in notes:
        value.setdefault("id", notes["id"])
    found.member(value, "", "id", "string", pattern=UUID)
    for key in ("name", "namespace"):
        found.member(metadata, "metadata", key, "string", pattern=OBJECT_NAME)
    if dialect != "a":
        found.member(metadata, "metadata", "deviceId", "string", pattern=DEVICE_ID + r"(/\*)?")
    spec = found.member(value, "", "spec", "object") or {}
    holder, field = (notes, "metadata.annotations") if "applicationId" in notes else (spec, "spec")
    found.member(holder, field, "applicationId", "string", pattern=APPLICATION_ID)
    profile = found.member(spec, "spec", "deploymentProfile", "object") or {}
    where = "spec.deploymentProfile"
    words = ("helm", "compose", "helm.v3") if dialect else ("helm", "compose", "custom")
    kind = found.member(profile, where, "type", "string", words=words)
    names = []
    for field, item in found.items(profile, where, "components", "object", least=1):
        names.append(found.member(item, field, "name", "string", pattern=COMPONENT_NAME))
        properties = found.member(item, field, "properties", "object") or {}
        if dialect and kind == "compose":
            found.member(properties, f"{field}.properties", "packageLocation", "string", pattern=HTTPS)
            found.member(properties, f"{field}.properties", "keyLocation", "string", required=False, pattern=HTTPS)
        else:
            found.member(properties, f"{field}.properties", "repository", "string", pattern=OCI)
            found.member(properties, f"{field}.properties", "revision", "string", required=not dialect, pattern=REVISION)
        if not (dialect and properties.get("wait") in ("true", "false")):
            found.member(properties, f"{field}.properties", "wait", "boolean", required=False)
        found.member(properties, f"{field}.properties", "timeout", "string", required=False, pattern=DURATION)
    if len(set(names)) < len(names):
        found.add(f"{where}.components", "two components have one name")
    parameters = found.member(spec, "spec", "parameters", "object", required=False) or {}
    for key in parameters:
        parameter = found.member(parameters, "spec.parameters", key, "object") or {"targets": [], "value": ""}
        if "value" not in parameter:
            found.add(f"spec.parameters.{key}.value", "is missing")
        for field, item in found.items(parameter, f"spec.parameters.{key}", "targets", "object"):
            found.member(item, field, "pointer", "string")
            found.items(item, field, "components", "string")
    if found.errors:
        raise ValueError("; ".join(f"{error['field']} {error['message']}" for error in found.errors))
    return value


def read_deployments(folder, lenient, dialect):
    """The *.yaml files of a folder as ([Document] in the order of their ids, [what is wrong with the other files])."""
    documents, faults = {}, []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if name.startswith(".") or not name.endswith((".yaml", ".yml")) or not os.path.isfile(path):
            continue
        try:
            with open(path, "rb") as file:
                text = file.read().decode("utf-8", "surrogateescape" if lenient else "strict")
            deployment_id = find_id(name, text) if lenient else parse_deployment(text, dialect)["id"]
            if deployment_id.lower() in documents:
                raise ValueError(f"has the same id as {documents[deployment_id.lower()].name}")
            documents[deployment_id.lower()] = Document(deployment_id, name, text)
        except (OSError, ValueError, YAMLError) as error:
            faults.append(f"{path}: {error}")
    return [documents[key] for key in sorted(documents)], faults


def find_id(name, text):
    """The deployment id that a file is served under with --lenient: its name if that is a UUID, else its top-level `id`."""
    stem = name.rpartition(".")[0]
    match = re.search(rf"^id:[ \t]*[\"']?({UUID})[\"']?[ \t\r]*(#.*)?$", text, re.MULTILINE)
    if re.fullmatch(UUID, stem):
        return stem
    if not match:
        raise ValueError("neither its name nor a top-level `id` is a UUID")
    return match.group(1)


class Generation:
    """One set of deployments as it is served under one manifestVersion; made the same way each time, so equal sets are equal bytes."""

    def __init__(self, version, documents, root):
        self.version, self.documents, self.root = version, documents, root
        self.contents = {item.deployment_id.lower(): item.text.encode("utf-8", "surrogateescape") for item in documents}
        self.bundle = self.make_bundle()
        self.manifest = make_json(self.make_manifest())

    def make_bundle(self):
        """gzip(tar) with one <deployment id>.yaml for each deployment, or None if there is none."""
        if not self.documents:
            return None
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, filename="") as packed:
            with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for item in self.documents:
                    content = self.contents[item.deployment_id.lower()]
                    entry = tarfile.TarInfo(f"{item.deployment_id}.yaml")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()

    def make_manifest(self):
        deployments = []
        for item in self.documents:
            content = self.contents[item.deployment_id.lower()]
            deployments.append({"deploymentId": item.deployment_id, "digest": sha256(content), "sizeBytes": len(content),
                                "url": f"{self.root}/deployments/{item.deployment_id}/{sha256(content)}"})
        bundle = self.bundle and {"mediaType": BUNDLE_TYPE, "digest": sha256(self.bundle), "sizeBytes": len(self.bundle),
                                  "url": f"{self.root}/bundles/{sha256(self.bundle)}"}
        return {"manifestVersion": self.version, "bundle": bundle, "deployments": deployments}


class DesiredState:
    """What one client should run: the last generations, the newest last, kept in a file over restarts."""

    def __init__(self, client, folder, path, options, root, log):
        """root: what the manifest's URLs begin with."""
        self.client, self.folder, self.path, self.root, self.log = client, folder, path, root, log
        self.lenient, self.dialect = options.lenient, options.dialect
        self.seen, self.faults = None, []
        kept = read_json(path, {"generations": []})["generations"]
        self.generations = [Generation(item["manifestVersion"], [Document(*entry) for entry in item["documents"]], root) for item in kept]
        self.etag = kept[-1]["etag"] if kept else None

    def current(self):
        """The newest generation, after a look at the folder."""
        own = os.path.join(self.folder, self.client)
        folder = own if os.path.isdir(own) else self.folder
        look = look_at(folder)
        if look != self.seen:
            self.update(folder)
            self.seen = look
        return self.generations[-1]

    def update(self, folder):
        documents, faults = read_deployments(folder, self.lenient, self.dialect)
        for fault in faults:
            if fault not in self.faults:
                outcome = "the set served before stays until this is mended" if self.generations else "left out"
                print(f"{now_text()} {printable(fault)}; {outcome}", file=sys.stderr, flush=True)
        self.faults = faults
        if faults and self.generations:
            return
        if self.generations:
            same = Generation(self.generations[-1].version, documents, self.root)
            if sha256(same.manifest) == self.etag:
                return
        newest = Generation(self.generations[-1].version + 1 if self.generations else 1, documents, self.root)
        generations = self.generations[1 - GENERATIONS:] + [newest]
        write_json(self.path, {"generations": [
            {"manifestVersion": item.version, "etag": sha256(item.manifest), "documents": item.documents} for item in generations]})
        self.generations, self.etag = generations, sha256(newest.manifest)
        self.log(self.client, f"manifest {newest.version}: {len(documents)} deployments")

    def find_document(self, deployment_id, digest):
        """The bytes of a deployment that is or was lately in the set, or None."""
        for generation in reversed(self.generations):
            content = generation.contents.get(deployment_id.lower())
            if content is not None and sha256(content) == digest:
                return content
        return None

    def find_bundle(self, digest):
        return next((item.bundle for item in reversed(self.generations) if item.bundle and sha256(item.bundle) == digest), None)

    def find_revisions(self, deployment_id, version):
        """What is known of a deployment: its parsed revisions, that of the given manifest version first; unusable ones left out."""
        revisions = []
        for generation in sorted(reversed(self.generations), key=lambda item: item.version != version):
            content = generation.contents.get(deployment_id.lower())
            try:
                if content is not None:
                    revisions.append(parse_deployment(content.decode("utf-8"), self.dialect))
            except (ValueError, YAMLError):
                continue            # with --lenient: served on purpose, so there is nothing to hold a status against
        return revisions


def look_at(folder):
    """Something that differs once the folder's files do; a file changed within this second may change again unseen, hence the clock."""
    look, newest = [folder], 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                stat = entry.stat()
            except FileNotFoundError:
                continue            # renamed or removed meanwhile: the next look tells
            look.append((entry.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
            newest = max(newest, stat.st_ctime)
    now = time.time()
    return sorted(map(str, look)) + ([str(now)] if now - newest < 1 else [])


# ------------------------------------------------------------------------------------------------------------------------------
# 5. What is kept on the disk
# ------------------------------------------------------------------------------------------------------------------------------

def read_json(path, default):
    try:
        with open(path, "rb") as file:
            return json.loads(file.read().decode())
    except FileNotFoundError:
        return default


def write_json(path, value):
    """Writes a file whole or not at all."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
    os.replace(path + ".new", path)


def append_json(path, value):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


class Faults:
    """The spoiled answers that faults.json asks for; how often each was used is counted until the file changes."""

    MEMBERS = {"method": "string", "path": "string", "client": "string", "times": "number", "delay": "number", "status": "integer",
               "headers": "object", "body": "string", "late": "boolean", "close": "boolean", "corrupt": "boolean", "truncate": "integer"}

    def __init__(self, path):
        self.path, self.raw, self.entries, self.used = path, b"", [], []
        self.lock = threading.Lock()

    def find(self, request):
        """The entry that fits a request, counted as used, or {}."""
        with self.lock:
            self.load()
            for index, entry in enumerate(self.entries):
                if (entry.get("method", request.method) == request.method and entry.get("client", request.client) == request.client
                        and fnmatch.fnmatchcase(request.path, entry.get("path", "*"))
                        and self.used[index] < entry.get("times", float("inf"))):
                    self.used[index] += 1
                    return entry
        return {}

    def load(self):
        try:
            with open(self.path, "rb") as file:
                raw = file.read()
        except FileNotFoundError:
            raw = b"[]"
        if raw != self.raw:
            try:
                entries = self.check(json.loads(raw.decode()))
            except ValueError as error:
                print(f"{now_text()} {self.path}: {error}; ignored", file=sys.stderr, flush=True)
                entries = []
            self.raw, self.entries, self.used = raw, entries, [0] * len(entries)

    def check(self, entries):
        """The list of entries; raises ValueError with all that is wrong in it."""
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("it is no list of objects")
        found = Inspection()
        for index, entry in enumerate(entries):
            for key in entry:
                if key == "problem" and not isinstance(entry[key], dict):
                    found.member(entry, f"[{index}]", key, "string", words=PROBLEMS)
                elif key in self.MEMBERS:
                    found.member(entry, f"[{index}]", key, self.MEMBERS[key])
                elif key != "problem":
                    found.add(f"[{index}].{key}", "is not known")
            headers = entry.get("headers")
            for name in headers if isinstance(headers, dict) else ():
                found.member(headers, f"[{index}].headers", name, "string")
        if found.errors:
            raise ValueError("; ".join(f"{error['field']} {error['message']}" for error in found.errors))
        return entries

    @staticmethod
    def make_reply(entry):
        """The answer that an entry has ready, or None if it only changes the true one."""
        problem = entry.get("problem")
        if isinstance(problem, str):
            return Problem(problem).reply()
        if isinstance(problem, dict):
            status = entry.get("status", problem.get("status"))
            return Reply(status if is_kind(status, "integer") else 500, {"Content-Type": "application/problem+json"}, make_json(problem))
        if "status" in entry:
            return Reply(entry["status"], {}, b"") if "body" in entry else Problem(entry["status"]).reply()
        return None

    @staticmethod
    def spoil(entry, reply):
        """A reply with what an entry changes in it."""
        body = entry["body"].encode() if "body" in entry else reply.body
        if entry.get("corrupt") and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1:]
        return Reply(reply.status, dict(reply.headers, **entry.get("headers", {})), body)


# ------------------------------------------------------------------------------------------------------------------------------
# 6. The management interface
# ------------------------------------------------------------------------------------------------------------------------------

class Wfm:
    """The Management Interface for the clients of one WFM; `answer` takes a Request and returns a Reply or raises a Problem."""

    ROUTES = (
        (r"/api/v1/capabilities/(.+)", {"PUT": "put_capabilities", "DELETE": "delete_capabilities"}),      # see --child-path
        (r"/api/v1/deployments", {"GET": "get_manifest"}),
        (r"/api/v1/deployments/([^/]+)/status", {"POST": "post_status"}),
        (r"/api/v1/deployments/([^/]+)/([^/]+)", {"GET": "get_deployment"}),
        (r"/api/v1/bundles/([^/]+)", {"GET": "get_bundle"}),
    )

    def __init__(self, spiffe_id, options, log):
        self.spiffe_id, self.prefix, self.options, self.log = spiffe_id, options.prefix.rstrip("/"), options, log
        self.deployments, self.state, self.dialect = options.deployments, options.state, options.dialect
        self.desired, self.lock = {}, threading.RLock()
        self.contacts = {}                          # client id: Contact, since the start

    def note_contact(self, client, what, refusal):
        """Remembers when a client was last heard, and what was refused it until the same is taken."""
        with self.lock:
            refusals = dict(self.contacts[client].refusals if client in self.contacts else ())
            refusals.pop(what, None)
            if refusal:
                refusals[what] = refusal
            self.contacts[client] = Contact(time.time(), dict(list(refusals.items())[-MAX_REFUSALS:]))

    def find_client(self, certificate, _):
        """The client id that a verified peer certificate (as from SSLSocket.getpeercert) carries, or None."""
        uris = [value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind == "URI"]
        match = re.fullmatch(rf"{re.escape(self.spiffe_id)}/client/({NAME})", uris[0]) if len(uris) == 1 else None
        return match.group(1) if match and match.group(1) not in (".", "..") else None

    def answer(self, request):
        if request.client is None:
            raise Problem("not-authorized", f"only clients of {self.spiffe_id} are served here")
        if not request.path.startswith(self.prefix + "/"):
            raise Problem(404, f"the interface is below {self.prefix}/")
        with self.lock:
            path = request.path[len(self.prefix):]
            child = re.fullmatch(r"/api/v1/capabilities/(.+(/|%2[Ff]).+)", path)
            if child and self.options.child_path not in ("both", "segments" if child.group(2) == "/" else "segment"):
                raise Problem(404, "there is nothing at this path")
            return dispatch(self, self.ROUTES, request, path)

    def kept(self, client, name):
        return os.path.join(self.state, "clients", client, name)

    def root(self, client):
        """What the paths of a client's manifest begin with."""
        return "/api/v1"

    def desired_state(self, client):
        if client not in self.desired:
            path = self.kept(client, "desired.json")
            self.desired[client] = DesiredState(client, self.deployments, path, self.options, self.root(client), self.log)
        return self.desired[client]

    def get_manifest(self, request):
        return serve_content(request, self.desired_state(request.client).current().manifest, MANIFEST_TYPE, "private")

    def get_deployment(self, request, deployment_id, digest):
        content = self.desired_state(request.client).find_document(deployment_id, digest)
        if content is None:
            raise Problem("deployment-not-found", "this revision of the deployment is not, or no longer, available")
        return serve_content(request, content, "application/yaml", IMMUTABLE)

    def get_bundle(self, request, digest):
        content = self.desired_state(request.client).find_bundle(digest)
        if content is None:
            raise Problem("invalid-bundle", "this bundle is not, or no longer, available")
        return serve_content(request, content, BUNDLE_TYPE, IMMUTABLE)

    def put_capabilities(self, request, device_id):
        devices = read_json(self.kept(request.client, "capabilities.json"), {})
        return Reply(200 if self.take_capabilities(request, device_id, read_document(request), devices) else 201, {}, b"")

    def take_capabilities(self, request, device_id, document, devices):
        """Keeps the capabilities of a device beside those at hand; whether there were some before."""
        if not re.fullmatch(DEVICE_ID, device_id):
            raise Problem("invalid-request", f"the path does not end in {IN_WORDS[DEVICE_ID]}")
        parent = device_id.rpartition("/")[0]
        if parent and parent not in devices:
            raise Problem("gateway-not-found", f"report the capabilities of {parent} first")
        check_capabilities(document, device_id, self.dialect)
        known = device_id in devices
        write_json(self.kept(request.client, "capabilities.json"), dict(devices, **{device_id: document}))
        self.log(request.client, f"capabilities of {device_id} {'updated' if known else 'created'}")
        return known

    def delete_capabilities(self, request, device_id):
        path = self.kept(request.client, "capabilities.json")
        devices = read_json(path, {})
        if device_id not in devices:
            raise Problem("device-not-found", f"no capabilities of {printable(device_id)} were reported")
        write_json(path, {key: value for key, value in devices.items() if key != device_id and not key.startswith(device_id + "/")})
        self.log(request.client, f"capabilities of {device_id} removed, with those of its children")
        return Reply(204, {}, b"")

    def post_status(self, request, deployment_id):
        if not re.fullmatch(UUID, deployment_id):
            raise Problem("invalid-request", "the deployment id in the path is not a UUID")
        body = read_document(request)
        version = body.get("adoptedManifestVersion")
        check_status(body, deployment_id, self.desired_state(request.client).find_revisions(deployment_id, version), self.dialect)
        path, key = self.kept(request.client, "statuses.json"), deployment_id.lower()
        statuses = read_json(path, {})
        status = 200 if key in statuses else 201
        statuses[key] = body
        write_json(path, statuses)
        append_json(os.path.join(self.state, "statuses.jsonl"),
                    {"time": now_text(), "client": request.client, "deploymentId": deployment_id, "body": body})
        states = [f"{item['name']} {item['state']}" + (f" ({item['error']['code']}: {item['error']['message']})" if "error" in item else "")
                  for item in body["components"]]
        at = "" if self.dialect else f" at manifest {version}"
        self.log(request.client, f"status of {deployment_id}{at}: {body['status']['state']}; {', '.join(states)}")
        return Reply(status, {}, b"")


def read_document(request):
    """The JSON object that a request carries."""
    kind, _, parameters = (request.headers.get("Content-Type") or "").partition(";")
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]+)", parameters, re.IGNORECASE)
    if kind.strip().lower() != "application/json" or charset and charset.group(1).lower() != "utf-8":
        raise Problem("invalid-request", "Content-Type must be application/json, in UTF-8")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Problem("invalid-request", "no Content-Encoding is understood here")
    return parse_json(request.body)


# ------------------------------------------------------------------------------------------------------------------------------
# 7. Signed requests
# ------------------------------------------------------------------------------------------------------------------------------

EC_OID, ED25519_OID = bytes.fromhex("06072a8648ce3d0201"), bytes.fromhex("06032b6570")
RSA_OID, PSS_OID = bytes.fromhex("06092a864886f70d010101"), bytes.fromhex("06092a864886f70d01010a")
CURVES = {bytes.fromhex("06082a8648ce3d030107"): "ecdsa-p256-sha256", bytes.fromhex("06052b81040022"): "ecdsa-p384-sha384"}
PSS = ["-sigopt", "rsa_padding_mode:pss", "-sigopt"]
ALGORITHMS = {                  # RFC 9421's name: arguments of `openssl dgst`, bytes of r and of s (0: not ECDSA)
    "ecdsa-p256-sha256": (["-sha256"], 32),
    "ecdsa-p384-sha384": (["-sha384"], 48),
    "rsa-v1_5-sha256": (["-sha256"], 0),
    "rsa-pss-sha256": (["-sha256"] + PSS + ["rsa_pss_saltlen:32"], 0),
    "rsa-pss-sha512": (["-sha512"] + PSS + ["rsa_pss_saltlen:64"], 0),
    "ed25519": (None, 0),
}
Key = collections.namedtuple("Key", "pem id algorithms")                    # algorithms: that may be used with it, the default first
SignatureInput = collections.namedtuple("SignatureInput", "label components parameters text")


class Unsigned(Problem):
    """A request whose signature does not count: 400 where the digest is at fault, else 401."""

    def __init__(self, detail, status=401):
        super().__init__(status, detail)


def run_openssl(arguments, data=b""):
    """The output of an openssl command, or None if it says no."""
    done = subprocess.run(["openssl"] + arguments, input=data, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT)
    return None if done.returncode else done.stdout


def load_key(certificate):
    """The public Key in a PEM certificate; raises ValueError."""
    pem = run_openssl(["x509", "-pubkey", "-noout"], certificate.encode())
    der = pem and run_openssl(["pkey", "-pubin", "-outform", "DER"], pem)
    if not der:
        raise ValueError("not a readable X.509 certificate")
    head = der[:40]
    if EC_OID in head:
        algorithms = [name for oid, name in CURVES.items() if oid in head]
    else:
        pss = ["rsa-pss-sha512", "rsa-pss-sha256"]
        algorithms = (["ed25519"] if ED25519_OID in head else pss + ["rsa-v1_5-sha256"] if RSA_OID in head else pss if PSS_OID in head else [])
    if not algorithms:
        raise ValueError("its key is of no kind that may sign here")
    return Key(pem, hashlib.sha256(der).hexdigest(), algorithms)


def decode_certificate(text):
    """A certificate in base64 of DER or of PEM, or plain PEM, as PEM; raises ValueError."""
    data = text.encode("ascii")
    if not data.lstrip().startswith(b"-----BEGIN"):
        data = base64.b64decode(data, validate=True)
    if data.lstrip().startswith(b"-----BEGIN"):
        return data.decode("ascii")
    return ssl.DER_cert_to_PEM_cert(data)


def parse_signature_input(header):
    """`Signature-Input` with exactly one signature; raises Unsigned.  Of RFC 8941 only what such a header needs is taken."""
    item, value = r'"[a-z0-9@-]+"', r'(?:[0-9]+|"[^"\\]*")'
    match = re.fullmatch(rf'\s*([a-z*][a-z0-9_.*-]*)=(\(((?:{item}(?: {item})*)?)\)((?:;[a-z][a-z0-9_]*={value})*))\s*', header)
    if not match:
        raise Unsigned("Signature-Input is not one signature of quoted lower-case components with created and keyid")
    parameters = dict(part.split("=", 1) for part in re.findall(rf";([a-z0-9_]+={value})", match.group(4)))
    components = [text.strip('"') for text in match.group(3).split()]
    if len(set(components)) < len(components) or len(parameters) < match.group(4).count(";"):
        raise Unsigned("Signature-Input names something twice")
    return SignatureInput(match.group(1), components, parameters, match.group(2))


def check_signature_input(found, body, now):
    """What has to be covered and said, whatever the signature is; raises Unsigned."""
    wanted = {"@method", "@target-uri"} | ({"content-digest"} if body else set())
    if not wanted <= set(found.components):
        raise Unsigned("the signature does not cover " + " and ".join(sorted(wanted - set(found.components))))
    if len(found.parameters.get("keyid", '""')) < 3:
        raise Unsigned("the signature has no keyid")
    if not re.fullmatch("[0-9]{1,15}", found.parameters.get("created", "")):
        raise Unsigned("the signature does not say when it was created")
    age = now - int(found.parameters["created"])
    if not -SIGNATURE_SKEW <= age <= SIGNATURE_AGE:
        raise Unsigned(f"the signature was created {abs(int(age))} s {'ago' if age > 0 else 'in the future'}")


def check_content_digest(header, body):
    """RFC 9530, with sha-256; raises Unsigned."""
    if header is None:
        if body:
            raise Unsigned("Content-Digest is missing", 400)
        return
    match = re.search(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]*):\s*(?:,|$)", header)
    if not match or base64.b64encode(hashlib.sha256(body).digest()).decode() != match.group(1):
        raise Unsigned("Content-Digest is not the sha-256 digest of the content", 400)


def make_signature_base(request, found, authority):
    """The bytes that were signed (RFC 9421, 2.5)."""
    path = request.target.partition("?")[0]
    derived = {"@method": request.method, "@target-uri": f"https://{authority}{request.target}", "@authority": authority, "@scheme": "https",
               "@path": path, "@request-target": request.target}
    lines = []
    for name in found.components:
        values = [derived[name]] if name in derived else request.headers.get_all(name)
        if not values or name.startswith("@") and name not in derived:
            raise Unsigned(f"the signature covers {name}, which is not there")
        lines.append(f'"{name}": {", ".join(" ".join(value.split()) for value in values)}')
    return "\n".join(lines + [f'"@signature-params": {found.text}']).encode("latin-1")


def encode_ecdsa(raw, size):
    """r and s side by side, as RFC 9421 has them, in DER, as openssl takes them; raises Unsigned."""
    if len(raw) != 2 * size:
        raise Unsigned(f"an ECDSA signature has {2 * size} bytes here: r and s")
    numbers = b""
    for half in (raw[:size], raw[size:]):
        value = half.lstrip(b"\0") or b"\0"
        value = b"\0" + value if value[0] & 0x80 else value
        numbers += bytes([2, len(value)]) + value
    return (b"\x30" if len(numbers) < 128 else b"\x30\x81") + bytes([len(numbers)]) + numbers


def is_signed(base, signature, key, algorithm):
    """Whether the key made the signature."""
    options, size = ALGORITHMS[algorithm]
    with tempfile.TemporaryDirectory(prefix="wfm-") as folder:
        files = {"key": key.pem, "signature": encode_ecdsa(signature, size) if size else signature, "base": base}
        for name, content in files.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)
        key_file, signature_file, base_file = (os.path.join(folder, name) for name in files)
        if options is None:
            arguments = ["pkeyutl", "-verify", "-pubin", "-inkey", key_file, "-rawin", "-in", base_file, "-sigfile", signature_file]
        else:
            arguments = ["dgst"] + options + ["-verify", key_file, "-signature", signature_file, base_file]
        return run_openssl(arguments) is not None


class SignedWfm(Wfm):
    """The interface of the first preview release, in either dialect: onboarding, client ids, a signature on every request."""

    CLIENT = r"/api/v1/clients/([^/]+)"
    SPELLING = ("certificate", "clientId")          # of the members that onboarding has
    ROUTES = (
        (r"/api/v1/onboarding", {"POST": "onboard"}),
        (r"/api/v1/clients/[^/]+/deployments", {"GET": "get_manifest"}),
        (r"/api/v1/clients/[^/]+/deployments/([^/]+)/status", {"POST": "post_status"}),
        (r"/api/v1/clients/[^/]+/deployments/([^/]+)/([^/]+)", {"GET": "get_deployment"}),
        (r"/api/v1/clients/[^/]+/bundles/([^/]+)", {"GET": "get_bundle"}),
    )
    PUT = {"POST": "put_capabilities", "PUT": "put_capabilities"}
    CAPABILITIES = {
        "a": ((r"/api/v1/clients/[^/]+/capabilities", PUT),),
        "b": ((r"/api/v1/clients/[^/]+/capabilities/(.+)", dict(PUT, DELETE="delete_capabilities")),),
    }

    def __init__(self, options, log):
        super().__init__("", options, log)
        self.onboarded = read_json(os.path.join(self.state, "onboarded.json"), {})
        self.routes = self.ROUTES + self.CAPABILITIES[self.dialect]
        self.keys, self.seen = {}, {}               # client id: Key; what marks a signature: when it ceases to count
        self.host, _, port = options.listen.rpartition(":")

    def root(self, client):
        return f"/api/v1/clients/{client}"

    def find_client(self, _, path):
        """The client id in a path, if it is one of ours; that it is the client who asks, its signature has to prove."""
        match = re.match(re.escape(self.prefix) + self.CLIENT + "/", path)
        client = urllib.parse.unquote(match.group(1)) if match else None
        return client if client in self.onboarded else None

    def answer(self, request):
        try:
            if not request.path.startswith(self.prefix + "/"):
                raise Problem(404, f"the interface is below {self.prefix}/")
            path = request.path[len(self.prefix):]
            if path == "/api/v1/onboarding/certificate" and request.method in ("GET", "HEAD"):
                return self.get_certificate(request)
            if path != "/api/v1/onboarding":
                if request.client is None:
                    raise Problem(404 if self.dialect == "b" else 403, "this client was not onboarded here")
                self.check_signature(request, self.find_key(request.client))
            with self.lock:
                return dispatch(self, self.routes, request, path)
        except Problem as problem:
            errors = "; ".join(f"{error['field']} {error['message']}" for error in problem.document.get("errors", ()))
            body = {"error": problem.document["title"], "message": "; ".join(filter(None, [problem.document.get("detail"), errors]))}
            return Reply(problem.status, dict({"Content-Type": "application/json"}, **problem.headers), make_json(body))

    def find_key(self, client):
        if client not in self.keys:
            self.keys[client] = load_key(self.onboarded[client])
        return self.keys[client]

    def check_signature(self, request, key):
        """Raises Unsigned unless the key signed this very request, lately, and for the first time."""
        now = time.time()
        check_content_digest(request.headers.get("Content-Digest"), request.body)
        found = parse_signature_input(", ".join(request.headers.get_all("Signature-Input") or ()))
        check_signature_input(found, request.body, now)
        match = re.fullmatch(r"\s*([a-z*][a-z0-9_.*-]*)=:([A-Za-z0-9+/=]*):\s*", ", ".join(request.headers.get_all("Signature") or ()))
        if not match or match.group(1) != found.label:
            raise Unsigned(f"Signature does not hold exactly the signature {found.label}")
        algorithm = found.parameters.get("alg", f'"{key.algorithms[0]}"').strip('"')
        if algorithm not in key.algorithms:
            raise Unsigned(f"alg {algorithm} does not go with this client's key")
        try:
            signature = base64.b64decode(match.group(2), validate=True)
        except ValueError:
            raise Unsigned("Signature is not base64") from None
        base = make_signature_base(request, found, self.find_authority(request))
        if not is_signed(base, signature, key, algorithm):
            raise Unsigned(f"the signature does not verify; signed should have been {base.decode('latin-1')!r}")
        with self.lock:
            self.seen = {old: end for old, end in self.seen.items() if end > now}
            mark = signature[:ALGORITHMS[algorithm][1] or None]         # of ECDSA r alone: whoever sees r and s can make another s that fits
            if mark in self.seen:
                raise Unsigned("this signature was used before")
            self.seen[mark] = now + SIGNATURE_AGE + SIGNATURE_SKEW

    def find_authority(self, request):
        """Host and port as the client has to have signed them: those of this server, so that a signature for another does not count here."""
        authority = re.sub(":443$", "", request.headers.get("Host", "").lower())
        if self.host not in ("", "0.0.0.0", "[::]") and re.sub(r":[0-9]+$", "", authority) not in (self.host, "localhost"):
            raise Unsigned(f"this server is not {authority}")
        return authority

    def get_certificate(self, request):
        if not self.options.root_ca:
            raise Problem(404, "no root CA is given out here")
        with open(self.options.root_ca, "rb") as file:
            body = make_json({"certificate": base64.b64encode(file.read()).decode()})
        return serve_content(request, body, "application/json", "no-cache")

    def onboard(self, request):
        """Gives a client its id: the same one each time, as it follows from the key."""
        body, found = read_document(request), Inspection()
        check_heading(found, body, "onboarding.margo.org/v1alpha1", "OnboardingRequest")
        text = found.member(body, "", self.SPELLING[0], "string")
        found.close("The onboarding request was understood but not accepted.")
        try:
            certificate = decode_certificate(text)
            key = load_key(certificate)
        except ValueError as error:
            raise Problem(400, f"Invalid certificate: {error}") from None
        self.check_signature(request, key)
        with tempfile.NamedTemporaryFile(mode="w") as anchors:
            anchors.write(load_anchors(self.options.trust_bundle))
            anchors.flush()
            if run_openssl(["verify", "-partial_chain", "-CAfile", anchors.name], certificate.encode()) is None:
                raise Problem(403, "Client rejected: its certificate leads to no anchor of the trust bundle, or is not valid now")
        client = f"c-{key.id[:16]}"
        self.onboarded[client] = certificate
        self.keys.pop(client, None)
        write_json(os.path.join(self.state, "onboarded.json"), self.onboarded)
        self.log(client, "onboarded")
        return Reply(201, {"Content-Type": "application/json"}, make_json({self.SPELLING[1]: client}))

    def put_capabilities(self, request, device_id=None):
        """POST the first time, PUT afterwards; dialect a has one document for the whole client."""
        document, devices = read_document(request), read_json(self.kept(request.client, "capabilities.json"), {})
        if request.method == "PUT" and (device_id not in devices if device_id else not devices):
            raise Problem(404, "nothing was reported yet: POST it")
        if device_id is None:
            check_capabilities(document, None, "a")
            write_json(self.kept(request.client, "capabilities.json"), {document["properties"]["id"]: document})
            self.log(request.client, f"capabilities {'updated' if devices else 'created'}")
        else:
            self.take_capabilities(request, device_id, document, devices)
        return Reply(201, {}, b"")


# ------------------------------------------------------------------------------------------------------------------------------
# 8. Discovery document and trust bundle
# ------------------------------------------------------------------------------------------------------------------------------

class Mis:
    """The two read-only endpoints from which clients learn the trust bundle, which must be a SPIFFE bundle in JSON."""

    BUNDLE_PATH = "/.well-known/spiffe/bundle.json"
    ROUTES = ((r"/\.well-known/margo", {"GET": "get_discovery"}), (r"/\.well-known/spiffe/bundle\.json", {"GET": "get_bundle"}))

    def __init__(self, trust_domain, bundle_file):
        self.trust_domain, self.bundle_file = trust_domain, bundle_file

    def answer(self, request):
        return dispatch(self, self.ROUTES, request, request.path)

    def get_discovery(self, request):
        host = request.headers.get("Host")
        if not host:
            raise Problem("invalid-request", "a Host header is needed")
        document = {"trustDomain": self.trust_domain, "trustBundleUri": f"https://{host}{self.BUNDLE_PATH}"}
        return serve_content(request, make_json(document), "application/json", "no-cache")

    def get_bundle(self, request):
        try:
            with open(self.bundle_file, "rb") as file:
                return serve_content(request, file.read(), "application/json", "no-cache")
        except FileNotFoundError:
            raise Problem("spiffe-bundle-not-found", "there is no trust bundle at present",
                          retryable=True, retryAfterSeconds=30, backoffStrategy="exponential") from None


# ------------------------------------------------------------------------------------------------------------------------------
# 9. Registry
# ------------------------------------------------------------------------------------------------------------------------------

class OciError(Problem):
    """An error of the OCI distribution API, which has a body of its own."""

    def __init__(self, status, code, message, headers=None):
        super().__init__(status, message, headers)
        self.body = make_json({"errors": [{"code": code, "message": message}]})

    def reply(self):
        return Reply(self.status, dict({"Content-Type": "application/json"}, **self.headers), self.body)


class Registry:
    """A read-only OCI registry of Compose Archives that are made out of plain folders."""

    REPOSITORY = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*"
    TAG = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
    ROUTES = (
        (r"/v2/", {"GET": "get_root"}),
        (r"/v2/(.+)/manifests/([^/]+)", {"GET": "get_manifest"}),
        (r"/v2/(.+)/blobs/([^/]+)", {"GET": "get_blob"}),
        (r"/v2/(.+)/tags/list", {"GET": "get_tags"}),
        (r"/token", {"GET": "get_token"}),
        (r"/files/(.+)/([^/]+)\.tar\.gz", {"GET": "get_file"}),
    )

    def __init__(self, packages, credentials, anonymous):
        """credentials: (user, file of the secret) or None for a registry that is open to all."""
        self.packages, self.credentials, self.anonymous = packages, credentials, anonymous
        self.tokens, self.content, self.lock = {}, {}, threading.Lock()      # token: (repository, end); (name, digest): bytes

    def answer(self, request):
        with self.lock:
            return dispatch(self, self.ROUTES, request, request.path)

    # Access

    def check_access(self, request, name=""):
        """Raises 401 with a challenge unless the request carries a token for the repository."""
        if not self.credentials:
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        repository, end = self.tokens.get(token.strip(), ("", 0)) if scheme.lower() == "bearer" else ("", 0)
        if end > time.monotonic() and name in ("", repository):
            return
        challenge = f'Bearer realm="https://{request.headers.get("Host", "")}/token",service="wfm.py"'
        if name:
            challenge += f',scope="repository:{name}:pull"'
        raise OciError(401, "UNAUTHORIZED", "a token is needed", {"WWW-Authenticate": challenge})

    def get_token(self, request):
        if not self.credentials:
            raise OciError(404, "UNSUPPORTED", "this registry is open, there are no tokens")
        header = request.headers.get("Authorization")
        if not (self.is_known_user(header) if header else self.anonymous):
            raise OciError(401, "UNAUTHORIZED", "user or password is wrong or missing", {"WWW-Authenticate": 'Basic realm="wfm.py"'})
        scope = re.fullmatch(r"repository:([^:]+):(?:[a-z,]*,)?pull(?:,[a-z,]*)?", (request.query.get("scope") or [""])[0])
        token = secrets.token_urlsafe(24)
        self.tokens = {key: item for key, item in self.tokens.items() if item[1] > time.monotonic()}
        self.tokens[token] = (scope.group(1) if scope else "", time.monotonic() + TOKEN_LIFETIME)
        return Reply(200, {"Content-Type": "application/json", "Cache-Control": "no-store"},
                     make_json({"token": token, "expires_in": TOKEN_LIFETIME}))

    def is_known_user(self, header):
        scheme, _, encoded = header.partition(" ")
        user, secret_file = self.credentials
        with open(secret_file, "rb") as file:
            wanted = user.encode() + b":" + file.read().rstrip(b"\r\n")
        try:
            given = base64.b64decode(encoded.strip(), validate=True)
        except ValueError:
            return False
        return scheme.lower() == "basic" and hmac.compare_digest(given, wanted)

    # Content

    def get_root(self, request):
        self.check_access(request)
        return Reply(200, {"Content-Type": "application/json", "Docker-Distribution-API-Version": "registry/2.0"}, b"{}")

    def get_tags(self, request, name):
        self.check_access(request, name)
        return Reply(200, {"Content-Type": "application/json"}, make_json({"name": name, "tags": self.list_tags(name)}))

    def get_manifest(self, request, name, reference):
        self.check_access(request, name)
        if reference in self.list_tags(name):
            return make_content_reply(self.make_package(name, reference), OCI_MANIFEST_TYPE)
        content = self.find_content(name, reference)
        if content is None or not content.startswith(b'{"schemaVersion"'):
            raise OciError(404, "MANIFEST_UNKNOWN", f"{name} has no manifest {reference}")
        return make_content_reply(content, OCI_MANIFEST_TYPE)

    def get_blob(self, request, name, digest):
        self.check_access(request, name)
        content = self.find_content(name, digest)
        if content is None:
            raise OciError(404, "BLOB_UNKNOWN", f"{name} has no blob {digest}")
        return make_content_reply(content, "application/octet-stream")

    def get_file(self, request, name, tag):
        """A package as a plain file; open to all."""
        if tag not in self.list_tags(name):
            raise OciError(404, "MANIFEST_UNKNOWN", f"{name} has no version {tag}")
        layer = json.loads(self.make_package(name, tag).decode())["layers"][0]["digest"]
        return Reply(200, {"Content-Type": "application/gzip"}, self.content[name, layer])

    def list_tags(self, name):
        """The tags of a repository; raises NAME_UNKNOWN if it has none."""
        folder = os.path.join(self.packages, *name.split("/"))
        tags = set()
        if re.fullmatch(self.REPOSITORY, name) and os.path.isdir(folder):
            for entry in os.listdir(folder):
                if os.path.isfile(os.path.join(folder, entry, "compose.yaml")):
                    tags.add(entry)
                elif entry.endswith(".tar.gz"):
                    tags.add(entry[:-len(".tar.gz")])
        if not tags:
            raise OciError(404, "NAME_UNKNOWN", f"there is no repository {printable(name)}")
        return sorted(tag for tag in tags if re.fullmatch(self.TAG, tag))

    def find_content(self, name, digest):
        """A blob or manifest by digest; all tags are made if it is not known, for instance after a restart."""
        if (name, digest) not in self.content:
            for tag in self.list_tags(name):
                self.make_package(name, tag)
        return self.content.get((name, digest))

    def make_package(self, name, tag):
        """The OCI manifest of a tag; it and its blobs can then be found by digest."""
        folder = os.path.join(self.packages, *name.split("/"), tag)
        if os.path.isdir(folder):
            layer = make_archive(folder, name.rpartition("/")[2])
        else:
            with open(folder + ".tar.gz", "rb") as file:
                layer = file.read()
        annotations = {"org.margo.component.type": "compose", "org.margo.component.version": tag,
                       "org.opencontainers.image.title": name.rpartition("/")[2], "org.opencontainers.image.version": tag}
        manifest = make_json({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST_TYPE, "artifactType": PACKAGE_TYPE,
            "config": {"mediaType": OCI_EMPTY_TYPE, "digest": sha256(b"{}"), "size": 2},
            "layers": [{"mediaType": PACKAGE_LAYER_TYPE, "digest": sha256(layer), "size": len(layer), "annotations": annotations}],
            "annotations": annotations})
        for content in (b"{}", layer, manifest):
            self.content[name, sha256(content)] = content
        return manifest


def make_content_reply(content, media_type):
    return Reply(200, {"Content-Type": media_type, "Docker-Content-Digest": sha256(content), "ETag": f'"{sha256(content)}"'}, content)


def make_archive(folder, top):
    """A Compose Archive: the folder's content below one directory `top`, the same bytes each time."""
    def reset(entry):
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
        return entry

    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, filename="") as packed:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
            archive.add(folder, top, recursive=False, filter=reset)
            for root, folders, files in os.walk(folder):
                folders.sort()
                for name in sorted(folders + files):
                    path = os.path.join(root, name)
                    archive.add(path, os.path.join(top, os.path.relpath(path, folder)), recursive=False, filter=reset)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------------------------
# 10. The fleet page
# ------------------------------------------------------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5"><title>Fleet of {name}</title><style>
body {{ font: 15px/1.4 sans-serif; margin: 1.5em; color: #1a2733; }}
h1 {{ font-size: 1.3em; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .4em .7em; border-bottom: 1px solid #ccd5dc; }}
th {{ background: #eef2f5; }}
td {{ overflow-wrap: break-word; white-space: pre-line; }}
td.error {{ overflow-wrap: anywhere; }}
.installed {{ color: #16723b; }}
.failed, .silent, .refused {{ color: #b3261e; }}
.pending, .installing, .removing, .removed, .none {{ color: #8a5a00; }}
small {{ color: #5b6b78; }}
</style></head><body><h1>Fleet of {name}</h1>
<table><thead><tr><th>Device</th><th>Hardware</th><th>Manifest</th><th>Deployment</th><th>Wanted</th><th>Reported</th>
<th>Error</th><th>Last seen</th></tr></thead><tbody>
{rows}
</tbody></table><p><small>{note}</small></p></body></html>
"""
PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
Line = collections.namedtuple("Line", "deployment wanted state error")      # of one deployment on the page, as text


class Page:
    """What the WFM knows of its fleet, for a browser on the same machine: GET / and nothing else, nothing to change."""

    ROUTES = ((r"/", {"GET": "get_page"}),)

    def __init__(self, wfm):
        self.wfm = wfm

    def answer(self, request):
        host = request.headers.get("Host", "")
        if not is_loopback(re.sub(":[0-9]+$", "", host)):           # another name for this machine may be a stranger's trick
            raise Problem(403, f"this page is not served under the name {printable(host)}")
        with self.wfm.lock:
            return dispatch(self, self.ROUTES, request, request.path)

    def get_page(self, request):
        now = time.time()
        clients = set(self.wfm.contacts)
        with contextlib.suppress(FileNotFoundError):
            clients.update(os.listdir(os.path.join(self.wfm.state, "clients")))
        rows = [row for client in sorted(clients) for row in self.make_rows(client, now)]
        name = make_cell(self.wfm.spiffe_id or "this WFM")
        note = make_cell(f"{len(clients)} clients at {now_text()[:19]}Z; this page looks for news every 5 s")
        return Reply(200, PAGE_HEADERS, PAGE.format(name=name, rows="\n".join(rows), note=note).encode())

    def make_rows(self, client, now):
        """The table's rows of one client."""
        devices = read_json(self.wfm.kept(client, "capabilities.json"), {}) or {client: {}}
        reports = read_json(self.wfm.kept(client, "statuses.json"), {})
        state = self.wfm.desired_state(client)
        served = state.current()
        adopted = max([body.get("adoptedManifestVersion", 0) for body in reports.values()] + [0])
        manifest = "\n".join([str(served.version)] + [f"{adopted} adopted"] * bool(adopted) + state.faults)
        contact = describe_contact(self.wfm.contacts.get(client), now)
        lines = self.make_lines(served, reports, sorted(devices))
        rows = []
        for device in sorted(devices):
            left = [device, describe_hardware(devices[device]), manifest]
            rows += make_device_rows(left, lines[device] or [Line("nothing", "", "", "")], contact)
        return rows

    def make_lines(self, served, reports, devices):
        """{device: [Line]} of what is served or was reported; what is for none of them stands at the first."""
        wanted = {item.deployment_id.lower(): self.read_document(item) for item in served.documents}
        left = [key for key, body in reports.items() if body["status"]["state"] != "removed"]
        lines = {device: [] for device in devices}
        for key in sorted(set(wanted) | set(left)):
            document, report = wanted.get(key), reports.get(key)
            target = (report or {}).get("deviceId") or ((document or {}).get("metadata") or {}).get("deviceId")
            lines[target if target in lines else devices[0]].append(make_line(key, key in wanted, document, report))
        return lines

    def read_document(self, item):
        """The value of a deployment; None if it cannot be read, as is possible with --lenient."""
        try:
            return parse_deployment(item.text, self.wfm.dialect)
        except (ValueError, YAMLError):
            return None


def make_cell(text, is_headed=False):
    """Text from anywhere, fit for the page: escaped, line breaks kept, other control characters shown.

    is_headed: what comes after the first line is less important.
    """
    lines = [html.escape(printable(line)) for line in str(text).strip().split("\n")]
    if is_headed and lines[1:]:
        return f"{lines[0]}\n<small>" + "\n".join(lines[1:]) + "</small>"
    return "\n".join(lines)


def make_device_rows(left, lines, contact):
    """The rows of one device: what is said of the device stands once, beside all its deployments."""
    span = f'rowspan="{len(lines)}"'
    before = "".join(f"<td {span}>{make_cell(text, True)}</td>" for text in left)
    after = f'<td {span} class="{contact[0]}">{make_cell(contact[1])}</td>'
    rows = []
    for line in lines:
        kind = line.state if line.state in STATES else "none"
        rows.append(f"<tr>{before}<td>{make_cell(line.deployment, True)}</td><td>{make_cell(line.wanted, True)}</td>"
                    f'<td class="{kind}">{make_cell(line.state)}</td><td class="error">{make_cell(line.error)}</td>{after}</tr>')
        before = after = ""
    return rows


def make_line(key, is_wanted, document, report):
    """The Line of one deployment; document: parsed, None if it is gone or cannot be read; report: its latest, or None."""
    name, wanted = key, "installed" if is_wanted else "removed"
    if document:
        name = f"{document['metadata']['name']}\n{key}"
        for item in document["spec"]["deploymentProfile"]["components"]:
            properties = item["properties"]
            wanted += f"\n{item['name']} {properties.get('revision') or properties.get('packageLocation', '')}"
    if not report:
        return Line(name, wanted, "nothing yet", "")
    holders = [item for item in report["components"] if "error" in item] or [report["status"]]
    errors = [(holder.get("name"), holder["error"]) for holder in holders if "error" in holder]
    words = [f"{source + ': ' if source else ''}{error['code']}: {error['message']}" for source, error in errors]
    return Line(name, wanted, report["status"]["state"], "\n".join(words))


def describe_hardware(document):
    """A device's capabilities in a few words."""
    properties = document.get("properties", {})
    resources = properties.get("resources", properties)             # dialect a has them one level down
    cpus = resources.get("cpus") or resources.get("cpu") or []
    cpus = cpus if isinstance(cpus, list) else [cpus]
    words = [f"{cpu['cores']} {cpu.get('architecture', 'cores')}" for cpu in cpus]
    words += [f"{key} {resources[key]}" for key in ("memory", "storage") if key in resources]
    lines = [" ".join(properties.get(key, "") for key in ("vendor", "modelNumber", "serialNumber")), ", ".join(words)]
    return "\n".join(filter(None, map(str.strip, lines))) or "not reported"


def describe_contact(contact, now):
    """(class of the cell, words): when a client was last heard, and what was refused it."""
    if contact is None:
        return "silent", "not since this server started"
    age = int(now - contact.at)
    words = f"{age} s ago"
    if age >= 120:
        words = f"{age // 60} min ago" if age < 7200 else f"{age // 3600} h ago"
    if contact.refusals:
        return "refused", "\n".join([words, "refused:"] + list(contact.refusals.values()))
    return ("silent" if age > SILENT else "heard"), words


def is_loopback(host):
    """Whether a host name or address is this machine's own loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------------------------------------
# 11. TLS
# ------------------------------------------------------------------------------------------------------------------------------

def make_wfm_context(certificate, key, trust_bundle, version):
    """Mutual TLS of one version only: client certificates must lead to an anchor of the trust bundle and to nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2 if version == "1.2" else ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= PARTIAL_CHAIN           # an anchor need not be self-signed
    context.load_verify_locations(cadata=load_anchors(trust_bundle))
    return context


def make_site_context(certificate, key, version=None):
    """Ordinary server-side TLS, as for the registry; with a version: that one only."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if version:
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2 if version == "1.2" else ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate, key)
    return context


def load_anchors(path):
    """The X.509 anchors of a SPIFFE bundle or of a PEM file, as PEM (Python 3.7 with OpenSSL 3 takes no DER); raises ValueError."""
    with open(path, "rb") as file:
        text = file.read().decode("utf-8")
    if "-----BEGIN CERTIFICATE-----" in text:
        found = re.findall(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", text, re.DOTALL)
        return "\n".join(found)
    try:
        keys = json.loads(text)["keys"]
        anchors = [base64.b64decode(key["x5c"][0], validate=True) for key in keys if key.get("use") == "x509-svid"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no SPIFFE trust bundle: {error!r}") from None
    if not anchors:
        raise ValueError(f"{path} holds no X.509 anchor")
    return "".join(map(ssl.DER_cert_to_PEM_cert, anchors))


def load_spiffe_id(path):
    """The SPIFFE ID in the first certificate of a PEM file.

    The ssl module reads no certificate of one's own; in DER a URI name is the tag 0x86, its length and the text, which nothing else in
    a certificate looks like.
    """
    with open(path, encoding="ascii") as file:
        text = file.read()
    match = re.search(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", text, re.DOTALL)
    der = ssl.PEM_cert_to_DER_cert(match.group(0)) if match else b""
    for found in re.finditer(rb"\x86(?:([\x00-\x7f])|\x81(.))(?=spiffe://)", der, re.DOTALL):
        size = (found.group(1) or found.group(2))[0]
        return der[found.end():found.end() + size].decode("ascii")
    raise ValueError(f"{path} carries no SPIFFE ID")


# ------------------------------------------------------------------------------------------------------------------------------
# 12. HTTP
# ------------------------------------------------------------------------------------------------------------------------------

class Handler(http.server.BaseHTTPRequestHandler):
    """Turns HTTP into a Request for the listener's site and its Reply, spoiled if a fault wants it, back into HTTP."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "wfm.py", ""
    timeout = TIMEOUT
    disable_nagle_algorithm = True
    wbufsize = -1
    is_body_left = False            # whether part of the request was not read

    def handle_exchange(self):
        try:
            split = urllib.parse.urlsplit(self.path)
        except ValueError as error:
            self.send_error(400, f"the request target is no URL: {error}")
            return
        is_wfm = isinstance(self.server.site, Wfm)
        client = self.server.site.find_client(self.connection.getpeercert(), split.path) if is_wfm else None
        request = Request(self.command, split.path, urllib.parse.parse_qs(split.query), self.headers, b"", client, self.path)
        try:
            request = request._replace(body=self.read_body())
            fault = self.server.faults.find(request)
            time.sleep(fault.get("delay", 0))
            reply = self.find_reply(request, fault)
        except Problem as problem:
            fault, reply = {}, problem.reply()
        if is_wfm:
            refusal = f"{self.command} {self.path}: {reply.status} {explain(reply)}" if reply.status >= 400 else ""
            if refusal:
                self.server.log(client or self.client_address[0], refusal)
            if client and reply.status not in (401, 403):               # with these it was not proven who asks
                self.server.site.note_contact(client, f"{self.command} {request.path}", refusal)
        self.server.record(self, client, None if fault.get("close") else reply.status)
        if fault.get("close"):
            self.close_connection = True
        else:
            self.send_reply(reply, fault.get("truncate"))
        if self.is_body_left:
            self.drain()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = do_OPTIONS = handle_exchange

    def find_reply(self, request, fault):
        """The answer to a request, after the fault had its say."""
        ready = Faults.make_reply(fault)
        if not ready and not fault.get("close") or fault.get("late"):
            try:
                reply = self.server.site.answer(request)
            except Problem as problem:
                problem.document.setdefault("instance", request.path)
                reply = problem.reply()
            except Exception:               # whatever it is, the client gets an answer and the person at the console the reason
                traceback.print_exc()
                reply = Problem(500, "a bug of wfm.py, see its stderr").reply()
            return Faults.spoil(fault, ready or reply)
        return Faults.spoil(fault, ready or Reply(0, {}, b""))

    def read_body(self):
        """The request's body, by Content-Length or chunked; raises a Problem and gives the connection up if it is not to be read."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            pieces, size = [], -1
            while size != 0:
                line = self.rfile.readline(100).split(b";")[0].strip()
                if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", line):
                    self.refuse_body(400, "a chunk without a length")
                size = int(line, 16)
                self.check_size(size + sum(map(len, pieces)))
                pieces.append(self.rfile.read(size))
                while self.rfile.readline(1000).strip() and size == 0:      # trailers, after the last chunk
                    pass
            return b"".join(pieces)
        length = self.headers.get("Content-Length", "0")
        if not re.fullmatch("[0-9]{1,15}", length):
            self.refuse_body(400, "Content-Length is no number")
        self.check_size(int(length))
        return self.rfile.read(int(length))

    def check_size(self, size):
        if size > MAX_BODY:
            self.refuse_body(413, f"a body may have {MAX_BODY} bytes")

    def refuse_body(self, status, detail):
        self.close_connection = self.is_body_left = True
        raise Problem(status, detail)

    def drain(self):
        """Reads for a while what comes after the answer: a client that is still sending would not see it if the connection closed."""
        self.connection.settimeout(LINGER)
        with contextlib.suppress(OSError):
            self.wfile.flush()
            for _ in range(1024):           # of at most 16 KiB each
                if not self.rfile.read1(65536):
                    break

    def send_reply(self, reply, cut=None):
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.status not in (204, 304):
            self.send_header("Content-Length", str(len(reply.body)))
        if cut is not None:
            self.close_connection = True
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD" and reply.status not in (204, 304):
            self.wfile.write(reply.body[:cut])

    def send_error(self, code, message=None, explain=None):
        """What http.server itself refuses: a broken request line, an unknown method."""
        self.close_connection = True
        if not getattr(self, "command", None):
            self.command = "-"
        self.send_reply(Problem(int(code), message or "").reply())

    def log_message(self, *_):
        """The events are printed elsewhere."""


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A listener with one thread for each connection; the TLS handshake is the thread's business, so nobody can hold up the others."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, name, address, make_context, site, faults, log, requests_file):
        self.name, self.make_context, self.site, self.faults, self.log = name, make_context, site, faults, log
        self.requests_file = requests_file
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, int(port)), Handler)
        except OSError as error:
            raise OSError(f"{address}: {error}") from None
        self.url = f"http{'s' if make_context else ''}://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"

    def finish_request(self, request, client_address):
        request.settimeout(TIMEOUT)
        if self.make_context is None:               # the page, on loopback
            self.RequestHandlerClass(request, client_address, self)
            return
        with request.dup() as spare:
            try:
                connection = self.make_context().wrap_socket(request, server_side=True)
            except (OSError, ValueError, KeyError) as error:
                self.log(client_address[0], f"{self.name}: no TLS connection: {error}")
                spare.settimeout(LINGER)
                with contextlib.suppress(OSError):  # the alert says why; a close with unread bytes would take it away from the client
                    spare.shutdown(socket.SHUT_WR)
                    for _ in range(64):
                        if not spare.recv(65536):
                            break
                return
        with connection:
            self.RequestHandlerClass(connection, client_address, self)
            with contextlib.suppress(OSError, ValueError):
                connection.settimeout(LINGER)
                connection.unwrap()         # TLS has a goodbye, without which a peer may take the end for an attack

    def record(self, handler, client, status):
        """Notes a request in requests.jsonl, if it is wanted; status None: the connection was closed instead of an answer."""
        if self.requests_file:
            headers = dict(handler.headers.items())
            for name in [name for name in headers if name.lower() == "authorization"]:
                headers[name] = headers[name].partition(" ")[0] if " " in headers[name] else "(not shown)"
            append_json(self.requests_file, {"time": now_text(), "listener": self.name, "client": client, "method": handler.command,
                                             "path": handler.path, "headers": headers, "status": status})

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):          # a peer that went away needs no words
            traceback.print_exc()


# ------------------------------------------------------------------------------------------------------------------------------
# 13. Command line
# ------------------------------------------------------------------------------------------------------------------------------

def make_parser():
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--listen", metavar="HOST:PORT", default="127.0.0.1:8443", help="of the WFM; port 0: any free one (default %(default)s)")
    add("--profile", choices=("mtls", "signed"), default="mtls", help="mutual TLS, or requests signed by RFC 9421 (default %(default)s)")
    add("--dialect", choices=("a", "b"), help="of the profile signed: a (roles and resources, the default) or b (per device, flat)")
    add("--certificate", metavar="FILE", required=True,
        help="the WFM's X.509-SVID (signed: an ordinary server certificate), then intermediates, in PEM")
    add("--key", metavar="FILE", required=True, help="its private key")
    add("--trust-bundle", metavar="FILE", required=True, help="anchors for client certificates: SPIFFE bundle (JSON) or PEM")
    add("--deployments", metavar="DIR", required=True, help="the desired state: ApplicationDeployment files")
    add("--state", metavar="DIR", required=True, help="where versions, capabilities and statuses are kept")
    add("--prefix", metavar="/PATH", default="", help="path before /api/v1, to try a client with a base URL that has one")
    add("--child-path", choices=("both", "segments", "segment"), default="both", help="how a gateway's child has to stand in a path:"
        " gateway/child, gateway%%2Fchild, or either (default)")
    add("--root-ca", metavar="FILE", help="signed: what GET /api/v1/onboarding/certificate gives out")
    add("--id", metavar="SPIFFE-ID", help="the WFM's own SPIFFE ID, to try a client with a certificate that carries a wrong one")
    add("--tls", choices=("1.3", "1.2"), default="1.3", help="1.2: speak that version only, to see whether a client refuses it")
    add("--lenient", action="store_true", help="serve files as they are, to see what a client does with bad ones; the deployment id is the file's"
        " name if that is a UUID, else its top-level id")
    add("--log-requests", action="store_true", help="keep requests.jsonl in the state directory")
    add("--mis", metavar="HOST:PORT", help="also serve /.well-known/margo and the trust bundle here")
    add("--registry", metavar="HOST:PORT", help="also serve the packages here")
    add("--packages", metavar="DIR", help="the registry's content: <name>/<tag>/compose.yaml and so on")
    add("--registry-token", metavar="USER:SECRET_FILE", help="the registry demands tokens, given to this user")
    add("--registry-anonymous", action="store_true", help="with --registry-token: also given to nobody in particular")
    add("--page", metavar="HOST:PORT", help="also show the fleet to a browser here, by http; an address of loopback")
    add("--site-certificate", metavar="FILE", help="server certificate for --mis and --registry")
    add("--site-key", metavar="FILE", help="its private key")
    return parser


def make_log():
    """The function that prints an event: who, what."""
    lock = threading.Lock()

    def log(who, what):
        with lock:
            print(f"{now_text()} {printable(who)} {printable(what)}", flush=True)
    return log


def make_servers(options, log):
    """The listeners that the options ask for, the WFM last; raises OSError or ValueError if something they need is not usable."""
    match = None
    if options.profile == "mtls":
        spiffe_id = options.id or load_spiffe_id(options.certificate)
        match = re.fullmatch(rf"spiffe://([a-z0-9._-]+)/margo/wfm/{NAME}", spiffe_id)
        if not match:
            raise ValueError(f"{spiffe_id} is not a WFM's SPIFFE ID (spiffe://<trust domain>/margo/wfm/<wfm id>); see --id")
    common = (Faults(os.path.join(options.state, "faults.json")), log,
              os.path.join(options.state, "requests.jsonl") if options.log_requests else None)
    servers = []

    def make_site():
        return make_site_context(options.site_certificate, options.site_key)

    def make_wfm():
        if options.profile == "signed":
            load_anchors(options.trust_bundle)
            return make_site_context(options.certificate, options.key, options.tls)
        return make_wfm_context(options.certificate, options.key, options.trust_bundle, options.tls)

    make_wfm()
    if options.mis or options.registry:
        make_site()
    if options.mis:
        servers.append(Server("mis", options.mis, make_site, Mis(match.group(1), options.trust_bundle), *common))
    if options.registry:
        user, _, secret_file = (options.registry_token or "").partition(":")
        site = Registry(options.packages, (user, secret_file) if options.registry_token else None, options.registry_anonymous)
        servers.append(Server("registry", options.registry, make_site, site, *common))
    site = Wfm(spiffe_id, options, log) if options.profile == "mtls" else SignedWfm(options, log)
    if options.page:
        servers.append(Server("page", options.page, None, Page(site), Faults(os.devnull), *common[1:]))
    servers.append(Server("listening", options.listen, make_wfm, site, *common))
    return servers


def describe_client(options, urls):
    """A configuration of margo_agent.py for a client of this WFM, with what lies beside the trust bundle; urls: {listener: url}."""
    folder = os.path.dirname(os.path.abspath(options.trust_bundle))

    def find(name, otherwise):
        path = os.path.join(folder, name)
        return path if os.path.exists(path) else otherwise

    certificate, key = find("client.pem", "/etc/margo/client.pem"), find("client.key", "/etc/margo/client.key")
    ca = find("site-ca.pem", "/etc/margo/site-ca.pem")
    identity = {"certificate": certificate, "key": key}
    wfm = {"url": urls["listening"] + options.prefix.rstrip("/")}
    if options.profile == "signed":
        wfm.update(profile="signed", dialect=options.dialect)
        identity["ca"] = os.path.abspath(options.root_ca) if options.root_ca else ca
    else:
        identity["trust_bundle"] = os.path.abspath(options.trust_bundle)
    device = "line-4-cell-2"
    with contextlib.suppress(OSError, ValueError):
        device = load_spiffe_id(certificate).rpartition("/")[2]
    settings = {"state_dir": "agent-state", "wfm": wfm, "identity": identity, "device": {"id": device}}
    if "registry" in urls:
        settings["registries"] = {urls["registry"].partition("//")[2]: {"ca": ca}}
    return settings


def print_client(options, urls):
    """Shows a ready client configuration, indented, so that it can be copied into a file as it is."""
    settings = describe_client(options, urls)
    print("agent.yaml of a client of this WFM, for instance:")
    for key, value in settings.items():
        print(f"    {key}: {json.dumps(value)}")
    if options.profile == "mtls":
        own = settings["identity"]
        print(f"or by hand: curl -k --cert {own['certificate']} --key {own['key']} {settings['wfm']['url']}/api/v1/deployments")


def main(arguments=None):
    parser = make_parser()
    options = parser.parse_args(arguments)
    if (options.mis or options.registry) and not (options.site_certificate and options.site_key):
        parser.error("--mis and --registry need --site-certificate and --site-key")
    if options.profile == "signed":
        options.dialect = options.dialect or "a"
        if options.mis:
            parser.error("--mis is of the profile mtls")
    elif options.dialect or options.root_ca:
        parser.error("--dialect and --root-ca are of the profile signed")
    if options.page and not is_loopback(options.page.rpartition(":")[0]):
        parser.error(f"--page {options.page}: the page is for this machine alone, as on 127.0.0.1:8080")
    if options.registry and not options.packages:
        parser.error("--registry needs --packages")
    if not os.path.isdir(options.deployments):
        parser.error(f"--deployments {options.deployments}: there is no such folder")
    os.makedirs(options.state, exist_ok=True)
    try:
        servers = make_servers(options, make_log())
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"cannot start: {error}")
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    for server in servers[:-1]:
        print(f"{server.name} {server.url}", flush=True)
    print_client(options, {server.name: server.url for server in servers})
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"{servers[-1].name} {servers[-1].url}", flush=True)
    signal.sigwait(ends)
    with servers[-1].site.lock:             # no file is left half-written
        os._exit(0)


if __name__ == "__main__":
    main()
