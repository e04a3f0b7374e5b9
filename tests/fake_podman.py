"""An engine of files that answers as podman does, for tests that need no real containers; see support.FakeEngine.

held.json: containers {name: {id, image, labels, state, code, restarts, argv, env}}, networks {name: labels}, volumes {name: labels}, images [name],
           external {name: id}: what storage alone holds, declared {image: [path]}: its volumes, checked {image: its health check}, made_for {image: architecture}, commands {image: its CMD}, unstartable [id],
           exits {service: code}: such a service has ended with this code as soon as it is started, unready [service]: it cannot be brought up to its start,
           unhealthy [service], restless [service] (restarted between any two looks), unpullable [image], deaf (true: every command
           fails), logless (true: no log can be had), stubborn (true: nothing can be removed), uncreatable (true: no container can be made), lethal (a command, at which
           the agent is killed before it is carried out), slow (a file beside it): names of commands that hang, gate (another): the path
           of a file for which `ps` waits,
           thief (n: before the n-th command from now somebody removes all containers), damaged [image]: no container can be made of it,
           cut (n: the n-th command from now fails before its work, -n: after it), history (true: past.jsonl gets all after each command).

A test holds the engine open as a thread of its own (serve), to which fake_podman.pl hands its command lines; run as a program, it is a
podman for one command.
"""
import fcntl
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time


class Failed(Exception):
    """A command that ends with a code, and a message where it is not empty."""

    def __init__(self, message, code):
        super().__init__(message)
        self.message, self.code = message, code


def fail(message, code=125):
    """Ends as podman does when it cannot do something."""
    raise Failed(f"Error: {message}\n", code)


def split(arguments):
    """([(option, value)], operands) of a command line in which every option is spelt --name=value; operands end the options."""
    options = []
    while arguments and arguments[0].startswith("-"):
        name, _, value = arguments[0].partition("=")
        options.append((name, value))
        arguments = arguments[1:]
    return options, arguments


