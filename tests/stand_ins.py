"""Stand-ins for servers that are public but cannot be had here: examples/wfm.py with what is known to be odd in each.

    python3 tests/stand_ins.py KIND [OPTION_OF_WFM...]

KIND is one of
    suite          the conformance suite for device suppliers, over mutual TLS
    suite-signed   the same over signed requests
    open-2025      the open WFM of the first preview release (December 2025), signed requests
    open-2026      the same server a year later, mutual TLS

The suite's control is the file fixture.json in the state folder, read on each request: {"negativeFixture": NAME} spoils the
manifest in one of the suite's ways, NAME is a key of FIXTURES.
"""
import copy
import json
import os
import sys

sys.path.insert(1, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "examples"))
import wfm  # noqa: E402

NOWHERE = "0" * 64


# The conformance suite

def replace_digest(entry, digest):
    """Another digest for a deployment or the bundle, in its address, too."""
    entry.update(digest=digest, url=entry["url"].replace(entry["digest"], digest))


def spoil_algorithm(manifest):
    """A digest of a kind that the interface does not know."""
    replace_digest(manifest["deployments"][0], "sha512:" + NOWHERE * 2)


def spoil_deployment(manifest):
    """A deployment whose bytes are others than the manifest says."""
    replace_digest(manifest["deployments"][0], "sha256:" + NOWHERE)


def spoil_bundle(manifest):
    """A bundle whose bytes are others than the manifest says."""
    replace_digest(manifest["bundle"], "sha256:" + NOWHERE)


def spoil_version(manifest):
    """A version that was there before, with other content."""
    manifest["manifestVersion"] = 1


def spoil_size(manifest):
    """Sizes that are wrong, which nobody may mind."""
    manifest["bundle"]["sizeBytes"] = manifest["deployments"][0]["sizeBytes"] = 7


FIXTURES = {"digestAlgorithm": spoil_algorithm, "deploymentDigest": spoil_deployment, "bundleDigest": spoil_bundle,
            "version": spoil_version, "sizeBytes": spoil_size}


class Suite:
    """What the conformance suite has of its own; stands before a class of examples/wfm.py."""

    def get_manifest(self, request):
        reply = super().get_manifest(request)
        manifest = json.loads(reply.body.decode() or "{}")
        fixture = wfm.read_json(os.path.join(self.state, "fixture.json"), {}).get("negativeFixture")
        if fixture and manifest:
            FIXTURES[fixture](manifest)
        if manifest and not self.dialect:
            manifest["_client_cert"] = "shown"              # added after the ETag was made
        body = wfm.make_json(manifest) + b"\n" if manifest else b""
        etag = '"%s"' % wfm.sha256(wfm.make_json(dict(manifest, _client_cert="shown"))).rpartition(":")[2]
        if request.headers.get("If-None-Match") == etag:
            return wfm.Reply(304, {"ETag": etag}, b"")
        return wfm.Reply(reply.status, dict(reply.headers, ETag=etag), body)

    def get_deployment(self, request, deployment_id, digest):
        """Whatever digest is asked for: the bytes there are."""
        newest = self.desired_state(request.client).current()
        content = newest.contents.get(deployment_id.lower())
        if content is None:
            raise wfm.Problem("deployment-not-found")
        return wfm.Reply(200, {"Content-Type": "application/yaml"}, content)

    def get_bundle(self, request, digest):
        return wfm.Reply(200, {"Content-Type": wfm.BUNDLE_TYPE}, self.desired_state(request.client).current().bundle)

    def answer(self, request):
        try:
            return super().answer(request)
        except wfm.Problem as problem:
            if problem.status == 403:
                return wfm.Reply(401, {"Content-Type": "application/json"}, wfm.make_json({"error": "unknown client"}) + b"\n")
            raise


class MutualSuite(Suite, wfm.Wfm):
    """A device id is one segment of the path here."""

    ROUTES = ((r"/api/v1/capabilities/([^/]+)", wfm.Wfm.ROUTES[0][1]),) + wfm.Wfm.ROUTES[1:]


