"""A Git server on loopback for the tests: `git http-backend` behind HTTPS with the test PKI, asking for a token where it is told to."""
import base64
import http.server
import os
import ssl
import subprocess
import threading
import zlib

from tests import support


class GitServer:
    """Serves the repositories below `folder`; `authorization`: what the header has to be; `requests`: [(method, path, status, bytes sent)]."""

    def __init__(self, test, pki, folder, authorization=None, certificate="site"):
        self.folder, self.authorization, self.requests, self.headers, self.answer = folder, authorization, [], [], None
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                owner.serve(self)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that distrusts us hangs up
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pki.path(f"{certificate}.pem"), pki.path(f"{certificate}.key"))
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://127.0.0.1:{self.server.server_address[1]}"
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        test.addCleanup(self.close)

    def close(self):
        """Ends it."""
        self.server.shutdown()
        self.server.server_close()

    def serve(self, handler):
        """Answers one request by git's own CGI program."""
        body = self.read_body(handler)
        self.headers.append(dict(handler.headers))
        status, headers, content = 401, {"WWW-Authenticate": "Basic realm=git"}, b""
        if self.answer:                             # a fault: (status, headers)
            status, headers = self.answer
        elif self.authorization in (None, handler.headers.get("Authorization")):
            status, headers, content = self.run_backend(handler, body)
        self.requests.append((handler.command, handler.path, status, len(content)))
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def read_body(self, handler):
        """The request's body, chunked or not, packed or not."""
        body = b""
        if handler.headers.get("Transfer-Encoding") == "chunked":
            while True:
                size = int(handler.rfile.readline(), 16)
                body += handler.rfile.read(size)
                handler.rfile.readline()
                if not size:
                    break
        else:
            body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        return zlib.decompress(body, 31) if handler.headers.get("Content-Encoding") == "gzip" else body

    def run_backend(self, handler, body):
        """(status, headers, content) of git http-backend."""
        path, _, query = handler.path.partition("?")
        env = {"PATH": os.environ["PATH"], "GIT_PROJECT_ROOT": self.folder, "GIT_HTTP_EXPORT_ALL": "1", "PATH_INFO": path, "QUERY_STRING": query,
               "REQUEST_METHOD": handler.command, "CONTENT_TYPE": handler.headers.get("Content-Type", ""), "CONTENT_LENGTH": str(len(body)),
               "REMOTE_USER": "tester", "REMOTE_ADDR": "127.0.0.1", "GIT_PROTOCOL": handler.headers.get("Git-Protocol", "")}
        done = subprocess.run(["git", "http-backend"], input=body, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
        return int(headers.pop("Status", "200").split()[0]), headers, content


def basic(username, password):
    """The header's value of basic authentication."""
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


class Repository:
    """A bare repository that a test commits to, through a work tree of its own."""

    def __init__(self, test, name="fleet.git", object_format="sha1"):
        self.folder = support.make_folder(test)
        self.bare, self.work = os.path.join(self.folder, "served", name), os.path.join(self.folder, "work")
        self.served = os.path.join(self.folder, "served")
        self.env = {"PATH": os.environ["PATH"], "HOME": self.folder, "GIT_CONFIG_NOSYSTEM": "1", "GIT_AUTHOR_NAME": "Plant", "GIT_COMMITTER_NAME":
                    "Plant", "GIT_AUTHOR_EMAIL": "plant@factory.example", "GIT_COMMITTER_EMAIL": "plant@factory.example"}
        self.url = f"file://{self.bare}"
        self.git("init", "--quiet", "--bare", f"--object-format={object_format}", "-b", "main", self.bare, cwd=self.folder)
        self.git("config", "http.receivepack", "true", cwd=self.bare)
        self.git("init", "--quiet", f"--object-format={object_format}", "-b", "main", self.work, cwd=self.folder)

    def git(self, *arguments, cwd=None, check=True, data=None):
        """One git command of the fleet's operator; its output."""
        done = subprocess.run(["git"] + list(arguments), cwd=cwd or self.work, env=self.env, input=data, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=60)
        if check and done.returncode:
            raise AssertionError(f"git {' '.join(arguments)}: {done.stderr.decode()}")
        return done.stdout.decode("utf-8", "replace").strip()

    def commit(self, files, message="change", push=True, options=()):
        """Writes {path: text, None: remove}, commits and pushes; returns the commit."""
        for path, text in files.items():
            full = os.path.join(self.work, path)
            if text is None:
                os.remove(full)
            else:
                support.write(full, text)
        self.git("add", "--all", "--force")
        self.git("commit", "--quiet", "--allow-empty", "-m", message, *options)
        if push:
            self.push()
        return self.git("rev-parse", "HEAD")

    def push(self, *options):
        """Pushes the work tree's branch."""
        self.git("push", "--quiet", *options, self.bare, "HEAD:main")

    def show(self, branch, path=None):
        """A file of a branch as text; without path the names of all its files."""
        if path is None:
            return self.git("ls-tree", "-r", "--name-only", branch, cwd=self.bare).splitlines()
        return self.git("cat-file", "blob", f"{branch}:{path}", cwd=self.bare)

    def log(self, branch):
        """The subjects of a branch's commits, oldest first."""
        return self.git("log", "--reverse", "--format=%s", branch, "--", cwd=self.bare).splitlines()