class Engine:
    """The commands, each a method."""

    def __init__(self, held):
        self.held, self.lines = held, []
        for key, value in (("containers", {}), ("networks", {}), ("volumes", {}), ("images", []), ("exits", {}), ("unhealthy", []),
                           ("unpullable", []), ("restless", []), ("external", {}), ("declared", {}), ("unstartable", []), ("damaged", []), ("unready", []), ("checked", {}), ("made_for", {}),
                           ("count", 0)):
            held.setdefault(key, value)

    def say(self, text):
        """One line of its output."""
        self.lines.append(text + "\n")

    def find(self, name):
        """A container by name or id."""
        for key, container in self.held["containers"].items():
            if name in (key, container["id"]):
                return key, container
        fail(f"no such container {name}")

    def select(self, options):
        """Containers by their filters, of a label or a network."""
        filters = [value.partition("=") for name, value in options if name == "--filter"]
        wanted = [value.partition("=") for kind, _, value in filters if kind == "label"]
        inside = {value for kind, _, value in filters if kind == "network"}
        for key, container in self.held["containers"].items():
            joined = {item[len("--network="):] for item in container["argv"] if item.startswith("--network=")}
            if inside <= joined.union(container.get("connected", ())) and all(name in container["labels"] and (not mark or container["labels"][name] == text) for name, mark, text in wanted):
                yield key, container

    def ps(self, arguments):
        options, _ = split(arguments)
        found = list(self.select(options))
        if ("--external", "") in options:               # what storage alone holds
            found += [(key, {"id": item, "labels": {}, "state": "storage", "code": 0}) for key, item in self.held["external"].items()]
        if ("--format", "{{.ID}}") in options:
            self.say("\n".join(container["id"] for _, container in found))
        else:
            self.say(json.dumps([dict({"Id": c["id"], "Names": [key], "Labels": c["labels"], "State": c["state"], "ExitCode": c["code"]},
                                   **c.get("shown", {})) for key, c in found]))

    def info(self, arguments):
        self.say(json.dumps({"host": {"arch": "amd64", "networkBackend": "netavark"}, "store": {"graphRoot": "/nowhere"}, "version": {"Version": "4.3.1"}}))

    def image(self, arguments):
        _, names = split(arguments[1:])
        for name in names:
            if name not in self.held["images"]:
                fail(f"{name}: image not known", 125)
            if arguments[0] == "rm":
                self.held["images"].remove(name)
                self.held["damaged"] = [other for other in self.held["damaged"] if other != name]
            elif arguments[1:] == names:
                self.say(json.dumps([{"Os": "linux", "Architecture": self.held["made_for"].get(name, "amd64"),
                                      "Healthcheck": self.held["checked"].get(name),
                                      "Config": {"Volumes": {path: {} for path in self.held["declared"].get(name, ())} or None,
                                                 "Cmd": self.held.get("commands", {}).get(name)}}]))

    def pull(self, arguments):
        _, (name,) = split(arguments)
        if name in self.held["unpullable"]:
            fail(f"initializing source docker://{name}: connection refused")
        if name not in self.held["images"]:
            self.held["images"].append(name)

    def tag(self, arguments):
        if arguments[0] not in self.held["images"]:
            fail(f"{arguments[0]}: image not known")
        self.held["images"].append(arguments[1])

    def show(self, kind, names):
        """Prints those of some names that there are, and fails where one is missing.

        As podman has it, the beginning of a volume's name will do, and that of a network's id.
        """
        held = self.held[kind]
        spelt = {key: key if kind == "volumes" else hashlib.sha256(key.encode()).hexdigest() for key in held}
        found = [([key for key in held if key == name] or [key for key in held if spelt[key].startswith(name)])[:1] for name in names]
        self.say(json.dumps([{"Name": key, "Labels": dict(label.split("=", 1) for label in held[key]),
                           "Options": self.held.get("options", {}).get(key, {}), "subnets": [{"subnet": "10.1.0.0/24", "gateway": "10.1.0.1"}]}
                             for keys in found for key in keys]))
        for name, keys in zip(names, found):
            if not keys:
                fail(f"no such {kind[:-1]}: {name}")

    def network(self, arguments):
        command, (options, names) = arguments[0], split(arguments[1:])
        networks = self.held["networks"]
        if command == "ls":
            wanted = [value[len("label="):] for name, value in options if name == "--filter"]
            self.say("\n".join(name for name, labels in networks.items() if all(label in labels for label in wanted)))
        elif command == "create":
            networks[names[0]] = [value for name, value in options if name == "--label"]
        elif command == "connect":
            self.find(names[1])[1].setdefault("connected", []).append(names[0])
        elif command == "inspect":
            self.show("networks", names)
        elif command == "rm":
            if names[0] not in networks:
                fail(f"unable to find network with name or ID {names[0]}", 1)
            if list(self.select([("--filter", f"network={names[0]}")])):
                fail(f"{names[0]!r} has associated containers with it", 2)
            del networks[names[0]]

    def volume(self, arguments):
        command, (options, names) = arguments[0], split(arguments[1:])
        if command == "create":
            self.held["volumes"][names[0]] = [value for name, value in options if name == "--label"]
            self.held.setdefault("options", {})[names[0]] = dict(value.split("=", 1) for name, value in options if name == "--opt")
        elif command == "ls":
            wanted = [value[len("label="):] for name, value in options if name == "--filter"]
            self.say("\n".join(name for name, labels in self.held["volumes"].items() if all(label in labels for label in wanted)))
        else:
            self.show("volumes", names)

    def container(self, arguments):
        _, names = split(arguments[1:])
        there = [(name, self.held["containers"][name]) for name in names if name in self.held["containers"]]
        self.say(json.dumps([{"Id": item["id"], "Name": name, "Config": {"Labels": item["labels"]}} for name, item in there]))
        if len(there) < len(names):
            fail("no such container")

    def create(self, arguments):
        options, operands = split(arguments)
        name = dict(options).get("--name", f"odd_{self.held['count']}")
        if name in self.held["containers"] or name in self.held["external"]:
            fail(f"the container name {name} is already in use")
        if operands[0] in self.held["damaged"]:
            fail(f"creating container storage: Stat /graph/overlay/{operands[0]}/diff: no such file or directory")
        if operands[0] not in self.held["images"] or self.held.get("uncreatable"):
            fail(f"{operands[0]}: image not known")
        self.held["count"] += 1
        labels = dict(value.partition("=")[::2] for option, value in options if option == "--label")
        env = "".join(read(value) for option, value in options if option == "--env-file")
        self.held["containers"][name] = {"id": f"{self.held['count']:012x}".ljust(64, "0"), "image": operands[0], "labels": labels, "state": "created", "code": 0,
                                         "restarts": 0, "argv": arguments, "env": env.splitlines()}
        for mount in [value for option, value in options if option == "--volume" and ":" in value]:
            source, target = mount.split(":")[:2]
            if not source.startswith("/"):
                self.held["containers"][name].setdefault("mounts", {})[target] = source
        self.say(self.held["containers"][name]["id"])

    def start(self, arguments):
        for name in arguments:
            _, container = self.find(name)
            service = container["labels"]["org.margo.service"]
            if container["id"] in self.held["unstartable"]:
                fail(f"unable to start container {container['id']}: mounting storage: no such file or directory")
            ended = service in self.held["exits"]
            container.update(state="exited" if ended else "running", code=self.held["exits"].get(service, 0))

    def init(self, arguments):
        _, container = self.find(arguments[0])
        if container["labels"]["org.margo.service"] in self.held["unready"]:
            fail(f"unable to find user ghost: no matching entries in passwd file: {container['env']}")
        container.update(state="initialized")

    def rename(self, arguments):
        name, _ = self.find(arguments[0])
        if arguments[1] in self.held["containers"] or arguments[1] in self.held["external"]:
            fail(f"the container name {arguments[1]} is already in use")
        self.held["containers"][arguments[1]] = self.held["containers"].pop(name)

    def stop(self, arguments):
        options, names = split(arguments)
        there = {name for key, container in self.held["containers"].items() for name in (key, container["id"])}
        for name in names:
            if name in there or ("--ignore", "") not in options:
                self.find(name)[1].update(state="exited", code=137)

    kill = stop

    def rm(self, arguments):
        options, names = split(arguments)
        for name in names:
            known = [key for key, container in self.held["containers"].items() if name in (key, container["id"])]
            if known and self.held.get("stubborn"):
                fail(f"cannot remove container {name}: device or resource busy")
            for key in known:
                del self.held["containers"][key]
            for key in [key for key, item in self.held["external"].items() if name in (key, item)]:
                del self.held["external"][key]

    def inspect(self, arguments):
        for container in self.held["containers"].values():
            container["restarts"] += container["labels"]["org.margo.service"] in self.held["restless"]
        names = split(arguments)[1]
        found = [c for name in names for key, c in self.held["containers"].items() if name in (key, c["id"])]
        checks = {c["id"]: self.find_check(c) for c in found}
        if "--format" in dict(split(arguments)[0]):     # addresses alone are asked for so
            return self.say("\n".join(c.get("addresses", "") for c in found))
        self.say(json.dumps([{"Id": c["id"], "Config": {"Labels": c["labels"], "Healthcheck": checks[c["id"]]}, "RestartCount": c["restarts"],
                           "State": {"Status": c["state"], "ExitCode": c["code"], "Health": {"Status": "starting" if checks[c["id"]] else ""}},
                           "Mounts": [{"Type": "volume", "Name": name, "Destination": path} for path, name in c.get("mounts", {}).items()]}
                          for c in found]))
        if len(found) < len(names):
            fail("no such container")

    def find_check(self, container):
        """The health check of a container: its own, else its image's."""
        options = dict(split(container["argv"])[0])
        if "--health-cmd" not in options:
            return self.held["checked"].get(container["image"]) if "--no-healthcheck" not in options else None
        seconds = {"ms": 10 ** 6, "s": 10 ** 9, "m": 60 * 10 ** 9, "h": 3600 * 10 ** 9}
        found = {"Test": ["CMD-SHELL", options["--health-cmd"]], "Retries": int(options.get("--health-retries", 3))}
        for key, option in (("Interval", "--health-interval"), ("StartPeriod", "--health-start-period")):
            number, unit = re.fullmatch("([0-9]+)([a-z]+)", options.get(option, "0s")).groups()
            found[key] = int(number) * seconds[unit]
        return found

    def healthcheck(self, arguments):
        _, container = self.find(arguments[1])
        if container["labels"]["org.margo.service"] in self.held["unhealthy"]:
            raise Failed("", 1)

    def logs(self, arguments):
        if self.held.get("logless"):
            fail("this log driver cannot be read")
        _, container = self.find(split(arguments)[1][0])
        for number, line in enumerate(["first line", *container["env"], "last words"]):
            self.say(f"2026-11-28T10:00:00.{number:09}Z {line}")