class SignedSuite(Suite, wfm.SignedWfm):
    """The suite over signed requests; the device's id has to be the client's."""

    def put_capabilities(self, request, device_id=None):
        check_device_id(request)
        return super().put_capabilities(request, device_id)


def check_device_id(request):
    """Refuses capabilities of another id than the client's."""
    if json.loads(request.body.decode())["properties"]["id"] != request.client:
        raise wfm.Problem("invalid-request", "device ID mismatch")


# The open WFM in both of its ages

class Open2025(wfm.SignedWfm):
    """The first preview release as the open WFM spoke it; `SPELLING` is that of its onboarding."""

    SPELLING = ("public_certificate", "client_id")
    ROUTES = tuple((pattern.replace("deployments/([^/]+)/status", "deployment/([^/]+)/status"), methods)
                   for pattern, methods in wfm.SignedWfm.ROUTES)

    def answer(self, request):
        if request.path.endswith("/onboarding/certificate"):
            return self.explain(404, "404 page not found")
        reply = super().answer(request)
        if reply.status < 400:
            return reply
        return self.explain(reply.status, json.loads(reply.body.decode())["message"])

    @staticmethod
    def explain(status, words):
        """An error as this server words it."""
        return wfm.Reply(status, {"Content-Type": "application/json"}, wfm.make_json({"Error": words}))

    def onboard(self, request):
        known = dict(self.onboarded)
        reply = super().onboard(request)
        if self.onboarded == known:
            raise wfm.Problem(409, "the client is onboarded")
        return reply

    def put_capabilities(self, request, device_id=None):
        check_device_id(request)
        return super().put_capabilities(request, device_id)

    def get_manifest(self, request):
        if request.headers.get("Accept") != wfm.MANIFEST_TYPE:
            raise wfm.Problem("server-cannot-generate-response", f"Accept must be {wfm.MANIFEST_TYPE}")
        return super().get_manifest(request)

    def get_deployment(self, request, deployment_id, digest):
        """It writes a document anew when it is asked for one, so no digest ever fits: only the bundle works."""
        raise wfm.Problem(404, "no deployment of this digest")


class Open2026(wfm.Wfm):
    """A year later, over mutual TLS, with its gaps."""

    def answer(self, request):
        try:
            return super().answer(request)
        except wfm.Problem as problem:
            if problem.status in (401, 403):
                raise wfm.Problem(400, str(problem)) from None
            raise

    def put_capabilities(self, request, device_id):
        return super().put_capabilities(request, device_id)._replace(status=201)

    def get_manifest(self, request):
        if not request.headers.get("Accept"):
            raise wfm.Problem(400, "no Accept")
        headers = copy.copy(request.headers)
        del headers["If-None-Match"]
        return super().get_manifest(request._replace(headers=headers))

    def post_status(self, request, deployment_id):
        generations = self.desired_state(request.client).generations
        if not any(deployment_id.lower() in item.contents for item in generations):
            raise wfm.Problem(500, "deployment not found")
        return super().post_status(request, deployment_id)


# Beside them

class Registry(wfm.Registry):
    """A registry that gives out compose files as they are, too: /bare/NAME/TAG."""

    ROUTES = wfm.Registry.ROUTES + ((r"/bare/(.+)/([^/]+)", {"GET": "get_compose"}),)

    def get_compose(self, request, name, tag):
        """The compose file of a package."""
        with open(os.path.join(self.packages, name, tag, "compose.yaml"), "rb") as file:
            return wfm.Reply(200, {"Content-Type": "application/octet-stream"}, file.read())


KINDS = {"suite": ("Wfm", MutualSuite), "suite-signed": ("SignedWfm", SignedSuite),
         "open-2025": ("SignedWfm", Open2025), "open-2026": ("Wfm", Open2026)}


def main():
    """Runs examples/wfm.py with a class of this file in place of its own."""
    name, made = KINDS[sys.argv.pop(1)]
    setattr(wfm, name, made)
    wfm.Registry = Registry
    wfm.main()


if __name__ == "__main__":
    main()
