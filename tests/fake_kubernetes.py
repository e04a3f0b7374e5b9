"""A small Kubernetes API server in memory, for tests that let helm 3 and helm 4 install, upgrade, list and uninstall ordinary objects.

    python3 -m tests.fake_kubernetes          # prints `listening http://127.0.0.1:PORT`, serves until it is ended

It keeps objects of the kinds below, selects them by labels, merges patches, streams watches, and plays the controller of Deployments:
one is ready at once unless its pod template has the annotation `test/never-ready`.  Nothing runs and nothing is authorised.
"""
import base64
import http.server
import json
import re
import threading
import time
import urllib.parse
import uuid

KINDS = {                                           # (group/version, resource): (kind, whether it lies in a namespace)
    ("v1", "namespaces"): ("Namespace", False), ("v1", "configmaps"): ("ConfigMap", True), ("v1", "secrets"): ("Secret", True),
    ("v1", "services"): ("Service", True), ("v1", "serviceaccounts"): ("ServiceAccount", True), ("v1", "pods"): ("Pod", True),
    ("apps/v1", "deployments"): ("Deployment", True), ("apps/v1", "replicasets"): ("ReplicaSet", True)}


class Cluster:
    """The objects, and who waits for changes of them."""

    def __init__(self):
        self.objects, self.version, self.events = {}, 0, []
        self.changed = threading.Condition(threading.RLock())
        for name in ("default", "kube-system"):
            self.put(("v1", "namespaces", "", name), {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    def put(self, key, item):
        """Stores an object as it now is and tells the watchers."""
        with self.changed:
            before = self.objects.get(key)
            self.version += 1
            facts = item.setdefault("metadata", {})
            facts["resourceVersion"] = str(self.version)
            facts["uid"] = before["metadata"]["uid"] if before else str(uuid.uuid4())
            facts["creationTimestamp"] = before["metadata"]["creationTimestamp"] if before else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            changed = before is None or before.get("spec") != item.get("spec")
            facts["generation"] = (before["metadata"]["generation"] if before else 0) + int(changed)
            if item["kind"] == "Deployment":
                self.play_controller(key, item)
            self.objects[key] = item
            self.events.append((self.version, "ADDED" if before is None else "MODIFIED", key, item))
            self.changed.notify_all()
        return item

    def drop(self, key):
        """Deletes an object, what it owns, and with a namespace all in it."""
        with self.changed:
            item = self.objects.pop(key)
            self.version += 1
            self.events.append((self.version, "DELETED", key, item))
            self.changed.notify_all()
            for other, value in list(self.objects.items()):
                owners = [owner["uid"] for owner in value["metadata"].get("ownerReferences", ())]
                if other in self.objects and (item["metadata"]["uid"] in owners or key[1] == "namespaces" and other[2] == key[3]):
                    self.drop(other)
        return item

    def play_controller(self, key, item):
        """What Kubernetes' own controllers would do about a Deployment."""
        template, count = item["spec"]["template"], item["spec"].setdefault("replicas", 1)
        ready = 0 if "test/never-ready" in template.get("metadata", {}).get("annotations", {}) else count
        generation, mark = item["metadata"]["generation"], f"{item['metadata']['name']}-{item['metadata']['generation']}"
        item["status"] = {"observedGeneration": generation, "replicas": count, "updatedReplicas": count, "readyReplicas": ready,
                          "availableReplicas": ready, "unavailableReplicas": count - ready, "conditions": [
                              {"type": "Available", "status": "True" if ready == count else "False", "reason": "MinimumReplicasAvailable"},
                              {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable" if ready == count else "ReplicaSetUpdated"}]}
        self.put(("apps/v1", "replicasets", key[2], mark), {
            "apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": {
                "name": mark, "namespace": key[2], "labels": dict(template.get("metadata", {}).get("labels", {})),
                "annotations": {"deployment.kubernetes.io/revision": str(generation)}, "ownerReferences": [{
                    "apiVersion": "apps/v1", "kind": "Deployment", "name": key[3], "uid": item["metadata"]["uid"], "controller": True}]},
            "spec": {"replicas": count, "selector": item["spec"]["selector"], "template": template},
            "status": {"replicas": count, "readyReplicas": ready, "availableReplicas": ready, "observedGeneration": 1}})


def merge(target, patch):
    """A merge patch; lists of objects with names are merged by name, as the strategic form does."""
    if not isinstance(patch, dict) or not isinstance(target, dict):
        return patch
    result = dict(target)
    for key, value in patch.items():
        if key.startswith("$"):
            continue
        if value is None:
            result.pop(key, None)
        elif isinstance(value, list) and value and all(isinstance(part, dict) and "name" in part for part in value):
            old = {part.get("name"): part for part in result.get(key) or [] if isinstance(part, dict)}
            result[key] = [merge(old.get(part["name"], {}), part) for part in value]
        else:
            result[key] = merge(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


def read_fields(data):
    """A protocol buffer's fields as {number: [value]}: whole numbers, and bytes for all that has a length."""
    fields, position = {}, 0

    def number():
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        key = number()
        value = number()
        if key & 7 == 2:
            value, position = data[position:position + value], position + value
        fields.setdefault(key >> 3, []).append(value)
    return fields


def read_object(body):
    """The object of a request: JSON, or a Secret or Namespace in Kubernetes' protocol buffers, in which helm writes its releases."""
    if not body.startswith(b"k8s\0"):
        return json.loads(body)
    fields = read_fields(read_fields(body[4:])[2][0])

    def read_map(entries):
        return {part[1][0].decode(): part.get(2, [b""])[0] for part in map(read_fields, entries)}

    facts = read_fields(fields[1][0])
    item = {"metadata": {"name": facts[1][0].decode(), "labels": {key: text.decode() for key, text in read_map(facts.get(11, ())).items()}}}
    if isinstance(fields.get(2, [b""])[0], bytes) and 3 in fields:
        item.update(type=fields[3][0].decode(), data={key: base64.b64encode(part).decode() for key, part in read_map(fields.get(2, ())).items()})
    return item


def is_selected(item, selector):
    """Whether an object's labels fit a label selector of the forms a=b, a==b, a!=b, a, !a, a in (b,c)."""
    labels = item["metadata"].get("labels") or {}
    for part in re.findall(r"[^,(]+(?:\([^)]*\))?", selector or ""):
        name, mark, value = re.fullmatch(r"\s*(!?[\w./-]+)\s*(==|=|!=|in|notin)?\s*(.*?)\s*", part).groups()
        found, values = labels.get(name.lstrip("!")), [word.strip() for word in value.strip("()").split(",")]
        if not {None: (found is None) == name.startswith("!"), "=": found == value, "==": found == value, "!=": found != value,
                "in": found in values, "notin": found not in values}[mark]:
            return False
    return True


class Handler(http.server.BaseHTTPRequestHandler):
    """The requests that helm makes."""

    protocol_version = "HTTP/1.1"
    cluster = None

    def log_message(self, *_):
        """Says nothing."""

    def answer(self, value, status=200):
        """An answer: bytes as they are, anything else as JSON."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(value, bytes) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, reason, message):
        """A Status object that says what is wrong."""
        self.answer({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": status}, status)

    def discover(self, path):
        """What the server knows; None where the path asks for something else."""
        if path == "/version":
            return {"major": "1", "minor": "33", "gitVersion": "v1.33.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            version = {"groupVersion": "apps/v1", "version": "v1"}
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [{"name": "apps", "versions": [version], "preferredVersion": version}]}
        for group, root in (("v1", "/api/v1"), ("apps/v1", "/apis/apps/v1")):
            if path == root:
                return {"kind": "APIResourceList", "groupVersion": group, "resources": [
                    {"name": name, "kind": kind, "namespaced": inside, "singularName": kind.lower(),
                     "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"]}
                    for (owner, name), (kind, inside) in KINDS.items() if owner == group]}
        if path == "/openapi/v3":
            return {"paths": {}}
        return None

    def do(self):
        """One request."""
        parts = urllib.parse.urlsplit(self.path)
        query = {key: value[0] for key, value in urllib.parse.parse_qs(parts.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if parts.path == "/openapi/v2":
            return self.answer(b"")                 # an empty document in protocol buffers: no schema to validate against
        found = self.discover(parts.path) if self.command == "GET" else None
        if found is not None:
            return self.answer(found)
        match = re.fullmatch(r"/(?:api/(v1)|apis/(apps/v1))(?:/namespaces/([^/]+)(?=/[a-z]))?/([a-z]+)(?:/([^/]+))?(?:/(status))?", parts.path)
        if not match or (match.group(1) or match.group(2), match.group(4)) not in KINDS:
            return self.refuse(404, "NotFound", f"the server could not find the requested resource {parts.path}")
        group, space, resource, name = match.group(1) or match.group(2), match.group(3) or "", match.group(4), match.group(5)
        with self.cluster.changed:
            return self.serve(group, resource, space, name, query, body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do

    def serve(self, group, resource, space, name, query, body):
        """One request for objects of a kind."""
        kind = KINDS[group, resource][0]
        if self.command == "GET" and name is None:
            if query.get("watch") in ("true", "1"):
                return self.stream(group, resource, space, query)
            items = [item for key, item in sorted(self.cluster.objects.items()) if self.fits(key, item, group, resource, space, query)]
            return self.answer({"kind": kind + "List", "apiVersion": group, "metadata": {"resourceVersion": str(self.cluster.version)},
                                "items": items})
        if self.command == "POST":
            item = read_object(body)
            key = group, resource, space, item["metadata"]["name"]
            if key in self.cluster.objects:
                return self.refuse(409, "AlreadyExists", f'{resource} "{key[3]}" already exists')
            if space and ("v1", "namespaces", "", space) not in self.cluster.objects:
                return self.refuse(404, "NotFound", f'namespaces "{space}" not found')
            return self.answer(self.cluster.put(key, self.complete(item, group, kind, space)), 201)
        key = group, resource, space, name
        before = self.cluster.objects.get(key)
        if before is None and not (self.command == "PATCH" and "apply" in self.headers["Content-Type"]):
            return self.refuse(404, "NotFound", f'{resource} "{name}" not found')
        if self.command == "GET":
            return self.answer(before)
        if self.command == "DELETE":
            self.cluster.drop(key)
            return self.answer({"kind": "Status", "apiVersion": "v1", "status": "Success"})
        item = read_object(body)
        if self.command == "PATCH" and "apply" not in self.headers["Content-Type"]:
            item = merge(before, item)              # a server-side apply of the only manager is the whole of what should be
        if query.get("dryRun"):
            return self.answer(self.complete(item, group, kind, space))
        return self.answer(self.cluster.put(key, self.complete(item, group, kind, space)), 200 if before else 201)

    @staticmethod
    def complete(item, group, kind, space):
        """An object with what the path says of it; `stringData` of a Secret is not used by helm."""
        item.update(apiVersion=group, kind=kind)
        if space:
            item["metadata"]["namespace"] = space
        return item

    @staticmethod
    def fits(key, item, group, resource, space, query):
        """Whether a list or watch is about an object."""
        field = re.fullmatch(r"metadata\.name=(.+)", query.get("fieldSelector") or "metadata.name=" + key[3])
        return key[:2] == (group, resource) and space in ("", key[2]) and is_selected(item, query.get("labelSelector")) and bool(
            field and field.group(1) == key[3])

    def stream(self, group, resource, space, query):
        """A watch: what has changed since, then what changes, line by line until the caller goes or ten seconds have passed."""
        seen, end = int(query.get("resourceVersion") or 0), time.monotonic() + min(10, int(query.get("timeoutSeconds") or 10))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if query.get("sendInitialEvents") == "true" or not seen:
            current = [(0, "ADDED", key, item) for key, item in sorted(self.cluster.objects.items())]
            self.send_events(current, group, resource, space, query)
            seen = self.cluster.version
            if query.get("sendInitialEvents") == "true":
                self.send_chunk({"type": "BOOKMARK", "object": {"kind": KINDS[group, resource][0], "apiVersion": group, "metadata": {
                    "resourceVersion": str(seen), "annotations": {"k8s.io/initial-events-end": "true"}}}})
        try:
            while time.monotonic() < end:
                news = [event for event in self.cluster.events if event[0] > seen]
                seen = self.cluster.version
                self.send_events(news, group, resource, space, query)
                self.cluster.changed.wait(0.2)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True

    def send_events(self, events, group, resource, space, query):
        """The events that a watch is about."""
        for _, kind, key, item in events:
            if self.fits(key, item, group, resource, space, query):
                self.send_chunk({"type": kind, "object": item})

    def send_chunk(self, value):
        """One event of a watch."""
        line = json.dumps(value).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.flush()


def main():
    """Serves on a free port of loopback until it is ended."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Handler.cluster = Cluster()
    print(f"listening http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