def is_hanging(folder, command):
    """Whether this command hangs; returns later where a command waits for its gate."""
    slow = os.path.join(folder, "slow")
    if os.path.exists(slow) and command in read(slow).split():
        return True
    gate = os.path.join(folder, "gate")
    while command == "ps" and os.path.exists(gate) and not os.path.exists(read(gate)):
        time.sleep(0.02)
    return False


def read(path):
    """A file's text."""
    with open(path) as file:
        return file.read()


def answer(folder, arguments, parent):
    """Carries out one command, alone: (exit code, output, errors); parent: the process that gave it."""
    with open(os.path.join(folder, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(os.path.join(folder, "calls.jsonl"), "a") as calls:
            calls.write(json.dumps(arguments) + "\n")
        path = os.path.join(folder, "held.json")
        held = json.loads(read(path)) if os.path.exists(path) else {}
        if held.get("deaf"):
            return 125, "", "Error: cannot connect to the engine\n"
        if held.get("lethal") == arguments[0]:
            os.kill(parent, 9)
            return 0, "", ""
        cut = held.pop("cut", None) or 0
        if abs(cut) > 1:
            held["cut"] = cut - 1 if cut > 0 else cut + 1
        thief = held.pop("thief", None) or 0
        if thief > 1:
            held["thief"] = thief - 1
        if thief == 1:
            held["containers"] = {}
        engine = Engine(held)
        try:
            if cut == 1:
                fail("the engine has gone")
            command = getattr(engine, arguments[0], None) or fail(f"unrecognized command `podman {arguments[0]}`")
            command(arguments[1:])
            if cut == -1:
                fail("the engine has gone")
            return 0, "".join(engine.lines), ""
        except Failed as failure:
            return failure.code, "".join(engine.lines), failure.message
        finally:
            with open(path + ".tmp", "w") as file:
                json.dump(held, file)
            os.rename(path + ".tmp", path)
            if held.get("history"):
                with open(os.path.join(folder, "past.jsonl"), "a") as file:
                    file.write(json.dumps(held) + "\n")


def serve(folder):
    """Answers fake_podman.pl at the socket `door` of the folder, each command in a thread, until the returned function is called."""
    door = socket.socket(socket.AF_UNIX)
    door.bind(os.path.join(folder, "door"))
    door.listen(64)

    def attend(caller):
        with caller, caller.makefile("rwb") as stream:
            parent, *arguments = [os.fsdecode(word) for word in stream.read().split(b"\0")]
            if is_hanging(folder, arguments[0]):
                stream.write(b"hang\n")
                return
            code, output, errors = answer(folder, arguments, int(parent))
            output = os.fsencode(output)
            stream.write(b"%d %d\n" % (code, len(output)) + output + os.fsencode(errors))

    def wait():
        while True:
            try:
                caller, _ = door.accept()
            except OSError:                         # it was shut
                return
            threading.Thread(target=attend, args=(caller,), daemon=True).start()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()

    def shut():
        door.shutdown(socket.SHUT_RDWR)
        thread.join()
        door.close()
    return shut


def main():
    """The engine for one command, of a folder that FAKE_PODMAN names."""
    folder, arguments = os.environ["FAKE_PODMAN"], sys.argv[1:]
    if is_hanging(folder, arguments[0]):
        import subprocess
        subprocess.call(["sleep", "600"])
    code, output, errors = answer(folder, arguments, os.getppid())
    sys.stdout.write(output)
    sys.stderr.write(errors)
    sys.exit(code)


if __name__ == "__main__":
    main()
