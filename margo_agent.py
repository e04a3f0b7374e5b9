#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""margo_agent.py: a Margo Workload Fleet Management client for the smallest Linux devices, in one file.

What it is.  A Workload Fleet Manager (WFM) says which applications should run on a device; this agent makes
it so.  It proves the device's identity by an X.509-SVID, reports what the device can do, polls the desired
state, verifies it, compares it with what runs, drives container commands to close the gap, and reports how
that went.  It never listens; every connection starts here.

Usage.      margo_agent.py [-c FILE] [-v|-q] [--log-format text|json] COMMAND
            (or --config, --verbose, --quiet; `COMMAND --help` explains one)
Files.      The configuration (-c FILE, else $MARGO_CONFIG, else
            /etc/margo/agent.yaml) and one state directory.
Exit codes. 0 as desired, 1 a deployment failed, 2 usage or configuration,
            3 unreachable or to be reported later, 4 desired state refused,
            5 identity or trust, 6 another instance runs, 70 a bug.

Stable for embedding: what __all__ names, `Agent.cycle` with the fields of the Outcome that it returns, and
log.level and log.callback(level, message, fields).  All else may change.

How to read it: from top to bottom, as a newspaper: what the agent does, then how, then with what.  To follow
one poll, read 1 to 6; `Agent.cycle` is where it begins.  A section uses only 1, 2 and sections below it;
optional ones and the command line, which stand at the end, use all of it, and nobody names what is in them.
   1 Constants and errors         13 Capabilities                   25 Signed (optional)
   2 Records                      14 Compose driver                 26 Older documents (optional)
   3 Agent                        15 Compose file                   27 Git (optional)
   4 Plan                         16 Packages                       28 Enrollment (optional)
   5 Apply                        17 Commands                       29 Revocation (optional)
   6 Deployment status            18 Transport                      30 Helm (optional)
   7 Devices                      19 Store                          31 Gateway (optional)
   8 Turns                        20 Patience                       32 Hooks (optional)
   9 Desired-state source         21 Configuration                  33 Image policy (optional)
  10 Desired state                22 X.509                          34 Doctor (optional)
  11 Identity and trust           23 YAML                           35 Commands for people (optional)
  12 Eligibility                  24 Small encodings              36 Command line
"C-nnn" and "E-nnn" in comments and docstrings are rules of Margo's protocol and of its drafts
(tests/data/rules.txt), "P-nn" and "D-nn" are mistakes of other agents, which a test of the same mark keeps
out; "F-nn" and "K-nn" are what fleets and compose files met.
"""
# Only what every command needs is imported here: one unchanged poll is measured in milliseconds, so a module
# that a poll may do without (subprocess, tarfile, json, ssl ...) is imported by the function that needs it.
if __name__ == "__main__":                          # ctrl-C while this file is read ends it without a word
    import signal
    at_interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
import io
import os
import re
import sys
import time
from collections import ChainMap
from operator import itemgetter

__version__ = "0.1.0"
__all__ = ["main", "Agent", "load_config", "load_yaml", "status", "log", "PROFILES", "__version__",
           "MargoError", "ConfigError", "Unreachable", "StorageError", "Refused", "Untrusted", "Locked",
           "YAMLError"]


# ----------------------------------------------------------------------------------------------------------
# 1. Constants and errors
# ----------------------------------------------------------------------------------------------------------

# What optional rooms add where they are defined; nothing outside names anything in them.
# See also SCHEMA, CHECKS, STEPS, DEVICES, PLACES, LISTENERS and COMPANIONS.
PROFILES = {}                       # {wfm.profile: its Profile class}
COMMANDS = {}                       # {name: (its function of config and options, to an exit code or nothing
                                    # for 0; its usage)}; its docstring is its help
JUDGES = []                         # functions of (image, config) to the name by which it is pulled, once
                                    # nothing speaks against it; else ComponentError
DRIVERS = {}                        # {deployment type: function of (config, child, others) to its driver or
                                    # None}
EXAMINE = {}                        # {what `doctor` checks: function of the Agent to (ok or warn, words)}
TRACES = ["registries"]             # names in the state directory that `unenroll` removes

KIB = 1024
MIB = 1024 * KIB
MAX_CERTIFICATES = 1 * MIB          # a trust bundle, a PEM file
MAX_ANSWER = 256 * KIB              # a problem document, a token, the answer to a report
MAX_MESSAGE = 4000                  # characters of what the WFM is told about a fault
MAX_OUTPUT = 24 * MIB               # what a helper program may print
MAX_DEPLOYMENTS = 10000             # entries of one state manifest
DOCUMENTS = 8                       # all documents together: one part in so many of policy.max_unpacked
MAX_NODES = 250000                  # members of a document: each takes some hundred bytes of memory
MAX_DURATION = 3650 * 86400         # seconds of one setting; clocks and timers take no sum of centuries
MAX_NUMBER = 1e300                  # of a document: with larger ones the processor cannot reckon
MAX_VERSION = 2 ** 64 - 1           # manifestVersion is an unsigned 64 bit number (protocol 3.1)

MANIFEST_TYPE = "application/vnd.margo.manifest.v1+json"
BUNDLE_TYPE = "application/vnd.margo.bundle.v1+tar+gzip"
DEPLOYMENT_TYPE = "application/yaml"
JSON_TYPE = "application/json"
SUCCESS = range(200, 300)           # of a report: HTTP has more words for it than Margo's interface names
PROBLEM_ROOT = "https://docs.margo.org/specification/"
# Problem types (protocol 3.7), earlier ones too: what is said of the client, and of one request.
DENIALS = ("not-authorized certificate-not-trusted signature-verification-failed"
           " wfm-client-relationship-retired").split()
REFUSALS = ("invalid-request semantic-error gateway-not-found device-not-found invalid-bundle"
            " deployment-not-found server-cannot-generate-response discovery-document-not-found"
            " spiffe-bundle-not-found invalid-client invalid-digest-header"
            " invalid-certificate-format").split()

DIGEST_PATTERN = r"sha256:[0-9a-f]{64}"
UUID_PATTERN = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
EXTENSION_PATTERN = r"x-[a-z][a-z0-9-]*-extensions"
PORT_PATTERN = r":(?:[0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
REGISTRY_PATTERN = rf"(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?:{PORT_PATTERN})?"
DEVICE_ID_PATTERN = r"[A-Za-z0-9._~-]+(/[A-Za-z0-9._~-]+)*"

# Most severe first (C-133).
STATES = "failed removing installing pending removed installed".split()
GOING = ("removing", "removed")     # those of what is not wanted any more
CHANGES = ("install", "update")     # verbs of a plan that make a version run

RETRY_FIRST, RETRY_CAP = 30, 3600   # seconds between attempts at a failed deployment
REPAIRS = 5                         # repairs within RETRY_CAP before pauses between them grow, too
HISTORY = 20                        # accepted desired states that `history` tells of
MAX_NAMED = 100                     # things of one kind that are named in `status` or the log
BACKOFF_FIRST, BACKOFF_CAP = 1, 900  # seconds between attempts at a WFM that cannot be reached
STOP_GRACE = 20                     # seconds for the current step once the process is asked to end
STOP_LIMIT = 90                     # seconds until a cycle that was asked to end is killed by its parent
MAX_SHIFT = 3 * 3600                # seconds by which a clock may be put forward, at most
CYCLE_RETRY = 60                    # seconds to the next cycle after one that said nothing
HUNG = 1800                         # seconds without a move after which a cycle is killed
MAX_WAIT = 86400.0                  # seconds that anybody can ask this device to wait
START_SPREAD = 60                   # seconds over which a fleet that starts arrives, at most
START_WINDOW = 300                  # seconds since boot in which a device counts as just started
RESERVE = 256 * KIB                 # at most kept for the state, for when the disk is full (P-4)
COMPONENT_TIMEOUT = 300             # seconds a component without `timeout` may take to come up
MAX_TIMEOUT = 6 * 3600              # seconds one may ask for at most: its device hears nobody meanwhile (P-9)
PULL_TIMEOUT = 3600                 # seconds git, or an engine for an image, may take: links are slow (P-15)
LOOKS = 8                           # engines and clusters that are asked at once
FREE_SPACE = 32 * MIB               # at most stays free on a disk that something is fetched to (P-4)
SHARE = 16                          # of a small disk, one part in so many stays free, and one is kept
CORPSE_GRACE = 5                    # seconds in which a program that was killed has to be gone


class MargoError(Exception):
    """A fault that a person can act upon: `code` is stable text, `message` says what, where and what to do.

    `exit` is the exit code that the fault becomes, in `main` and nowhere else.  Of an answer of the WFM: its
    HTTP `status`, the seconds it asked to be left alone, and its `backoffStrategy`; of a peer: whether it is
    a `stranger`.  `facts` are those of these that differ from the class's.
    """

    exit = 70
    code = "INTERNAL"
    result = "failed"                   # the word of `lastPoll.result`
    status, retry_after, strategy, stranger = 0, None, "", False

    def __init__(self, message, code=None, **facts):
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        vars(self).update(facts)


def define_fault(name, exit, code, meaning, base=MargoError, result=""):
    """A kind of MargoError: its exit code, stable text, meaning (its docstring) and word for `lastPoll`."""
    return type(name, (base,), {"exit": exit, "code": code, "__doc__": meaning,
                                "result": result or base.result})


ConfigError = define_fault("ConfigError", 2, "CONFIGURATION", "The command line or configuration is wrong.")
Unreachable = define_fault("Unreachable", 3, "UNREACHABLE", "The WFM cannot be reached or asks for patience.",
                           result="unreachable")
Silence = define_fault("Silence", 3, "UNREACHABLE", "No request is made now; not a fault.", Unreachable)
Waiting = define_fault("Waiting", 3, "REMOVALS_UNCONFIRMED", "So much is removed only once it is confirmed.",
                       result="refused")
Interrupted = define_fault("Interrupted", 3, "INTERRUPTED", "The process was asked to end before its time.")
StorageError = define_fault("StorageError", 3, "STORAGE", "The state directory cannot be read or written.")
NoMemory = define_fault("NoMemory", 3, "MEMORY", "The device has not enough memory for a step.")
Refused = define_fault("Refused", 4, "REFUSED", "The desired state is refused as a whole; what runs stays.",
                       result="refused")
Untrusted = define_fault("Untrusted", 5, "UNTRUSTED", "Own identity or the peer's cannot be trusted.",
                         result="untrusted")
Locked = define_fault("Locked", 6, "LOCKED", "Another instance works on the same state directory.")
CommandError = define_fault("CommandError", 1, "COMMAND", "A helper program could not be run to its end.")
CommandTimeout = define_fault("CommandTimeout", 1, "COMMAND", "The program ran out of time.", CommandError)


FAULTS = (MargoError, MemoryError, OSError)                 # what to_fault has words for
MENDS = {"ENOSPC": "free space", "EDQUOT": "free space", "EIO": "look after the disk",
         "EEXIST": "something else lies in its place, move it away",
         "ENOTDIR": "something else lies in its place, move it away",
         "EISDIR": "something else lies in its place, move it away",
         "EROFS": "mount that disk writable", "EACCES": "run as root, or as its owner",
         "EFBIG": "let this service write larger files",
         "EMFILE": "let this service have more open files",
         "E2BIG": "hand it less: its command line or environment is too long"}


def make_mend(error):
    """What to do about an OSError."""
    import errno
    return MENDS.get(errno.errorcode.get(error.errno), "let this user read and write it")


def to_fault(error):
    """The error as one that a person can act upon: Python's own words for a lack of memory are none.

    What the operating system denies is a fault of storage, wherever it is met.
    """
    if isinstance(error, MemoryError):
        return NoMemory("not enough memory for this step; end other programs on the device, or have it do"
                        " less (see README, Small devices)")
    if isinstance(error, OSError):
        words = f"{error.filename or 'a step'} failed ({error.strerror or error})"
        return StorageError(f"{words}; {make_mend(error)}")
    return error


class ComponentError(MargoError):
    """Fails one component or deployment, never the others; `code` is what the WFM is told (protocol 5.4).

    A gateway's own are 101 (unknown child), 102 (unreachable child) and 103 (no placement).
    """

    exit = 1
    source = None                       # who raised it, where that is not the deployment or component itself

    def __init__(self, code, message, **facts):
        super().__init__(message[:MAX_MESSAGE] + ("..." if len(message) > MAX_MESSAGE else ""), code, **facts)


# What fails one deployment and not the cycle.
TROUBLE = (ComponentError, CommandError, ConfigError, StorageError, MemoryError, OSError)


# ----------------------------------------------------------------------------------------------------------
# 2. Records
# ----------------------------------------------------------------------------------------------------------

class Record(tuple):
    """A tuple whose places have names, made by `define`.

    It is what collections.namedtuple makes, at a fifth of what that takes each time this file is loaded.
    """

    __slots__ = ()

    def __new__(cls, *values, **named):
        if named or len(values) != len(cls._fields):
            found = {**cls._defaults, **dict(zip(cls._fields, values)), **named}
            if len(values) > len(cls._fields) or found.keys() != set(cls._fields):
                raise TypeError(f"{cls.__name__} has the fields {' '.join(cls._fields)}")
            values = map(found.get, cls._fields)
        return super().__new__(cls, values)

    def _asdict(self):
        return dict(zip(self._fields, self))

    def _replace(self, **changes):
        return type(self)(**dict(self._asdict(), **changes))


def define(name, fields, meaning, *defaults):
    """A record type: a tuple of named `fields`, documented by `meaning`; `defaults`: of the last fields.

    One with a deployment's id has a `key`, too: the id in lower case, by which the state knows it.
    """
    fields = fields.split()
    parts = {field: property(itemgetter(place)) for place, field in enumerate(fields)}
    if "deployment_id" in fields:                   # ids are told apart without regard to case
        parts["key"] = property(lambda self: self.deployment_id.lower())
    last = fields[len(fields) - len(defaults):]
    return type(name, (Record,), dict(parts, __slots__=(), __doc__=meaning, _fields=tuple(fields),
                                      _defaults=dict(zip(last, defaults))))


Certificate = define("Certificate",
    "der subject issuer serial not_before not_after spki uris is_ca key_usage key issuer_key alt_names",
    "An X.509 certificate: bytes, raw names, int, Unix seconds, public key, URI SANs, CA flag, keyUsage bits"
    " or None, identifiers of its own key and of its issuer's or None, subjectAltName as it stands.",
    None, None, b"")
ManifestEntry = define("ManifestEntry", "deployment_id digest size",
    "One line of a state manifest; `size` is advice, never a check (C-110).")
Manifest = define("Manifest", "version bundle_digest bundle_size entries foreign",
    "A state manifest that holds to every structural rule of protocol 3.1; `foreign`: a `url` in it that is"
    " of another origin than the WFM, or \"\".", "")
Desired = define("Desired", "version etag digest entries documents",
    "A verified desired state: ETag as sent, digest of the manifest, {digest: bytes} of new documents.")
Component = define("Component", "name repository revision wait timeout extensions key_location",
    "A component of a deployment; `timeout` in seconds; `extensions`: {x-…-extensions: mapping} as read.  Of"
    " older generations: `repository` may be the https URL of a package (`revision` is empty then), and"
    " `key_location` that of the key it is signed by.", {}, None)
Parameter = define("Parameter", "name value targets",
    "A parameter: YAML value and [(pointer, [component names])].")
Deployment = define("Deployment",
    "deployment_id name namespace device_id type components parameters constraints extensions",
    "An ApplicationDeployment, checked; `constraints` is its `deviceConstraints` as read, or None;"
    " `extensions`: those of {spec, deploymentProfile}.", {})
Target = define("Target", "deployment_id digest version deployment error device_id",
    "What should run: a Deployment, and the ComponentError for which it cannot; `version` defined it;"
    " `device_id`: where it is at home.", 0, None, None, None)
Source = define("Source", "path real kind own socket",
    "What a compose file names of the disk: the path by which it is mounted, where it lies in truth, file,"
    " folder, other, or \"\" where nothing is, whether it is the package's own, whether it is an engine's"
    " socket or leads to one.")
Container = define("Container",
    "id name deployment_id component service hash state type device_id started health owner",
    "One container (or what a driver has in its place) as it is shown; `state` is the engine's lower-case"
    " word, or `unhealthy`; `hash` our mark, `type` the deployment type whose driver showed it, `device_id`"
    " the child device it was made for, `started` Unix seconds where they are shown, `health` the engine's"
    " word where there is a check, `owner` who made it, as far as a label says so.",
    "", 0, "", "")
Claim = define("Claim", "owner owners deployments ids images",
    "By what a workload is ours: the owner that this agent is, all that it was, and what its state tells of:"
    " keys of deployments and ids of containers, see is_ours; and the state's `pulled`.", ())
Action = define("Action", "deployment_id verb reason target device_id culprit",
    "One step of a plan: a word of EXECUTE, or `keep`, and why; the Target, where it is wanted; the device it"
    " is done on; culprit: (component, service) that is repaired in vain.", None, "", None)
Clock = define("Clock", "now boot uptime",
    "A moment: Unix seconds by the wall clock; by the clock that nobody sets, the id of this boot and the"
    " seconds since.")
Device = define("Device", "device_id settings drivers silence",
    "A device on which workloads run: its id, its part of the configuration, {deployment type: driver}; of"
    " another one than this: the ComponentError that the WFM is told where it does not answer.", None)
Seen = define("Seen", "containers drivers silent",
    "What a device shows now: [Container], {deployment type: driver} of what answers, and {deployment type:"
    " CommandError} of what does not.")
Outcome = define("Outcome", "code result detail delay",
    "How a cycle went: exit code, the word of `lastPoll.result`, detail for people, seconds to the next one.")

NOBODY = Claim("", (), (), ())
NOTHING = Seen((), {}, {})


# ----------------------------------------------------------------------------------------------------------
# 3. Agent
# ----------------------------------------------------------------------------------------------------------

class Agent:
    """The client of one WFM.  `Agent(config).cycle()` is all that a supervisor of your own needs to call.

    config: what load_config returns.  stopping: a function that says whether to end after the current step.
    """

    def __init__(self, config, stopping=lambda: False):
        self.config, self.stopping = config, stopping
        self.store = Store(config.state_dir)
        self.device_id = get_device_id(config.device)
        self.devices = load_devices(config, self.device_id)
        self.hold(make_state())
        self.source = None                          # connected when the WFM is first needed
        self.seen = {}                              # {device id: Seen} of the last look
        self.asked = False                          # whether a person asks for an SVID, by `enroll`
        self.starting = 0                           # seconds until the first contact since the device started

    def hold(self, state):
        """From now on this state counts, also for the profile."""
        self.state = state
        self.profile = PROFILES[self.config.wfm.profile](self.config, self.store, state)

    def cycle(self):
        """One cycle: every step in turn.  Returns an Outcome, which tells what went wrong.

        Raises Locked where another instance works, StorageError where the state cannot be read.
        """
        with self:
            for step in STEPS:
                try:
                    step(self)
                except FAULTS as error:
                    self.note_fault(to_fault(error))
            return self.conclude()

    def __enter__(self):
        """Takes the state directory for this process and reads the state."""
        HURRY.clear()
        self.store.create()
        self.store.lock()
        empty_folder(self.store.path("tmp"))
        try:
            self.hold(self.store.load_state())
        except BaseException:                       # whoever embeds this may try again
            self.store.unlock()
            raise
        MUTE.update(map(tuple, self.store.load_memo().get("mute", ())))
        self.began = time.time()
        self.faults = []                            # what went wrong in this cycle
        self.polled = False                         # whether the source has told the desired state
        self.silent = False                         # whether the WFM is not spoken to any more in this cycle
        self.changed = False                        # whether this cycle had something to do
        return self

    def __exit__(self, *_):
        self.store.load_memo()["mute"] = sorted(MUTE)
        self.store.save_memo()
        self.store.unlock()
        self.source = None

    def connect(self, keep=True):
        """The source of the desired state, connected when it is needed; raises Untrusted, Unreachable."""
        if self.source is None:
            self.source = self.profile.connect(keep)
        return self.source

    def check_patience(self, spread=True):
        """Raises Silence where nobody is to be asked now; spread: or where a fleet may just be starting."""
        clock = get_clock()
        self.starting = 0
        if spread and not find_wait(self.state["patience"], clock):
            known = self.state["accepted"]
            self.starting = load_start(self.store, self.config.poll, known, clock, get_random())
        silence = find_silence(self.state["patience"], self.is_downtime(), self.starting, clock)
        if silence:
            raise silence

    def is_downtime(self):
        """Whether the operator wants no communication now."""
        return is_within(self.config.poll.downtime, time.localtime())

    def note_fault(self, error):
        """Logs what went wrong, and keeps what follows from it: a back-off, and silence for this cycle.

        One time-out a cycle is enough, and without an SVID there is nothing to speak with.
        """
        self.faults.append(error)
        final = isinstance(error, (Unreachable, Untrusted))
        self.silent = self.silent or final or isinstance(error, Refused) and bool(error.retry_after)
        if isinstance(error, Silence):
            log_wait(error.message)
            return
        stored = self.store.find_time()
        if isinstance(error, Untrusted) and time.time() < stored:   # no verdict on certificates is one (P-2)
            error.code = "CLOCK"
            error.message += f"; {make_clock_fault(time.time(), stored)}"
        log("error", error.message, code=error.code)
        if final or isinstance(error, Refused):
            clock = get_clock()._replace(now=self.began)
            self.state["patience"] = make_patience(self.state["patience"], error, clock, get_random())

    def exchange(self):
        """Speaks with the WFM.  One that does not take what is reported is polled all the same (P-9)."""
        if self.silent:
            return
        self.check_patience()
        self.connect()
        if self.report_capabilities():
            self.flush_outbox()
        window = self.config.poll.window
        if window and not is_within(window, time.localtime()):
            log_wait("outside poll.window: the WFM is not asked for anything new")
            return
        desired = self.fetch_desired()
        self.state["patience"] = {}
        if desired:
            self.accept(desired)
            self.changed = True

    def fetch_desired(self):
        """The Desired that the source has; None where nothing changed.

        An ETag that alone is new is kept in memory: two servers behind one name may differ in it (P-16).
        """
        load = self.store.load_artifact
        memo = self.store.load_memo()
        accepted = self.state["accepted"]
        if accepted:
            etag = memo.get("etags", {}).get(accepted["digest"], accepted["etag"])
            needed = [target.digest for target in list_targets(accepted)
                      if needs_document(target, self.state["deployments"].get(target.key))]
            lost = None in map(load, needed)        # it is fetched again (D-9)
            accepted = dict(accepted, etag=etag, incomplete=lost)
        desired = self.source.fetch_desired(accepted, load)
        if accepted and not desired and accepted["etag"] != etag:
            memo["etags"] = {accepted["digest"]: accepted["etag"]}
        self.polled = True
        return desired

    def report_capabilities(self, always=False):
        """PUTs capabilities, before anything else and where they changed; see report_devices."""
        documents = load_capabilities(self.devices, self.config)
        return report_devices(documents, self.source, self.state, always)

    def accept(self, desired):
        """Makes a verified desired state the accepted one, durable: first its documents, then it (C-111)."""
        state = self.state
        at = make_time(time.time())
        accepted = make_accepted(desired, at)
        self.check_removals(accepted, state["deployments"])
        for digest, data in desired.documents.items():
            self.store.save_artifact(digest, data)
        state["waiting"] = None
        state["history"] = make_history(state, desired, at)
        state["accepted"] = accepted
        for target in list_targets(accepted):
            record = state["deployments"].get(target.key)
            if record and record["adopted"]["digest"] == target.digest and record["state"] not in GOING:
                record["adopted"]["version"] = target.version       # the new manifest defines it, too (E-113)
                enqueue_status(state, record)
        self.store.save_state(state)
        log("info", "desired state accepted", version=desired.version, deployments=len(desired.entries))

    def check_removals(self, accepted, keys):
        """Raises Waiting where a manifest removes more than is allowed and no second poll confirmed it.

        accepted: as make_accepted returns it.  keys: of the deployments that are there.
        """
        limit = self.config.policy.max_removals
        removed = [key for key, record in self.state["deployments"].items() if record["state"] == "removed"]
        gone = set(keys).difference(removed, [target.key for target in list_targets(accepted)])
        confirmed = self.polled and self.state["waiting"] == accepted["digest"]
        if limit is not None and len(gone) > limit and not confirmed:
            self.state["waiting"] = accepted["digest"]
            raise Waiting(f"version {accepted['version']} would remove {len(gone)} deployments,"
                          f" policy.max_removals is {limit}; nothing is done until the next poll confirms it")

    def decide(self, accepted, load_document):
        """What to do so that what was accepted runs: [Action].  Agent.seen keeps what there is now.

        The documents of what is not as it should be are read, and it is decided again: another device may
        have to run it.
        """
        runtime = self.config.runtime
        mark = make_mark(runtime.environment)
        records = dict(self.state["deployments"])
        ids = [device.device_id for device in self.devices]
        for key, record in records.items():
            if record["deviceId"] not in ids:       # what was on a device that has gone begins anew, here
                state = "removed" if record["state"] == "removed" else "pending"
                records[key] = dict(record, deviceId=self.device_id, state=state)
        targets = [read_target(target, load_document, self.config)
                   if needs_document(target, records.get(target.key)) else target
                   for target in list_targets(accepted)]
        new = [begin_record(make_record(target, ""), target) for target in targets if target.deployment]
        claim = obtain_claim(self.profile, self.device_id)
        self.seen = observe_devices(self.devices, [*records.values(), *new], claim)
        while True:
            offers = {}
            if any(target.deployment and target.deployment.constraints for target in targets):
                offers = load_capabilities(self.devices, self.config)
            placed = place_targets(targets, records, self.devices, self.seen, offers)
            actions = make_plan(placed, records, self.devices, self.seen, get_clock(), runtime.settle, mark,
                                self.is_downtime())
            frees = any(action.verb in ("update", "remove") for action in actions)
            stuck = [key for key, record in records.items() if frees and record["retry"].get("delay")
                     and record["state"] == "failed" and record["error"]["code"] == "PORT_IN_USE"]
            for key in stuck:                       # the port may be given up: it does not wait any longer
                records[key] = dict(records[key], retry={})
            unread = {action.key for action in actions
                      if action.verb in CHANGES and not action.target.deployment}
            if not unread and not stuck:
                return actions
            targets = [read_target(target, load_document, self.config) if target.key in unread else target
                       for target in targets]

    def reconcile(self, accepted=None):
        """Makes what runs match what was accepted.

        An engine that does not answer is not an empty one: it is left alone, and CommandError says so (D-16).
        """
        accepted = accepted or self.state["accepted"]
        if not accepted:
            return                                  # what runs is left alone until a WFM says what should
        actions = self.decide(accepted, self.store.load_artifact)
        records = self.state["deployments"]
        if "digest" in accepted:                    # what no record tells of is counted here (F-32)
            removed = {action.key for action in actions if action.verb == "remove"}
            self.check_removals(accepted, removed.difference(records))
        new = [action for action in actions
               if action.target and not action.target.error and action.key not in records]
        for action in new:                          # received, not started (protocol 5.1)
            record = begin_record(make_record(action.target, action.device_id), action.target)
            there = find_containers(action.deployment_id, self.seen[action.device_id].containers)
            records[action.key] = dict(record, found=bool(there))   # of a lost state
            enqueue_status(self.state, records[action.key])
        if new:
            self.store.save_state(self.state)
        actions = [action for action in actions if action.verb != "keep"]
        if actions:
            self.prune()                            # before anything is pulled, too (P-5)
        troubles = self.carry_out(actions, accepted["version"]) + self.list_silent()
        for sight in () if self.changed else self.seen.values():
            for driver in sight.drivers.values():
                driver.tend(sight.containers, get_random())
        if self.changed:
            self.prune()
        if troubles:
            raise CommandError(f"{'; '.join(dict.fromkeys(troubles))}; what runs there is left as it is")

    def list_silent(self):
        """What did not answer at the last look, in words."""
        words = []
        for device in self.devices:
            name = f"child device {device.device_id}: " if device.silence else ""
            silent = self.seen.get(device.device_id, NOTHING).silent
            words += [name + fault.message for fault in silent.values()]
        return words

    def prune(self):
        """Removes what neither the current nor the previous version of any deployment needs, where wished.

        These are artifacts, unpacked packages, and images that the agent pulled, on what answers: nothing
        else on the device.  Nothing goes while something runs of which a lost state knew more.
        """
        found = any(record["found"] for record in self.state["deployments"].values())
        if found or not self.config.runtime.prune:
            return
        needed = find_needed(self.state)
        try:
            self.store.prune_artifacts(needed)
            for entry in self.state["pulled"]:
                device_id, _, name = entry.rpartition(" ")
                drivers = self.seen.get(device_id or self.device_id, NOTHING).drivers.values()
                if name not in needed and any(driver.remove_image(name) for driver in drivers):
                    log("info", "image pruned", image=entry)
                    self.state["pulled"] = [other for other in self.state["pulled"] if other != entry]
        except (CommandError, StorageError, OSError) as error:
            self.note_fault(to_fault(error))        # that is no reason to leave workloads alone

    def carry_out(self, actions, version):
        """Carries out a plan, group by group; returns what went wrong and fails no deployment, in words."""
        records = self.state["deployments"]
        troubles = []
        for group in make_groups(actions, records):
            ready = {}
            for action in group:
                self.check_stopping()
                step = self.begin(action, version, troubles)
                if action.verb in CHANGES:          # it stands aside where it was, before it starts here
                    step.before = [self.begin(action._replace(verb="clear", target=None, device_id=home),
                                              version, troubles)
                                   for home, sight in self.seen.items() if home != action.device_id
                                   and find_containers(action.deployment_id, sight.containers)]
                if self.advance(step):
                    ready[action.key] = step
            stopped = False
            while ready:
                if not stopped:                     # what was stopped for another one starts again first
                    self.check_stopping()
                waiting = {key: (step.takes, step.holds) for key, step in ready.items()}
                held = {key: find_held_ports(records[key]) for key in records.keys() - ready}
                key, *turn = find_turn(waiting, held)
                if turn[0] == "stop":
                    ready[key].holds = set()
                    stopped = True
                if not self.advance(ready[key], turn):
                    ready.pop(key)
        return troubles

    def check_stopping(self):
        """Raises Interrupted where the process was asked to end."""
        if self.stopping():
            raise Interrupted("ended before everything was done; the next run goes on from here")

    def begin(self, action, version, troubles):
        """The Step of an action, before anything of it is done."""
        target = action.target
        record = self.state["deployments"].get(action.key)
        home = record and record["deviceId"]
        holds = find_held_ports(record) if record else set()
        if record and home not in self.seen:
            log("warning", "its device is no longer configured; what runs there is forgotten",
                deployment=action.deployment_id, device=home)
        if not record or target and home != action.device_id:
            record = make_record(target or Target(action.deployment_id, ""), action.device_id)
        if action.verb == "clear":
            record = dict(record, deviceId=action.device_id, components=[])
        return Step(action=action, record=record, holds=holds, sight=self.seen[action.device_id],
                    config=self.config, store=self.store, version=version, troubles=troubles)

    def advance(self, step, turn=None):
        """Carries on with a step until it is done, or ready to change what runs; returns whether it is ready.

        Every change of a record is durable, and told where the WFM can be told, before the next one.  turn:
        the verb and the words of find_turn, for a step that was ready.
        """
        action = step.action
        try:
            item = step.course.send(turn)
            while not isinstance(item, set):
                if not step.begun:
                    log("info", PRINTED.get(action.verb, action.verb), deployment=action.deployment_id,
                        reason=action.reason)
                step.begun = self.changed = True
                if item:
                    self.keep(step, item)
                item = next(step.course)
        except StopIteration:
            record = self.state["deployments"].get(action.key)
            if step.begun and record and action.verb != "clear":
                level, why = "info", {}
                if record["state"] == "failed":
                    level = "error"
                    why = {"code": record["error"]["code"], "reason": make_failure_words(record)}
                log(level, record["state"], deployment=record["deploymentId"], name=record["name"], **why)
            return False
        step.takes = item
        return True

    def keep(self, step, record):
        """Makes a record durable, with what was fetched for it, and tells the WFM."""
        device_id = step.action.device_id
        prefix = "" if device_id == self.device_id else f"{device_id} "
        images = {prefix + name for name in step.fetched if not re.fullmatch(DIGEST_PATTERN, name)}
        self.state["pulled"] = sorted(images.union(self.state["pulled"]))
        if record["state"] not in ("installed", "removed"):     # the next attempt finds it here (P-15)
            record = dict(record, fetched=sorted({*record["fetched"], *step.fetched}))
        self.state["deployments"][step.action.key] = record
        enqueue_status(self.state, record)
        self.store.save_state(self.state)
        self.silent |= not self.flush_outbox()      # one time-out is enough

    def flush_outbox(self):
        """Sends every status that waits and is due, oldest first; whether the WFM could be reached."""
        state = self.state
        for key, status in list(state["outbox"].items()):
            clock = get_clock()
            if self.silent or not self.source:
                return True
            if find_wait(state["waits"].get(key, {}), clock):
                continue
            try:
                self.source.post_status(status["deploymentId"], status)
                acknowledge_status(state, key)
            except (Refused, Unreachable, Untrusted, StorageError, OSError) as fault:
                error = to_fault(fault)
                words = put_off_status(state, key, error, clock, get_random())
                waits = key in state["outbox"]
                log("warning" if waits else "error", words, deployment=key, reason=error.message)
                self.faults += [error] if waits else []
                answered = error.status or isinstance(error, Refused)
                if error.retry_after or not answered:
                    return answered                 # the others come next time
        return True

    def conclude(self):
        """The Outcome of a cycle, kept where `status` finds it; writes the disk only if something changed."""
        state = self.state
        fault = max(self.faults, key=lambda fault: fault.exit, default=None)
        failed = any(record["state"] == "failed" for record in state["deployments"].values())
        silence = fault and not fault.exit          # the operator's own, which is no fault
        waits = (state["outbox"] or state["waits"]) and not silence
        detail = fault.message if fault else ""
        code = max(fault.exit if fault else 0, 1 if failed else 0, 3 if waits else 0)
        result = "applied" if self.changed else "unchanged"
        if fault and not silence:
            result = fault.result
        elif failed:
            result = "failed"
        note_outcome(state, fault)
        memo = self.store.load_memo()
        memo["lastPoll"] = last = {"at": make_time(self.began), "result": result, "detail": detail}
        if self.seen:
            known = None if self.changed else memo.get("others")
            memo["others"] = ask_others(self.seen, known)[:MAX_NAMED]
        try:
            if make_state_data(state) != self.store.saved:
                state["lastPoll"] = last
                self.store.save_state(state)
        except StorageError as error:
            log("error", error.message, code=error.code)
            code = max(code, error.exit)
        return Outcome(code, result, detail, make_delay(self.config, state, fault, get_clock(), get_random()))


# What a cycle does, in order: functions of the Agent.  A MargoError ends that step alone.
STEPS = [Agent.exchange, Agent.reconcile, Agent.flush_outbox]


# ----------------------------------------------------------------------------------------------------------
# 4. Plan
# ----------------------------------------------------------------------------------------------------------

# What `plan` calls a verb, where not by its own name.
PRINTED = {"restore": "update", "give_up": "refuse", "clear": "remove"}


def needs_document(target, record):
    """Whether a target can be decided on only by its document: not where it is installed, or has failed."""
    if record is None or record["adopted"]["digest"] != target.digest or record["refused"]:
        return True
    return record["state"] not in ("installed", "failed")


def make_plan(targets, records, devices, seen, clock, settle=0, mark="", quiet=False):
    """[Action] for all devices: removals first, to free what they hold, then the manifest's own order.

    targets: as place_targets returns them, deployment and error both None where needs_document said so.
    records: {key: record}, each at home on one of the devices.  devices: [Device].  seen: {device id: Seen}.
    clock: a Clock.  settle, mark: `runtime.settle` and make_mark of `runtime.environment`.  quiet: whether it
    is downtime.
    What a deployment has left on another device than its own is cleared once it runs where it belongs.
    """
    wanted = {target.key: target for target in targets}
    silences = {device.device_id: device.silence for device in devices}
    there = {(record["deviceId"], key): [] for key, record in records.items()
             if record["state"] != "removed" and key not in wanted}
    for home, sight in seen.items():
        for container in sight.containers:
            there.setdefault((home, container.key), []).append(container)
    removals, actions = [], []
    settled = set()             # what runs where it belongs; where it is about to, its step clears the others
    for key, target in wanted.items():
        home = target.device_id
        before = records.get(key)
        record = before if before and before["deviceId"] == home else None
        fault = find_fault(seen[home], record, target)
        containers = there.pop((home, key), [])
        shown = None if fault else containers
        verb, reason, *culprit = find_action(target, record, shown, clock, settle, mark, quiet)
        if not record and before and before["running"] and verb == "install":
            reason = f"moves here from {before['deviceId']}"
        action = Action(target.deployment_id, verb, reason, target, home, *culprit)
        actions.append(hold_back(action, silences[home], record, fault))
        if record and record["state"] == "installed" and verb not in CHANGES and not target.error:
            settled.add(key)
    for home, key in sorted(there):
        target = wanted.get(key)
        record = records.get(key)
        here = record if record and record["deviceId"] == home and not target else None
        named = record["deploymentId"] if record else there[home, key][-1].deployment_id
        reason = f"belongs on {target.device_id}" if target else "not in the desired state"
        action = Action(named, "clear" if target or record and not here else "remove", reason, None, home)
        failed = here and here["state"] == "failed" and "leaving" in here["retry"]
        if failed and find_wait(here["retry"], clock):
            words = f"cannot be removed ({here['error']['code']}); {make_due(here, clock)}"
            action = action._replace(verb="keep", reason=words)
        if not target or key in settled:
            removals.append(hold_back(action, silences[home], here, find_fault(seen[home], here)))
    return removals + actions


def find_action(target, record, containers, clock, settle, mark, quiet):
    """What to do about one deployment that is wanted, and why: (verb, reason), see EXECUTE.

    Where it was repaired in vain, what was repaired is the third: (component, service).  containers: its own,
    None where they cannot be seen.  In downtime (quiet) nothing is fetched (protocol 10), and the version
    before goes on.
    """
    record = record or make_record(target, "")
    running = record["running"]
    versions = [version["digest"] for version in (running, record["previous"]) if version]
    quiet = quiet and target.digest not in versions
    state = record["state"]
    same = record["adopted"]["digest"] == target.digest
    # A removal that failed says nothing of a deployment that is wanted again.
    retry = 0 if "leaving" in record["retry"] else find_wait(record["retry"], clock)
    pause = find_wait(record["repair"], clock) if same else 0   # another revision, another count
    waits = quiet or same and state == "failed" and (target.error or retry)
    before = record["fallback"] or running and not same         # whether it runs while this one waits
    if waits and before and not pause:
        words = find_drift(list_running(record), containers, clock.now, settle)[1]
        if words:
            return "restore", f"drift: {words}; the version before is brought back"
    if target.error:
        return "refuse", make_refusal(target.error)
    if quiet:
        return "keep", "downtime: nothing is fetched"
    change = "update" if running else "install"
    if not same:
        return change, "another revision"
    if record["refused"]:
        return change, "was refused before, and can be carried out now"
    if state == "failed" and retry:
        return "keep", f"failed ({record['error']['code']}); {make_due(record, clock)}"
    if state == "failed":
        return change, f"failed before, attempt {record['retry'].get('failures', 0) + 1}"
    if state in ("pending", "removed") and not running:
        return "install", "new"
    if state != "installed":
        return change, f"was interrupted while {state}"
    culprit, words = find_drift(list_parts(record, "services"), containers, clock.now, settle)
    if words and pause:
        words += f" although it was repaired {record['repair'].get('failures', 0)} times"
        return "give_up", f"{words}; next attempt at {make_time(clock.now + pause)}", culprit
    if words:
        return "update", f"drift: {words}"
    if record["type"] == "compose" and running.get("mark", mark) != mark:
        return "update", "runtime.environment has changed"
    return "keep", "as desired"


def find_drift(services, containers, now, settle):
    """The first service that is not as it was installed: ((component, service), what is wrong) (P-12, D-23).

    ("", "") where all are.

    services: {component: {service: facts}}; containers: those of this deployment, or None.
    """
    if containers is None:
        return "", ""
    seen = {}
    for container in containers:
        seen.setdefault((container.component, container.service), []).append(container)
    for component, items in services.items():
        for service, facts in items.items():
            words = judge_containers(seen.pop((component, service), []), facts, now, settle)
            if words:
                return (component, service), f"{component}/{service} {words}"
    return (min(seen), f"{'/'.join(min(seen))} does not belong to it") if seen else ("", "")


def judge_containers(found, facts, now, settle):
    """What is wrong with the containers found for a service, in words, or "".

    facts: what `apply` returned for it.
    """
    if len(found) > 1:
        return f"has {len(found)} containers"
    if not found:
        return "" if facts["finished"] else "has no container"
    container = found[0]
    if container.hash != facts["hash"] or container.id != facts.get("id", container.id):
        return "is not the container that was made for it"
    if facts["finished"]:
        return ""
    if container.state != "running":
        return f"is {container.state}"
    restarted = abs(container.started - facts.get("started", container.started)) > 2        # docker rounds it
    return "is being restarted over and over" if restarted and 0 <= now - container.started < settle else ""


# ----------------------------------------------------------------------------------------------------------
# 5. Apply
# ----------------------------------------------------------------------------------------------------------

Change = define("Change", "event name record deployment rollback kind",
    "What listeners are told of: install, update or removal of the component `name`; rollback: on the way"
    " back to the version before; kind: its deployment type.")
# Functions (before or after, Change, Step, error or None) of optional rooms; `before` may raise
# ComponentError, which says no to the change.
LISTENERS = []


def tell_listeners(moment, change, step, error=None):
    """Tells every listener of a change, before or after it."""
    for listener in LISTENERS:
        listener(moment, change, step, error)


class Step:
    """One action under way.

    action, record      the Action, and what its deployment's record says now
    takes, holds        ports of the host that it will take, and that it holds, see find_held_ports
    sight               what its device shows: Seen
    config, store       Settings and Store
    version             the accepted version
    troubles            a list for what goes wrong and fails no deployment, in words
    course              the generator that carries it out, see EXECUTE
    before, removal     Steps that clear what moves here, where it was; what such a one runs
    fetched             digests of packages and names of images that it has fetched
    begun               whether it has changed something
    name                the component that is worked on, or None
    touched, services   whether anything was touched that runs, and {component: {service: facts}} of what
                        was made to run
    """

    def __init__(self, **facts):
        vars(self).update(facts)
        self.course = EXECUTE[self.action.verb](self)
        self.removal = self.run(make_nothing(self.record), (), {}, {})
        self.before = []
        self.fetched = []
        self.takes = set()
        self.services = {}
        self.name = None
        self.begun = self.touched = False

    def get_driver(self, kind):
        """The driver for a deployment type; raises ComponentError UNSUPPORTED_TYPE."""
        if kind not in self.sight.drivers:
            raise ComponentError("UNSUPPORTED_TYPE", f"nothing on this device runs {kind} components; see"
                                 f" runtime.{kind} and runtime.engine")
        return self.sight.drivers[kind]

    def load_deployment(self, digest):
        """The Deployment of a revision; raises ComponentError where its document is lost, or none."""
        target = Target(self.action.deployment_id, digest)
        target = read_target(target, self.store.load_artifact, self.config)
        if target.error:
            raise target.error
        return target.deployment

    def look(self):
        """Looks anew at what there is of the deployment; raises CommandError."""
        containers = []
        for kind, driver in self.sight.drivers.items():
            if is_asked(kind, self.record):
                containers += driver.observe([self.record])
        self.sight = self.sight._replace(containers=containers)

    def find_containers(self):
        """[Container] of the deployment."""
        return find_containers(self.record["deploymentId"], self.sight.containers)

    def list_dropped(self, deployment, components, rollback):
        """[Change] for what there is of the deployment and is not wanted, last component first (D-19).

        The engine is asked, and the memory only where nothing is wanted: something may be there that is no
        container.
        """
        record = self.record
        kind = record["type"]
        here = record["deviceId"] == self.action.device_id      # else its device is forgotten
        known = [(item["name"], kind) for item in reversed(record["components"])
                 if item["state"] != "pending" and (kind in self.sight.drivers or here and item["services"])]
        known = [] if components else known
        wanted = [(component.name, deployment.type) for component in components]
        there = {(item.component, item.type) for item in self.find_containers()}.difference(wanted, known)
        return [Change("removal", name, record, deployment, rollback, kind)
                for name, kind in sorted(there) + known]

    def prepare(self, deployment, components, packages, rollback):
        """Fetches and verifies everything, and touches nothing that runs.

        Returns [(component, driver, workload, package)] and [Change].
        """
        prepared, changes = [], []
        for component in components:
            self.name = component.name
            driver = self.get_driver(deployment.type)
            known = packages.get(self.name)
            workload, package = driver.prepare(deployment, component, known, self.store, self.fetched)
            prepared.append((component, driver, workload, package))
            event = "update" if rollback or known else "install"
            changes.append(Change(event, self.name, self.record, deployment, rollback, deployment.type))
        return prepared, changes + self.list_dropped(deployment, components, rollback)

    def run(self, deployment, components, packages, services, rollback=False):
        """Makes these components run, and nothing else of their deployment.

        All that can fail or say no comes first: everything is fetched and verified, and every listener agrees
        (D-11, P-20).  Then it waits for its turn.  After that it yields the record at each change, which the
        caller makes durable before the next one.  packages, services: what is known of the version,
        {component: package} and {component: {service: facts}}.  rollback: it is the way back from a failure;
        nobody is asked, and nothing is yielded.
        """
        if rollback:
            self.look()
        prepared, changes = self.prepare(deployment, components, packages, rollback)
        agreed = []
        try:
            for change in changes:
                self.name = change.name
                self.get_driver(change.kind)        # what it drove may run still
                tell_listeners("before", change, self)
                agreed.append(change)
            self.name = None
            if not rollback:
                yield from self.take_turn(prepared)
            for component, driver, workload, package in prepared:
                self.name = component.name
                if not rollback:
                    self.record = set_component(self.record, self.name, "installing")
                    yield self.record
                self.touched = True
                deadline = time.monotonic() + component.timeout
                facts = driver.apply(workload, self.sight.containers, services.get(self.name, {}), deadline)
                self.services[self.name] = facts
                tell_listeners("after", agreed.pop(0), self)
                self.record = set_component(self.record, self.name, "installed", package=package,
                                            services=facts)
                if not rollback and self.record["state"] != "installed":    # said once nothing else is left
                    yield self.record
            for change in changes[len(prepared):]:
                self.name = change.name
                deadline = time.monotonic() + COMPONENT_TIMEOUT
                self.get_driver(change.kind).remove(deployment.deployment_id, self.name,
                                                    self.sight.containers, deadline)
                tell_listeners("after", agreed.pop(0), self)
                if not components:
                    self.record = set_component(self.record, self.name, "removed")
                    if not rollback and self.record["state"] != "removed":
                        yield self.record
        except FAULTS as error:
            for change in agreed:
                tell_listeners("after", change, self, to_fault(error))
            raise

    def take_turn(self, prepared):
        """Waits until it is this step's turn to change what runs, see find_turn.

        Where others wait for its ports, it stops what holds them first.  What moves here is stopped where it
        was: it never runs in two places.
        """
        verb = "stop"
        takes = {(self.action.device_id, *port)
                 for _, driver, workload, _ in prepared for port in driver.list_ports(workload)}
        while verb == "stop":
            verb, words = (yield takes) or ("go", "")
            if verb == "fail":
                raise ComponentError("PORT_IN_USE", words)
            for other in () if self.touched else self.before:
                other.stand_aside([item for _, driver, _, _ in prepared for item in driver.beside])
                self.touched = True
            ids = [facts["id"] for facts in list_facts(self.record) if facts.get("ports")]
            if verb == "stop" and ids:
                self.touched = True
                driver = self.get_driver(self.record["running"]["type"])
                driver.stop(ids, time.monotonic() + COMPONENT_TIMEOUT)
                self.look()

    def clear(self):
        """Removes what the deployment has where it is not at home; no deployment fails by that."""
        try:
            list(self.removal)
        except TROUBLE as error:
            self.troubles.append(to_fault(error).message)

    def stand_aside(self, beside):
        """Stops what moves away from here, once every listener agrees to its removal; see clear and stay.

        beside: ids of what the engine where it goes shows of other devices: one engine has to be cleared
        first.
        """
        next(self.removal)
        there = self.find_containers()
        try:
            for kind, driver in self.sight.drivers.items():
                ours = [container for container in there if container.type == kind]
                driver.stop(list_active(ours), time.monotonic() + COMPONENT_TIMEOUT)
        except TROUBLE as error:
            self.troubles.append(to_fault(error).message)
        if any(container.id in beside for container in there):
            self.clear()

    def stay(self):
        """Lets what has stood aside run again, and tells listeners; what came of it, in words."""
        try:
            self.removal.throw(ComponentError("INSTALL_FAILED", "it does not run where it was to move"))
        except ComponentError:
            return self.bring_back()

    def bring_back(self):
        """Lets run again what ran before, as it was; what came of it, in words."""
        there = self.find_containers()
        driver = self.get_driver(there[0].type)
        return driver.bring_back(there, time.monotonic() + COMPONENT_TIMEOUT)

    def fail(self, error, refused=False):
        """The record after a ComponentError: of the component that is worked on, or else of all."""
        names = [item["name"] for item in self.record["components"]]
        name = self.name if self.name in names else None
        return fail_record(self.record, name, error, get_clock(), get_random(), refused)

    def undo(self, deployment=None):
        """Brings the version before back, or takes away what was begun; what came of it, in words."""
        before = self.record["running"]
        try:
            if before:
                self.services = {}
                old = self.load_deployment(before["digest"])
                list(self.run(old, old.components, before["packages"], before["services"], rollback=True))
                log("warning", "rolled back; the version before runs again",
                    deployment=self.record["deploymentId"], digest=before["digest"])
                self.record = dict(self.record, running=dict(before, services=self.services))
                return "the version before runs again"
            if self.find_containers() and self.record["found"]: # what ran before, of a lost state
                return self.bring_back()
            list(self.run(deployment, (), {}, {}, rollback=True))
            self.record = set_component(self.record, None, "pending", services={})
            words = [other.stay() for other in self.before]
            return "; ".join(filter(None, words)) or "it is taken back until the next attempt"
        except TROUBLE as error:
            words = f"going back failed too: {to_fault(error).message}"
            log("error", words, deployment=self.record["deploymentId"])
            return words


def apply_install(step):
    """Makes one deployment as its target says, new or not.

    After a failure the version before runs again, where runtime.on_failure says so (P-8), and the record says
    both.
    """
    target, record = step.action.target, step.record
    deployment = target.deployment
    packages = list_parts(record, "package")
    services = list_parts(record, "services")
    running = record["running"]
    if running and running["digest"] == target.digest == record["adopted"]["digest"]:
        record = count_repair(record, get_clock())
    step.record = begin_record(record, target)
    yield step.record
    try:
        yield from step.run(deployment, deployment.components, packages, services)
        for other in step.before:
            other.clear()
        yield finish_record(step.record, make_mark(step.config.runtime.environment))
    except TROUBLE as error:
        fault = to_fault(error)
        name = step.name
        words = fault.message
        code = fault.code if isinstance(fault, ComponentError) else "INSTALL_FAILED"
        code = "OUT_OF_MEMORY" if isinstance(fault, NoMemory) else code
        begun = step.record["state"] != "pending"               # else it has only freed its ports
        if step.touched and begun and step.config.runtime.on_failure != "rollback":
            step.record = dict(step.record, fallback=False)     # it is left as it is, for inspection
        elif step.touched and (step.record["fallback"] or not running):
            words = f"{words}; {step.undo(deployment)}"
        step.name = name
        yield step.fail(ComponentError(code, words, retry_after=fault.retry_after))


def apply_restore(step):
    """Mends the version before while another one waits for its next attempt; its error stays (P-1, P-12)."""
    record, target = step.record, step.action.target
    if record["adopted"]["digest"] != target.digest:
        record = begin_record(record, target)
    yield record
    step.record = count_repair(record, get_clock())
    step.undo()
    components = [dict(new, state=old["state"], error=old["error"])
                  for new, old in zip(step.record["components"], record["components"])]
    yield dict(step.record, state=record["state"], error=record["error"], components=components)


def apply_give_up(step):
    """Fails a deployment that was repaired in vain too often, and says how its log ends (P-6, P-7)."""
    record, culprit = step.record, step.action.culprit
    there = [item.id for item in step.find_containers() if (item.component, item.service) == culprit]
    step.name = culprit[0]
    try:                                            # without its document nobody knows what to mask
        deployment = step.load_deployment(record["adopted"]["digest"])
        secrets = make_variables(deployment, step.name).values()
        words = step.get_driver(deployment.type).tail_log((there or [""])[-1], secrets)
    except FAULTS:
        words = ""
    failed = step.fail(ComponentError("UNSTABLE", step.action.reason + words))
    yield dict(failed, retry=dict(record["repair"], failures=failed["retry"]["failures"]))


def apply_refusal(step):
    """Fails a deployment that cannot be what is wanted; what was said already is not said again."""
    record, target = step.record, step.action.target
    same = record["refused"] and record["adopted"]["digest"] == target.digest
    if not same or record["error"]["message"] != target.error.message:
        step.record = begin_record(record, target)
        yield step.fail(target.error, refused=True)


def apply_removal(step):
    """Removes all of a deployment, last component first.

    It counts as removed once the engine shows nothing of it any more (D-21).
    """
    record = step.record
    there = step.find_containers()
    if there and not record["components"]:          # the state was lost; they are still reported (C-131)
        found = [dict(BLANK, name=name) for name in sorted({item.component for item in there})]
        record = dict(record, type=there[0].type, components=found)
    adopted = dict(record["adopted"], version=step.version)
    step.record = dict(set_component(record, None, "removing"), error=None, adopted=adopted)
    yield step.record
    try:
        try:                                        # listeners are told of it
            deployment = step.load_deployment((record["running"] or record["adopted"])["digest"])
        except ComponentError:
            deployment = make_nothing(record)
        yield from step.run(deployment, (), {}, {})
        remove_folder(step.store.path("deployments", step.action.key))
    except TROUBLE as error:
        fault = to_fault(error)
        log("error", "removal failed", deployment=record["deploymentId"], component=step.name,
            reason=fault.message)
        code = fault.code if isinstance(fault, ComponentError) else "REMOVE_FAILED"
        failed = step.fail(ComponentError(code, fault.message))
        yield dict(failed, retry=dict(failed["retry"], leaving=True))
        return
    yield dict(set_component(step.record, None, "removed"), running=None, previous=None)


def apply_clearing(step):
    """Clears a device of what belongs elsewhere; where that cannot be done, no deployment fails."""
    yield None
    step.clear()


# Each verb of a plan but `keep`: a generator of a Step that carries it out.  It yields None or the record at
# each change.  Once all that can fail or say no has been done, and nothing is touched, it may yield the ports
# of the host that it will take (see find_held_ports), and is answered by the verb and the words of find_turn.
EXECUTE = {"install": apply_install, "update": apply_install, "restore": apply_restore,
           "give_up": apply_give_up, "remove": apply_removal, "clear": apply_clearing,
           "refuse": apply_refusal}


def make_nothing(record):
    """A Deployment that says no more than its record does."""
    return Deployment(record["deploymentId"], record["name"], "", "", record["type"], [], [], None)


# ----------------------------------------------------------------------------------------------------------
# 6. Deployment status
# ----------------------------------------------------------------------------------------------------------

def make_record(target, device_id):
    """The record of a deployment that was not known before; see begin_record for one that begins a revision.

    deviceId    the device where it is at home
    adopted     {digest, version}: the revision that is worked on
    components  [{name, state, error, services, package}]; state and error of the whole follow from theirs
    running     {digest, packages, images, mark, type} of the version that was installed last, and its
                {services} once another revision is worked on; previous: the same of the one before
    fallback    whether `running` is what should run while the revision that is worked on has failed
    refused     whether the revision cannot be one, whatever is tried
    found       whether something of it ran before it was known, as after the state was lost
    fetched     digests of packages and names of images that are there for the revision that is worked on
    retry       failures in a row (see make_wait), with `leaving` where it was its removal that failed
    repair      repairs without an hour's rest (P-7)
    """
    return {"deploymentId": target.deployment_id, "name": target.deployment_id, "deviceId": device_id,
            "type": "compose", "adopted": {"digest": target.digest, "version": target.version},
            "state": "pending", "error": None, "running": None, "previous": None, "refused": False,
            "components": [], "fetched": [], "fallback": False, "found": False, "retry": {},
            "repair": {}}


BLANK = {"services": {}, "package": None}           # of a component of which nothing else is known


def begin_record(record, target):
    """The record as work on a revision begins: all components pending, its version adopted (E-112, E-114).

    What an earlier revision left (services, packages) stays known until the new one has replaced it.
    """
    old = {component["name"]: component for component in record["components"]}
    names = [component.name for component in target.deployment.components] if target.deployment else list(old)
    components = [dict(old.get(name, BLANK), name=name, state="pending", error=None) for name in names]
    record = dict(record, state="pending", error=None, refused=False, components=components)
    if target.deployment:
        record.update(name=target.deployment.name, type=target.deployment.type or record["type"])
    before = record["adopted"]["digest"]
    running = record["running"]
    if before != target.digest:
        record.update(retry={}, repair={}, fetched=[])
        if running and running["digest"] == before:             # from here on it is the version before
            running = dict(running, services=list_parts(record, "services"))
    return dict(record, adopted={"digest": target.digest, "version": target.version}, running=running,
                fallback=bool(running and running["digest"] != target.digest))


def set_component(record, name, state, **facts):
    """The record with one component changed (None: all of them), its overall state following (C-133)."""
    components = [dict(item, state=state, error=None, **facts) if name in (None, item["name"]) else item
                  for item in record["components"]]
    states = [component["state"] for component in components] or [state]
    return dict(record, components=components, state=min(states, key=STATES.index))


def fail_record(record, component, error, clock, jitter, refused=False):
    """The record after a ComponentError: the component failed, and what comes after it stays pending.

    component: its name, or None where the deployment failed as a whole.  jitter: a number in [0, 1).
    """
    told = {"code": error.code, "source": error.source or record["name"], "message": error.message}
    components = [dict(item, state="failed", error=dict(told, source=error.source or item["name"]))
                  if component in (None, item["name"]) else item for item in record["components"]]
    if component:
        told.update(source=record["name"], message=f"component {component} failed: {error.message}")
    retry = make_retry(record["retry"], error.retry_after, clock, jitter)
    return dict(record, state="failed", error=told, refused=refused, retry=retry, components=components)


# What to do about a deployment that has failed, by the code of its error; README has the same table.
REMEDIES = {
    "PULL_FAILED": "see the registry's address, `registries.HOST.ca`, and whether the tag is there",
    "DIGEST_MISMATCH": "publish the package again",
    "ARCHIVE_INVALID": "publish the package again",
    "DISK_FULL": "free space on the device",
    "OUT_OF_MEMORY": "end other programs on the device",
    "INVALID_DEPLOYMENT": "mend the application's package or its deployment, and publish it again",
    "UNSUPPORTED_TYPE": "install what runs it: podman or docker, or helm",
    "PARAMETER_INVALID": "mend the parameter in the deployment, at the WFM",
    "POLICY_DENIED": "change the application, or allow it by the setting that is named",
    "NOT_ELIGIBLE": "deploy it to another device, or see `device.labels`",
    "INSUFFICIENT_CAPACITY": "deploy it to a larger device",
    "WRONG_DEVICE": "mend it at the WFM, or see `device.id`",
    "PORT_IN_USE": "stop what has the port, or let a parameter give another one",
    "NAME_TAKEN": "stop the other agent, or remove what it left behind",
    "INSTALL_FAILED": "put right what is said here; `logs NAME` shows more while it is up",
    "INSTALL_TIMEOUT": "mend the application, or give it more time by the component's `timeout`",
    "UNHEALTHY": "mend the application, or its health check",
    "UNSTABLE": "`logs NAME` shows why it stops again and again",
    "HOOK_FAILED": "do as the hook says, or see `hooks.run`",
    "REMOVE_FAILED": "see what the engine says",
}


def make_failure_words(record):
    """The error of a failed deployment, with what to do about it, in words."""
    error = record["error"]
    mend = REMEDIES.get(error["code"], "").replace("NAME", record["name"])
    return error["message"] + (f"; {mend}" if mend else "")


def finish_record(record, mark=""):
    """The record once all of its revision is installed.  mark: make_mark of its environment."""
    images = {facts["image"] for item in record["components"] for facts in item["services"].values()} - {""}
    running = {"digest": record["adopted"]["digest"], "packages": list_parts(record, "package"),
               "images": sorted(images), "mark": mark, "type": record["type"]}
    before = record["running"]
    previous = before if before and before["digest"] != running["digest"] else record["previous"]
    return dict(record, running=running, previous=previous, retry={}, fetched=[], fallback=False,
                found=False)


def make_status(record):
    """A DeploymentStatusManifest (protocol 3.6), with `error` only where there is one (C-131 to C-137)."""
    def tell(item, **more):
        """The state of the deployment, or of a component."""
        error = {"error": item["error"]} if item["error"] else {}
        return dict(more, state=item["state"], **error)

    return {"deploymentId": record["deploymentId"], "deviceId": record["deviceId"],
            "adoptedManifestVersion": record["adopted"]["version"], "status": tell(record),
            "components": [tell(component, name=component["name"]) for component in record["components"]]}


def enqueue_status(state, record):
    """Puts a record's status into the outbox, in place of an older one, unless the WFM has it (C-139)."""
    key = record["deploymentId"].lower()
    status = make_status(record)
    state["outbox"].pop(key, None)
    if state["reported"].get(key) != sha256_digest(make_json(status)):
        state["outbox"][key] = status
    else:
        state["waits"].pop(key, None)


def put_off_status(state, key, error, clock, jitter):
    """What becomes of a status that the WFM has not taken, in words: it waits longer each time (P-9).

    It is dropped where it is refused for good (400 and above), or is a `removed` that was answered by faults
    for a day: the WFM may not know the deployment.
    """
    wait = make_hold(state["waits"].get(key, {}), error, clock, jitter)
    removed = state["outbox"][key]["status"]["state"] == "removed"
    final = isinstance(error, Refused) and error.status >= 400
    if final or removed and 0 < wait["since"] <= clock.now - MAX_WAIT:
        acknowledge_status(state, key, error.message, make_time(clock.now))
        words = "refuses a status for good" if final else "has not taken a `removed` for a day"
        return f"the WFM {words}; it is dropped"
    state["waits"][key] = wait
    return "a status cannot be sent now and waits in the outbox"


def acknowledge_status(state, key, refused="", at=""):
    """The WFM has this status, or will never take it: `refused` says why, `at` when it said so.

    A removed deployment is forgotten with its last report.
    """
    status = state["outbox"].pop(key)
    state["waits"].pop(key, None)
    state["dropped"].pop(key, None)
    if refused:
        dropped = {"state": status["status"]["state"], "at": at, "reason": refused}
        state["dropped"] = dict(list(state["dropped"].items())[1 - HISTORY:], **{key: dropped})
    state["reported"][key] = sha256_digest(make_json(status))
    if status["status"]["state"] == "removed":
        state["reported"].pop(key)
        if state["deployments"].get(key, {}).get("state") == "removed":
            state["deployments"].pop(key)


# ----------------------------------------------------------------------------------------------------------
# 7. Devices
# ----------------------------------------------------------------------------------------------------------

def find_own_place(deployment, held, own_id, *_):
    """The id of the one device there is; arguments as find_place takes them.

    Raises ComponentError WRONG_DEVICE for what is meant for another one (protocol 9).
    """
    wanted = deployment.device_id or own_id
    if wanted != own_id:
        raise ComponentError("WRONG_DEVICE", f"metadata.deviceId is {wanted}, this device is {own_id}")
    return own_id


# What makes devices that the agent serves beside this one: functions of (Settings, own device id).
DEVICES = []
# What says on which device a deployment belongs, see find_own_place and find_place: the last one counts.
PLACES = [find_own_place]


def load_devices(config, own_id):
    """[Device] that the agent serves, this one first."""
    others = [device for load in DEVICES for device in load(config, own_id)]
    drivers = make_drivers(config, others=[device.device_id for device in others])
    return [Device(own_id, config.device, drivers), *others]


def find_reason(deployment, device, offers):
    """The ComponentError for which a deployment cannot run on a device, or None.

    offers: {device id: capabilities document}.
    """
    try:
        if deployment.type not in device.drivers:
            hint = "" if device.silence else f"; see runtime.{deployment.type} and runtime.engine"
            raise ComponentError("UNSUPPORTED_TYPE", f"nothing on {device.device_id} runs {deployment.type}"
                                 f" components{hint}")
        if deployment.constraints:
            check_eligibility(deployment.constraints, offers[device.device_id])
    except ComponentError as error:
        return error
    return None


def place_targets(targets, records, devices, seen, offers):
    """[Target], each with the device where it is at home, and with why it cannot run there.

    records: {key: record}, each at home on one of the devices.  devices: [Device], this one first.  seen:
    {device id: Seen}.  offers: {device id: capabilities document}, where a rule asks for one.
    """
    known = {device.device_id: device for device in devices}
    own_id, *children = known
    homes = {key: record["deviceId"] for key, record in records.items()}
    found = []
    for target in targets:
        home = homes.pop(target.key, None)
        error = target.error
        if target.deployment and not error:
            answers = {child: target.deployment.type not in seen[child].silent for child in children}
            reasons = {name: find_reason(target.deployment, device, offers) for name, device in known.items()}
            try:
                home = PLACES[-1](target.deployment, home, own_id, answers, reasons, [*homes.values()])
                error = reasons[home]
            except ComponentError as fault:
                error = fault
        homes[target.key] = home or own_id
        found.append(target._replace(error=error, device_id=homes[target.key]))
    return found


def find_fault(sight, record, target=None):
    """The CommandError for which not all of a deployment can be seen on a device, or None.  sight: its Seen.
    """
    kinds = find_kinds(record, target).intersection(sight.silent)
    return sight.silent[max(kinds)] if kinds else None


def make_refusal(error):
    """A ComponentError as the reason for which nothing is done."""
    return f"{error.code}: {error.message}"


def hold_back(action, silence, record, fault):
    """The action, or what is done instead where not all can be seen: nothing is changed blindfold (D-16).

    On this device it waits.  Of another one the WFM is told that it does not answer: `silence`, see Device.
    """
    if not fault or action.verb in ("keep", "refuse"):
        return action
    if not silence:
        return action._replace(verb="keep", reason=f"waits ({action.reason}): {fault.message}")
    target = action.target or Target(action.deployment_id, **record["adopted"])
    return action._replace(verb="refuse", reason=make_refusal(silence), target=target._replace(error=silence))


def make_drivers(config, child=None, others=()):
    """{deployment type: driver} of what a device can run; arguments as make_compose_driver takes them.

    A driver has observe, check, ask_strangers, tail_log, tend, prepare, list_ports, apply, remove,
    remove_image, stop, bring_back and `beside`, see stand_aside; no other section knows what it drives.
    """
    drivers = {kind: make(config, child, others) for kind, make in DRIVERS.items()}
    return {kind: driver for kind, driver in drivers.items() if driver}


def obtain_claim(profile, device_id):
    """The Claim by which drivers tell what is this agent's; notes a new owner in the state.

    An identity that cannot be read now counts as the one before.
    """
    owners = profile.state["owners"]
    owner = owners[-1] if owners else ""
    try:
        owner = make_owner(profile.identify(), device_id)
    except Untrusted:
        pass
    if owner:
        before = [other for other in owners if other != owner]
        profile.state["owners"] = before[1 - HISTORY:] + [owner]
    return make_claim(owner, profile.state)


def is_asked(kind, *records):
    """Whether the driver of a type is asked what there is of some deployments.

    An engine always is, because there may be leftovers (P-11); a cluster, where one of them needs it.
    """
    return kind == "compose" or any(kind in find_kinds(record) for record in records)


def observe_devices(devices, records, claim):
    """{device id: Seen}: all engines are asked at once, and each is waited for up to its own limit.

    records: those of all deployments that are there, or will be.  claim: by what a workload is ours.
    """
    seen, looks = {}, []
    for device in devices:
        silent = {}
        if device.silence and not device.drivers:
            words = "the engine's command that its connection needs is not installed here"
            silent = dict.fromkeys(("compose", "helm"), CommandError(words))
        sight = seen[device.device_id] = Seen([], dict(device.drivers), silent)
        looks += [(sight, kind) for kind in device.drivers if is_asked(kind, *records)]

    def look(item):
        """What a driver shows, or the CommandError that it raises."""
        sight, kind = item
        known = [record for record in records if kind in find_kinds(record)]
        try:
            return sight.drivers[kind].observe(known, claim)
        except CommandError as error:
            return error

    answers = ask_all(look, looks) if looks[1:] else list(map(look, looks))
    for (sight, kind), answer in zip(looks, answers):
        if isinstance(answer, CommandError):
            sight.silent[kind] = answer
            sight.drivers.pop(kind)
        else:
            sight.containers.extend(answer)
    return seen


def ask_all(look, looks):
    """What `look` returns for each of some looks, all at once; what ends this process ends what they run."""
    from concurrent.futures import ThreadPoolExecutor, wait
    pool = ThreadPoolExecutor(LOOKS)
    try:
        futures = [pool.submit(look, item) for item in looks]
        while wait(futures, 0.2).not_done:
            pass                                    # a signal that comes just before a wait does not end it
        return [future.result() for future in futures]
    except BaseException:                           # ctrl-C, or the end of the grace
        HURRY.append(True)
        raise
    finally:
        pool.shutdown()


def ask_others(seen, known=None):
    """[{owner, deploymentId, name, type}] of workloads of other owners, as the last look has shown.

    seen: {device id: what has its drivers}.  known: an earlier list; then clusters are not asked again.
    """
    others = {item["name"]: item for item in known or () if item["type"] == "helm"}
    for device_id, sight in seen.items():
        for kind, driver in sight.drivers.items():
            try:
                found = driver.ask_strangers() if kind == "compose" or known is None else ()
            except CommandError as error:
                log("warning", "workloads of other owners cannot be named", device=device_id,
                    reason=error.message)
                continue
            for item in found:
                others[item.id] = {"owner": make_printable(item.owner), "name": item.name, "type": kind,
                                   "deploymentId": item.deployment_id}
    return list(others.values())


def find_kinds(record, target=None):
    """The deployment types whose drivers know of a deployment: as it is, as it ran last, as it will be."""
    kinds = {record["type"], (record["running"] or record).get("type", record["type"])} if record else set()
    return kinds | ({target.deployment.type} if target and target.deployment else set())


def make_others_words(others):
    """Each workload of another owner, in words."""
    return [f"{item['deploymentId']}  {item['name']} of {item['owner'] or 'no owner that is known'}"
            for item in others]


def make_mark(environment):
    """A short mark of `runtime.environment`, which a deployment's containers were given (C-185)."""
    return sha256_digest(make_json(environment))[7:23] if environment else ""


def find_needed(state):
    """{artifact's digest, image's name} that the desired state and the last two versions of all need (P-5).
    """
    needed = {item["digest"] for item in (state["accepted"] or {}).get("deployments", ())}
    for record in state["deployments"].values():
        needed.update([record["adopted"]["digest"], *record["fetched"]])
        packages = [*list_parts(record, "package").values()]
        needed.update(facts["image"] for item in record["components"] for facts in item["services"].values())
        for version in filter(None, (record["running"], record["previous"])):
            needed.update([version["digest"], *version["images"]])
            packages += version["packages"].values()
        needed.update(package["digest"] for package in packages if package)
    return needed


# ----------------------------------------------------------------------------------------------------------
# 8. Turns
# ----------------------------------------------------------------------------------------------------------

def list_parts(record, part):
    """{component: a part of it} of a deployment's record."""
    return {item["name"]: item[part] for item in record["components"]}


def list_running(record):
    """{component: {service: facts}} of the version that runs, as far as known."""
    return record["running"]["services"] if record["fallback"] else list_parts(record, "services")


def list_facts(record):
    """[facts] of each service of the version that runs, as far as known."""
    return [facts for items in list_running(record).values() for facts in items.values()]


def make_groups(actions, records):
    """[[Action]] in the order in which they are carried out; a group is made ready before any of it is done.

    What frees comes before what takes: removals and repairs, then the updates of what runs, as one group,
    because one may take what another gives up; last what is new.  The way back from an update that has failed
    is an update.
    """
    first, updates, new = [], [], []
    for action in actions:
        record = records.get(action.key)
        running = record and record["running"]
        if action.verb not in CHANGES:
            first.append([action])
        elif not running:
            new.append([action])
        elif not record["fallback"] and (
                running["digest"], record["deviceId"]) == (action.target.digest, action.device_id):
            first.append([action])
        else:
            updates.append(action)
    return first + [updates] + new


def find_held_ports(record):
    """{(device id, address or "", port, protocol)} of the host's ports that a deployment is known to hold."""
    if record["state"] == "removed":
        return set()
    running = [facts for facts in list_facts(record) if not facts["finished"]]
    return {(record["deviceId"], *port) for facts in running for port in facts.get("ports", ())}


def find_clash(takes, holds):
    """A port that is in `takes` and in `holds`, or None."""
    for port in sorted(takes):
        for device_id, address, *rest in holds:
            if may_meet(address, port[1]) and (device_id, *rest) == (port[0], *port[2:]):
                return port
    return None


def find_turn(waiting, held):
    """Which of the deployments that are ready to be changed goes on now, and how: (key, verb, words).

    waiting: {key: (ports it takes, ports it holds)}, in order.  held: {key: ports} of all others, who may
    have failed and hold no more than a wish: nobody loses a port to them.  The verbs: `go`; `fail`, in words,
    where somebody keeps a port that it takes; `stop` for one that has to free its ports first, because each
    waits for another one.
    """
    rivals = {**{key: (ports, ports) for key, ports in held.items()}, **waiting}
    blocking = []
    for key, (takes, mine) in waiting.items():
        wants = {other: takes - mine if other in held else takes for other in rivals if other != key}
        found = [other for other, ports in wants.items() if find_clash(ports, rivals[other][1])]
        for other in found:
            keeps, holds = rivals[other]
            port = find_clash(wants[other], {port for port in holds if find_clash({port}, keeps)})
            if port:
                return key, "fail", (f"the host's port {port[1] or '*'}:{port[2]}/{port[3]} is held by"
                                     f" deployment {other}, which keeps it")
        if not found:
            return key, "go", ""
        blocking += found
    return blocking[0], "stop", ""


# ----------------------------------------------------------------------------------------------------------
# 9. Desired-state source
# ----------------------------------------------------------------------------------------------------------

def check_digest(data, digest, what):
    """Raises Refused unless the bytes have the digest."""
    found = sha256_digest(data)
    if found != digest:
        raise Refused(f"{what}: digest mismatch, the manifest says {digest}, the content has {found}")


def is_bundle_cheaper(manifest, missing):
    """Whether one bundle costs less than the missing documents one by one.

    A request of its own costs a TLS connection, which is worth about 6 KiB on the wire and two more round
    trips.  Documents compress about four to one in a bundle; where the manifest does not say sizes, more than
    three missing documents are taken as the point.
    """
    sizes = [entry.size for entry in missing]
    if len(missing) < 2 or None in sizes or manifest.bundle_size is None:
        return len(missing) > 3
    return manifest.bundle_size + 6 * KIB < sum(sizes) + 6 * KIB * len(missing)


class HttpSource:
    """Base of the sources over HTTP.

    A subclass gives `ask` (how to send a request) and `root` (the path prefix).  A source takes every
    document in the shape of rc.3, and says who it speaks as (`client_id`) and with (`peer`).
    """

    root = "/api/v1"
    status_path = "/deployments/{}/status"
    client_id = "whom it knows by no id yet"

    def __init__(self, config):
        self.config, self.url = config, config.wfm.url

    def send(self, method, path, accepted, headers=(), document=None, limit=MAX_ANSWER):
        """One request to the WFM; raises what check_response raises."""
        body = None
        headers = dict(headers)
        path = self.root + path
        if document is not None:
            body = make_json(document)
            headers["Content-Type"] = JSON_TYPE
        now = time.time()
        response = self.ask(method, self.url + path, headers, body, limit)
        coding = response.headers.get("Content-Encoding")
        if coding not in (None, "identity"):
            log("info", "an answer is coded, which was not asked for; it is taken as it came", coding=coding,
                request=f"{method} {path}")
        denial = f"the WFM does not accept this client, {self.client_id}: register it there"
        return check_response(response, f"{method} {self.url}{path}", now, denial, accepted)

    def fetch_manifest(self, etag):
        """The answer to a request for the state manifest; 304 where it still has the ETag."""
        headers = {"Accept": MANIFEST_TYPE}                                         # C-100
        if etag:
            headers["If-None-Match"] = etag                                         # C-101
        return self.send("GET", "/deployments", (200, 304) if etag else (200,), headers,
                         limit=self.config.policy.max_document)

    def fetch_desired(self, accepted, load_artifact):
        """None where nothing changed, else a Desired whose every byte is verified.

        accepted: the state's `accepted`, or None.  load_artifact: digest to bytes or None, of what is at
        hand.  Raises what `send` raises, and Refused.
        """
        incomplete = accepted and accepted.get("incomplete")                        # one was lost here (D-9)
        response = self.fetch_manifest(accepted["etag"] if accepted and not incomplete else None)
        if response.status == 304:                                                  # C-102
            return None
        digest = sha256_digest(response.body)
        etag = response.headers.get("ETag")
        manifest = parse_manifest(response.body, self.config.wfm.url)
        if not check_version(manifest, digest, accepted) and not incomplete:
            accepted["etag"] = etag  # the last one (C-101), so that the next poll may be answered by 304
            return None
        known = {entry.digest for entry in manifest.entries if load_artifact(entry.digest) is not None}
        documents = self.fetch_documents(manifest, known)
        if etag and etag != f'"{digest}"':                                          # C-118
            log("warning", "the ETag is not the digest of the manifest; it is used as it came", etag=etag,
                digest=digest)
        if manifest.foreign:
            log("warning", "addresses in the manifest are of another origin than wfm.url; none is used",
                url=manifest.foreign)
        return Desired(manifest.version, etag, digest, manifest.entries, documents)

    def fetch_documents(self, manifest, known):
        """{digest: bytes} of every document that is not `known`; all or nothing (C-105, C-106).

        They come by the cheaper of two roads.  Where that one is refused, or leads to other bytes than the
        manifest names, they come by the other one; the state is refused where neither leads to them.
        """
        missing = [entry for entry in manifest.entries if entry.digest not in known]
        roads = [self.fetch_one_by_one, self.fetch_bundle]
        if is_bundle_cheaper(manifest, missing):
            roads.reverse()
        try:
            return roads[0](manifest, missing)
        except Refused as error:
            first = error.message
        log("info", "documents are fetched the other way", reason=first)
        try:
            return roads[1](manifest, missing)
        except Refused as error:
            error.message += f"; and before: {first}"
            raise

    def fetch_bundle(self, manifest, missing):
        """{digest: bytes} of the missing documents out of the manifest's bundle."""
        policy = self.config.policy
        path = f"/bundles/{manifest.bundle_digest}"
        response = self.send("GET", path, (200,), limit=policy.max_artifact)
        check_digest(response.body, manifest.bundle_digest, "bundle")
        documents = parse_bundle(response.body, manifest.entries, policy.max_unpacked, policy.max_document)
        return {entry.digest: documents[entry.digest] for entry in missing}

    def fetch_one_by_one(self, manifest, missing):
        """{digest: bytes} of the missing documents, each by a request of its own."""
        documents = {}
        left = self.config.policy.max_unpacked // DOCUMENTS
        for entry in missing:
            path = f"/deployments/{entry.deployment_id}/{entry.digest}"
            response = self.send("GET", path, (200,), {"Accept": DEPLOYMENT_TYPE},
                                 limit=self.config.policy.max_document)
            check_digest(response.body, entry.digest, f"deployment {entry.deployment_id}")
            documents[entry.digest] = response.body
            left -= len(response.body)
            if left < 0:
                raise Refused(f"the documents of the state manifest are more than 1/{DOCUMENTS} of"
                              " policy.max_unpacked, all together")
        return documents

    def put_capabilities(self, device_id, document):
        """Reports what a device can do; repeating it is harmless (C-080)."""
        self.send_of("PUT", device_id, document)

    def delete_capabilities(self, device_id):
        """Deregisters a device; one that the WFM does not know is deregistered already."""
        try:
            self.send_of("DELETE", device_id)
        except Refused as error:
            if error.status != 404:
                raise

    def send_of(self, method, device_id, document=None):
        """One request about a device."""
        self.send(method, f"/capabilities/{device_id}", SUCCESS, document=document)

    def post_status(self, deployment_id, document):
        """Reports a deployment's status."""
        self.send("POST", self.status_path.format(deployment_id), SUCCESS, document=document)


class MtlsSource(HttpSource):
    """Management Interface 1.0.0-rc.3: mutual TLS; the SVID is all that says who asks (C-020)."""

    def __init__(self, config, identity, bundle, memo):
        super().__init__(config)
        self.identity = identity
        self.memo = memo                            # the Store's, see load_memo
        self.client_id = identity.spiffe_id.text
        self.peer = identity.wfm_id
        self.context = load_wfm_context(config, bundle.anchors)
        self.judges = []  # functions (leaf, now) of companions, which raise Untrusted
        self.chain = []                             # what the WFM presented last (DER), leaf first

    def ask(self, method, url, headers, body, limit):
        """One request, sent once the peer is known to be our WFM."""
        return request(method, url, headers, body, self.context, self.config.wfm.timeout, limit,
                       self.check_peer)

    def check_peer(self, chain):
        """Raises Untrusted unless the peer is our WFM, and no companion has anything against it."""
        leaf = check_wfm(chain[0], self.identity)
        for judge in self.judges:
            judge(leaf, time.time())
        self.chain = chain

    def send_of(self, method, device_id, document=None):
        """One request about a device.

        The specification leaves open how a child's id, `gateway/child`, stands in a path.  Where the WFM
        knows nothing at one form, the other one is tried, and what worked is noted.
        """
        forms = [device_id, device_id.replace("/", "%2F")]
        if self.memo.get("escaped"):
            forms.reverse()
        try:
            super().send_of(method, forms[0], document)
        except Refused as error:
            if error.code != "HTTP 404" or forms[0] == forms[1]:
                raise
            super().send_of(method, forms[1], document)
            self.memo["escaped"] = forms[0] == device_id


class Profile:
    """How one word of wfm.profile is served; PROFILES has the class of each.

    Beside what is here a class has
    connect(keep=True): the source of the desired state, and the sink of reports.  keep: it stores what it
    learns.  Raises Untrusted and Unreachable.
    describe(now): what `status` says of the own identity, {id, notAfter, warning}.  It never raises.
    check(now): what `doctor` says of it, (ok or warn, words).  Raises Untrusted.
    identify(): who the client is for as long as it serves one WFM, without state or network.  Raises
    Untrusted.
    """

    settings = ()                                   # what the configuration has to say for it
    https = True                                    # whether wfm.url has to be one of https

    def __init__(self, config, store, state):
        self.config, self.store, self.state = config, store, state
        self.identity = None                        # the own certificate, once the WFM is connected by it

    @classmethod
    def check_settings(cls, config, suffix=""):
        """What is wrong with a configuration for this profile: [(whether it is wrong, key, words)]."""
        url = config.wfm.url
        words = f"not set, and needed for profile {config.wfm.profile}{suffix}"
        parts = [key.split(".") for key in cls.settings]
        return [(config[group][key] is None, f"{group}.{key}", words) for group, key in parts] + [
            (cls.https and not suffix and url and not url.startswith("https://"),
             "wfm.url", f"found {make_printable(url or '', 60)!r}, expected an absolute https URL")]

    @staticmethod
    def takes_children(config):
        """Whether the protocol knows the child devices of a gateway."""
        return False

    def translate(self, document):
        """A capabilities document of rc.3 as this profile sends it."""
        return document


class Mtls(Profile):
    """Profile mtls: an X.509-SVID, and a trust bundle that says who the WFM is."""

    settings = ("wfm.url", "identity.certificate", "identity.key")

    @classmethod
    def check_settings(cls, config, suffix=""):
        settings = config.identity
        return super().check_settings(config, suffix) + [
            (not settings.trust_bundle and not settings.discovery,
             "identity.trust_bundle",
             "not set, and no identity.discovery either; one of them says whom to trust"),
            (settings.key and is_uri(settings.key),
             "identity.key", "found a URI, expected a file; only profile signed has openssl use the key")]

    @staticmethod
    def takes_children(config):
        return True

    def connect(self, keep=True, client_id=None):
        """See Profile; client_id: as whom this device is enrolled, where that is not its SPIFFE ID."""
        config = self.config
        store = self.store
        state = self.state
        now = time.time()
        identity = self.identity = load_identity(config, now)
        check_enrollment(state, client_id or identity.spiffe_id.text)
        warn_of_own(config, identity.leaf, store, now)
        bundle = obtain_trust_bundle(config, store, state, identity.spiffe_id.trust_domain, now, keep)
        judge_own_chain(config, identity.leaf, bundle, state)
        return self.open_source(identity, bundle, keep)

    def open_source(self, identity, bundle, keep):
        """The MtlsSource of an Identity, with what companions have to say."""
        source = MtlsSource(self.config, identity, bundle, self.store.load_memo())
        source.judges = [companion.judge(self.config, self.store, self.state, source, keep)
                         for companion in COMPANIONS.values() if companion.judge]
        return source

    def describe(self, now):
        state = self.state
        known_id = (state["enrollment"] or {}).get("id", "")
        found = describe_own(self.config, load_identity, known_id, now)
        warnings = [found["warning"]]
        if found["notAfter"]:
            warnings.insert(0, load_flaw(self.store, state, load_identity(self.config).leaf))
        warnings += [item.remark(state, now) for item in COMPANIONS.values() if item.remark]
        return dict(found, warning="; ".join(filter(None, warnings)))

    def check(self, now):
        own = load_identity(self.config, now)
        load_wfm_context(self.config, [own.leaf.der])
        return judge_own(own.leaf, own.spiffe_id.text, self.config, now)

    def identify(self):
        """The SPIFFE ID, also of a certificate that has expired."""
        return (self.identity or load_identity(self.config)).spiffe_id.text


def make_owner(identity, device_id):
    """What an agent's workloads are labelled with: its identity as a client, no login, and its device id."""
    return re.sub(r"(?<=//)[^/]*@", "", identity) + "#" + device_id


PROFILES["mtls"] = Mtls


# ----------------------------------------------------------------------------------------------------------
# 10. Desired state
# ----------------------------------------------------------------------------------------------------------

NAME_PATTERN = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"              # Kubernetes' object names
COMPONENT_PATTERN = r"[a-z0-9]([a-z0-9-]{0,198}[a-z0-9])?"           # it becomes the name of a folder
REVISION_PATTERN = (r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)"
                    r"(-(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)(\.(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))*)?"
                    r"(_[0-9a-zA-Z-]+(\.[0-9a-zA-Z-]+)*)?")

# What the documents have to look like, see check_shape.  Members that are not named here are checked where
# they are used, or nowhere (C-116).
ARTIFACT = {"digest": DIGEST_PATTERN, "url": r"(?s).*"}             # no other algorithm (C-107)
MANIFEST = {"deployments": [dict(ARTIFACT, deploymentId=UUID_PATTERN)],
            "bundle": (None, dict(ARTIFACT, mediaType=re.escape(BUNDLE_TYPE)))}
CONSTRAINTS = {                                                     # protocol 3.2
    "capacityRequirements?": {
        "cpu?": {"cores": float, "architectures?": list},
        "memory?": "[0-9]{1,40}(Mi|Gi|Ki)",
        "storage?": "[0-9]{1,40}(Mi|Gi|Ki|Ti|Pi|Ei)",
    },
    "eligibilityRules?": list,
}
DEPLOYMENT = {
    "id": UUID_PATTERN,
    "metadata": {
        "name": NAME_PATTERN,
        "namespace": NAME_PATTERN,
        "deviceId?": DEVICE_ID_PATTERN + r"(/\*)?",
    },
    "spec": {
        "applicationId": "[-a-z0-9]{1,200}",
        "deploymentProfile": {"components": list, "deviceConstraints?": CONSTRAINTS},
        "parameters?": dict,
    },
}
COMPONENT = {"name": COMPONENT_PATTERN, "properties": {"timeout?": r"\d{1,6}m\d{1,6}s"}}
PARAMETER = {"targets": [{"pointer": r"(?s).*", "components": list}]}


def parse_manifest(data, base_url):
    """A state manifest's bytes to a Manifest; raises Refused naming the field (protocol 3.1)."""
    try:
        value = parse_json(data, "the state manifest")
        check_shape(value, MANIFEST, "")
        version = parse_version(value.get("manifestVersion"))
        bundle = value["bundle"]
        if len(value["deployments"]) > MAX_DEPLOYMENTS:
            raise ValueError(f"deployments: expected a list of at most {MAX_DEPLOYMENTS}")
        if (bundle is None) != (not value["deployments"]):                          # C-114
            raise ValueError("bundle: is null if and only if there are no deployments")
        entries = {}
        foreign = ""
        for index, item in enumerate(value["deployments"]):
            name = item["deploymentId"]
            where = f"deployments[{index}]"
            path = f"/deployments/{name}/{item['digest']}"
            foreign = check_url(item["url"], path, base_url, where) or foreign
            if name.lower() in entries:
                raise ValueError(f"{where}.deploymentId: {name} occurs twice")
            entries[name.lower()] = ManifestEntry(name, item["digest"], parse_advice(item))
        if bundle is not None:
            path = f"/bundles/{bundle['digest']}"
            foreign = check_url(bundle["url"], path, base_url, "bundle") or foreign
    except ValueError as error:
        raise Refused(f"state manifest of {base_url} refused: {error}") from None
    bundle = bundle or {}
    return Manifest(version, bundle.get("digest"), parse_advice(bundle), list(entries.values()),
                    foreign)


def parse_version(value):
    """manifestVersion in full precision; raises ValueError (D-5)."""
    # from 2^53 on a float does not tell which number was written
    if isinstance(value, float) and value.is_integer() and value < 2 ** 53:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_VERSION:
        found = make_printable(repr(value), 40)
        raise ValueError(f"manifestVersion: found {found}, expected a whole number from 1 to 2^64-1")
    return value


def parse_advice(item):
    """sizeBytes where it is usable.  It decides what is cheaper to fetch and nothing else (C-110)."""
    size = item.get("sizeBytes")
    return int(size) if is_number(size) and 0 <= size < 2 ** 53 else None


def check_url(url, path, base_url, where):
    """Returns a `url` that is of another origin than the WFM, "" for others; nothing is ever fetched from it.

    Raises ValueError for one of the WFM's own that leads to other content than id and digest name (C-058,
    protocol 2.1).
    """
    from urllib.parse import unquote, urljoin
    shown = make_printable(url, 200)
    try:
        absolute = urljoin(base_url, url)
        if find_origin(absolute) != find_origin(base_url) or not absolute.startswith("https:"):
            return shown
    except ValueError as error:
        raise ValueError(f"{where}.url: {shown!r}: {error}") from None
    if not unquote(absolute).lower().endswith(path.lower()) or ".." in unquote(url).split("/"):
        raise ValueError(f"{where}.url: {shown!r} does not end with {path}")
    return ""


def check_version(manifest, digest, accepted):
    """Whether a manifest is new: True, or False for the very one that was accepted before.

    Raises Refused (C-103, C-119).
    """
    if accepted is None or manifest.version > accepted["version"]:
        return True
    same = manifest.version == accepted["version"]
    if same and digest == accepted["digest"]:
        return False
    relation = "the same version with other content" if same else "an older version"
    raise Refused(
        f"security: state manifest refused: version {manifest.version} is {relation}"
        f" (accepted: {accepted['version']});"
        " a replay, or a WFM restored from a backup: then unenroll and enroll again"
    )


Dialect = define("Dialect", "parse_package prefix addressed",
    "How documents of one generation differ: what reads the package of a component (see parse_package), a"
    " pattern of what stands before the pointers of a compose component's parameters, and whether"
    " metadata.deviceId has to be there.")
# What reads other generations: functions of a document (a mapping) to None, or to (the document in rc.3's
# form, its Dialect).  They may raise ValueError.
DIALECTS = []


def parse_document(value):
    """(an ApplicationDeployment in rc.3's form, its Dialect) of a YAML value; raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("the document is not a mapping")
    for convert in DIALECTS:
        found = convert(value)
        if found:
            return found
    if "kind" in value or "apiVersion" in value:
        raise ValueError("apiVersion and kind are of an older generation, which this agent was made without")
    return value, Dialect(parse_package, "", True)


def parse_package(properties, where, kind, schemes="oci"):
    """(repository, revision, location of a key or None) of a component of type `kind`.

    Raises ValueError (C-153).
    """
    check_shape(properties, {"repository": schemes + r"://[^\s]+", "revision": REVISION_PATTERN}, where)
    return properties["repository"], properties["revision"], None


def parse_deployment(data, deployment_id, values={}):
    """An ApplicationDeployment's bytes to a Deployment.

    values: see parse_parameters.  Raises ComponentError INVALID_DEPLOYMENT or UNSUPPORTED_TYPE.  Unknown
    members and extensions are ignored wherever they stand (C-116); what is used is checked.
    """
    try:
        value, dialect = parse_document(load_yaml(data))
        check_shape(value, DEPLOYMENT, "")
        if value["id"].lower() != deployment_id.lower():                            # C-115
            raise ValueError(f"id: found {value['id']}, but the manifest names it {deployment_id}")
        metadata = value["metadata"]
        spec = value["spec"]
        profile = spec["deploymentProfile"]
        if dialect.addressed:
            check_shape(metadata, {"deviceId": ".*"}, "metadata")
        where = "spec.deploymentProfile"
        kind = profile.get("type")
        if kind not in ("compose", "helm"):
            found = make_printable(str(kind), 40)
            raise ComponentError("UNSUPPORTED_TYPE", f"{where}.type: {found!r} is not a type this agent runs")
        components = [parse_component(item, f"{where}.components[{index}]", kind, dialect)
                      for index, item in enumerate(profile["components"])]
        names = {component.name for component in components}
        if not components or len(names) < len(components):
            raise ValueError(f"{where}.components: {'a name occurs twice' if names else 'none'}")
        prefix = dialect.prefix if kind == "compose" else ""
        parameters = parse_parameters(spec, prefix, values, names)
    except ValueError as error:                     # a YAMLError is one
        raise ComponentError("INVALID_DEPLOYMENT", f"ApplicationDeployment: {error}") from None
    extensions = {"spec": find_extensions(spec), "deploymentProfile": find_extensions(profile)}
    return Deployment(deployment_id, metadata["name"], metadata["namespace"], metadata.get("deviceId") or "",
                      kind, components, parameters, profile.get("deviceConstraints"), extensions)


def make_outline(data, deployment_id):
    """What the status of a refused document needs: a Deployment that holds the names only.

    None where there are none.
    """
    try:
        value = parse_document(load_yaml(data))[0]
        holders = [value["metadata"], *value["spec"]["deploymentProfile"]["components"]]
        name, *components = [make_printable(holder["name"]) for holder in holders if holder["name"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return Deployment(deployment_id, name, "", "", "",
                      [Component(item, "", "", True, 0) for item in components], [], None)


def parse_component(item, where, kind, dialect):
    """One element of `components` of a deployment of type `kind`; raises ValueError."""
    check_shape(item, COMPONENT, where)
    properties = item["properties"]
    where += ".properties"
    repository, revision, key_location = dialect.parse_package(properties, where, kind)
    wait = str(properties.get("wait", True)).lower()
    check_shape(wait, "true|false", f"{where}.wait")
    timeout = COMPONENT_TIMEOUT
    if properties.get("timeout"):
        minutes, seconds = properties["timeout"][:-1].split("m")
        timeout = min(60 * int(minutes) + int(seconds), MAX_TIMEOUT)
    return Component(item["name"], repository, revision, wait == "true", timeout, find_extensions(item),
                     key_location)


def find_extensions(value):
    """The specification extensions of a mapping, for hooks alone.

    What JSON has no words for is left out: none ever fails (C-116).
    """
    found = {}
    for key, item in value.items():
        if isinstance(key, str) and re.fullmatch(EXTENSION_PATTERN, key) and isinstance(item, dict):
            try:
                make_json(item)
            except (TypeError, ValueError):
                continue
            found[key] = item
    return found


def parse_parameters(spec, prefix, values, names):
    """spec.parameters to a list of Parameter; raises ValueError, also for one that reaches no component.

    prefix: a pattern of what older generations put before pointers; it is taken away.  values: what the
    device has for parameters that ask for it: a draft lets a document name one, before its own.  names: of
    the components there are; further targets may be those of another profile.
    """
    parameters = []
    for name, item in (spec.get("parameters") or {}).items():
        where = f"spec.parameters.{make_printable(str(name), 80)}"
        check_shape(item, PARAMETER, where)
        try:
            value = values[item["valueFrom"]["device"]["key"]]
        except (KeyError, TypeError):
            value = item.get("value")
        if any(isinstance(part, (dict, list)) for part in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{where}.value: expected a scalar or a list of scalars")
        if value is None and "valueFrom" in item:
            words = "this device has no such value (see device.parameter_values), and there is no other"
            raise ComponentError("PARAMETER_INVALID", f"{where}.valueFrom: {words}")
        targets = [(re.sub(f"^{prefix}", "", target["pointer"]), target["components"])
                   for target in item["targets"]]
        reached = [str(component) for _, components in targets for component in components]
        if reached and not names.intersection(reached):
            raise ValueError(f"{where}.targets: {make_printable(reached[0], 80)!r} is not among the"
                             f" components {', '.join(sorted(names))}")
        parameters.append(Parameter(str(name), value, targets))
    return parameters


def parse_bundle(data, entries, max_unpacked, max_document=8 * MIB):
    """A bundle's bytes to {digest: bytes}.

    Raises Refused unless it holds exactly the manifest's documents (protocol 2.5, C-117).  They are known by
    their digests: names are not specified, and nothing reaches the disk under a name of the bundle's.
    """
    wanted = {entry.digest for entry in entries}
    documents, total = {}, 0
    try:
        plain, members, _ = unpack_tar(data, max_unpacked, 4 * MAX_DEPLOYMENTS)
        for member in members:
            name = make_printable(member.name, 100)
            if member.isdir() and member.name in (".", "./"):
                continue
            if not member.isfile() or member.issparse():
                raise ValueError(f"{name} is not a regular file")
            total += member.size
            if member.size > max_document or total > max_unpacked // DOCUMENTS:
                raise ValueError(f"{name} is longer than policy.max_document, or all documents together are"
                                 f" longer than 1/{DOCUMENTS} of policy.max_unpacked")
            content = b"".join(read_pieces(plain, member.offset_data, member.size))
            digest = sha256_digest(content)
            if digest not in wanted:
                raise ValueError(f"{name} has digest {digest}, which the manifest does not name")
            documents[digest] = content
        missing = wanted.difference(documents)
        if missing:
            raise ValueError(f"{len(missing)} documents of the manifest are not in it,"
                             f" such as {min(missing)}")
    except ValueError as error:
        raise Refused(f"bundle refused: {error}") from None
    return documents


def list_targets(accepted):
    """[Target] of an accepted desired state; their documents are not read yet."""
    return [Target(item["deploymentId"], item["digest"], accepted["version"])
            for item in accepted["deployments"]]


def read_target(target, load_document, config):
    """The target with its Deployment, or with why there is none.  load_document: digest to bytes or None."""
    data = load_document(target.digest)
    try:
        if data is None:
            words = "its document is missing from the state directory; the next poll brings it anew"
            raise ComponentError("INTERNAL", words)
        return target._replace(deployment=parse_deployment(data, target.deployment_id,
                                                           config.device.parameter_values))
    except ComponentError as error:
        return target._replace(error=error, deployment=data and make_outline(data, target.deployment_id))


# ----------------------------------------------------------------------------------------------------------
# 11. Identity and trust
# ----------------------------------------------------------------------------------------------------------

EXPIRY_WARNING = 0.2  # share of the own certificate's lifetime that is left when `run` begins to warn
EXPIRY_ADVICE = 0.25                # ... and when `doctor` does
CLOCK_SKEW = 300                    # seconds that another clock may be ahead of ours
DRAFT = "the Margo draft of enrollment, renewal and revocation, which may still change"
KEY_KINDS = {  # identity.algorithm: what openssl makes a key from; those that are not named sign by RSA
    "ecdsa-p256-sha256": "EC -pkeyopt ec_paramgen_curve:P-256",
    "ecdsa-p384-sha384": "EC -pkeyopt ec_paramgen_curve:P-384",
    "ed25519": "ED25519"}

SpiffeId = define("SpiffeId", "text trust_domain path",
                  "A SPIFFE ID, its trust domain and its path (with leading slash).")
Identity = define("Identity", "spiffe_id wfm_id leaf",
    "The own SVID: its SpiffeId, the text of the WFM's, which follows from it (C-009), the leaf Certificate.")
TrustBundle = define("TrustBundle", "anchors sequence refresh_hint",
    "Trust anchors (DER), `spiffe_sequence`, `spiffe_refresh_hint` in seconds; each of these may be None.")
Discovery = define("Discovery", "trust_domain bundle_uri parts",
    "A discovery document: texts, and {name: value} of what COMPANIONS read.")
Companion = define("Companion", "title wanted parse limits flaw judge remark",
    """What an optional room has to say about identity and trust: its name, then functions, or None.

    wanted(config): whether its part of the discovery document is needed.
    parse(members, document_url, public): its part of the members of that document.
    limits(state): [seconds] after each of which the trust bundle is asked for again at the latest.
    flaw(store, state, leaf): why an own SVID that is valid is of no use, "" where it is.
    judge(config, store, state, source, keep): a function (leaf, now) that raises Untrusted for a WFM's leaf.
    remark(state, now): what `status` should warn of, or "".
    """, None, None, None)
COMPANIONS = {}  # {name of its part in state["trust"]: Companion}; optional rooms add themselves


def parse_spiffe_id(text):
    """A SPIFFE ID (protocol 1.1) to a SpiffeId; raises ValueError."""
    match = re.fullmatch(r"spiffe://([a-z0-9._-]+)((?:/[A-Za-z0-9._~-]+)+)", text)
    if not match or len(text) > 2048 or {".", ".."} & set(match.group(2).split("/")):
        raise ValueError(f"{make_printable(text, 100)!r} is not a SPIFFE ID with a path")
    return SpiffeId(text, match.group(1), match.group(2))


def check_leaf(certificate):
    """The SPIFFE ID of a leaf that may be used as an X.509-SVID; raises ValueError (C-011)."""
    if len(certificate.uris) != 1:
        raise ValueError(f"subjectAltName holds {len(certificate.uris)} URIs, an X.509-SVID has exactly one,"
                         " a client's is spiffe://TRUST DOMAIN/margo/wfm/ID/client/ID; ask whoever runs the"
                         " WFM for such a certificate")
    if certificate.is_ca:
        raise ValueError("basicConstraints says CA, an X.509-SVID is a leaf")
    if {KEY_CERT_SIGN, CRL_SIGN} & (certificate.key_usage or set()):
        raise ValueError("keyUsage allows keyCertSign or cRLSign, an X.509-SVID may not")
    return parse_spiffe_id(certificate.uris[0])


def check_validity(certificate, now):
    """Raises ValueError for a certificate that is not valid at `now` (Unix seconds), or for a wrong clock."""
    clock = f"the clock of this device says {make_time(now)}"
    if now < certificate.not_before:
        raise ValueError(f"not valid before {make_time(certificate.not_before)}, and {clock}; set the clock")
    if now > certificate.not_after:
        raise ValueError(f"expired at {make_time(certificate.not_after)}, and {clock}; set the clock, or have"
                         " the certificate renewed")


def make_identity(leaf):
    """The own Identity from its leaf Certificate; raises ValueError."""
    spiffe_id = check_leaf(leaf)
    match = re.fullmatch(r"(/margo/wfm/[^/]+)/client/[^/]+", spiffe_id.path)
    if not match:
        raise ValueError(f"{spiffe_id.text} is not a WFM client's id"
                         " (spiffe://<trust domain>/margo/wfm/<wfm id>/client/<client id>); name the"
                         " certificate that was made for this device")
    wfm_id = f"spiffe://{spiffe_id.trust_domain}{match.group(1)}"
    return Identity(spiffe_id, wfm_id, leaf)


def load_identity(config, now=None):
    """The own SVID, from its files alone; see load_own."""
    return load_own(config, make_identity, now)


def load_own(config, make, now=None):
    """What `make` makes of the leaf Certificate in identity.certificate, which is valid `now` (Unix seconds).

    now: None where that does not matter.  Raises Untrusted: which file, and what is wrong with it.
    """
    path = config.identity.certificate
    try:
        data = read_file(path, MAX_CERTIFICATES)
        if data is None:
            way = "the operator provides the certificate (a CSR for it: margo_agent.py csr)"
            if config.identity.get("enrollment") == "est":
                way = "`margo_agent.py enroll` obtains one"
            raise ValueError(f"there is no such file; {way}")
        if data[:1] == b"\x30":
            raise ValueError("it is binary (DER or PKCS#12), and PEM is needed: openssl x509 -inform DER, or"
                             f" openssl pkcs12 -nokeys, with -in {path} -out client.pem")
        chain = parse_pem(data)
        if not chain:
            other = re.search(rb"-----BEGIN ([A-Z ]+)-----", data)
            found = f"a {other.group(1).decode().lower()} and " if other else ""
            raise ValueError(f"it holds {found}no certificate in PEM; name the file that begins with"
                             " -----BEGIN CERTIFICATE-----")
        leaf = parse_certificate(chain[0])
        own = make(leaf)
        if now is not None:
            check_validity(leaf, now)
        return own
    except (StorageError, ValueError) as error:
        raise Untrusted(f"identity.certificate {path}: {error}") from None


def check_enrollment(state, client_id):
    """Raises Untrusted where this device is enrolled as somebody else: it works for one WFM (C-052)."""
    if state["enrollment"] and state["enrollment"]["id"] != client_id:
        raise Untrusted(f"the own identity is {client_id}, but this device is enrolled as"
                        f" {state['enrollment']['id']}; unenroll first")


def find_expiry(leaf, now, share=EXPIRY_WARNING):
    """What to say of a certificate's end, "" while more than a share of its lifetime is left."""
    left = leaf.not_after - now
    if left < 0:
        return "expired"
    if left < share * (leaf.not_after - leaf.not_before):
        return f"expires in {left // 86400:.0f} days, at {make_time(leaf.not_after)}; have it renewed"
    return ""


def ask_warnings(config, leaf, now, share):
    """[what to say] of an own certificate that ends soon, and of a key that others can read."""
    expiry = find_expiry(leaf, now, share)
    words = [expiry and f"the own certificate {expiry}", ask_looseness("identity.key", config.identity.key)]
    return list(filter(None, words))


def warn_of_own(config, leaf, store, now):
    """Warns once a day of the own certificate and key."""
    memo = store.load_memo()
    words = ask_warnings(config, leaf, now, EXPIRY_WARNING)
    if words and not 0 <= now - memo.get("warnedAt", 0) < 86400:
        for line in words:
            log("warning", line)
        memo["warnedAt"] = now


def describe_own(config, load, known_id, now):
    """{id, notAfter, warning} of the own certificate, as `status` shows it; never raises.

    load: load_identity, or what another profile has in its place.  known_id: the client's id where its
    certificate names none.
    """
    try:
        own = load(config)
    except Untrusted as error:
        return {"id": known_id, "notAfter": "", "warning": error.message}
    name = own.spiffe_id.text if isinstance(own, Identity) else known_id
    return {"id": name, "notAfter": make_time(own.leaf.not_after), "warning": find_expiry(own.leaf, now)}


def judge_own(leaf, words, config, now):
    """What `doctor` says of an own certificate that can be used: (ok or warn, words)."""
    faults = ask_warnings(config, leaf, now, EXPIRY_ADVICE)
    words += f", {(leaf.not_after - now) // 86400:.0f} days left"
    return "warn" if faults else "ok", "; ".join([words, *faults])


def note_draft(store, state, what):
    """Says once in the log that a draft is in use."""
    if what not in state["drafts"]:
        log("warning", f"in use: {what}, by {DRAFT}")
        state["drafts"].append(what)
        store.save_state(state)


def load_flaw(store, state, leaf):
    """Why an own SVID that is valid is of no use, as a companion knows it; "" where none does."""
    flaws = [item.flaw(store, state, leaf) for item in COMPANIONS.values() if item.flaw]
    return next(filter(None, flaws), "")


def check_wfm(der, identity):
    """The peer's leaf; raises Untrusted unless it is the SVID of exactly our WFM (C-009 to C-014).

    That it is valid now, and leads to an anchor, OpenSSL has found before.
    """
    try:
        leaf = parse_certificate(der or b"")
        peer = check_leaf(leaf)
    except ValueError as error:
        raise Untrusted(f"the WFM's certificate is no X.509-SVID: {error}") from None
    if peer.text != identity.wfm_id:
        raise Untrusted(f"the peer is {peer.text}, this client's WFM is {identity.wfm_id}: name that one by"
                        " wfm.url, or have a certificate made for this one")
    return leaf


def load_wfm_context(config, anchors):
    """The SSLContext towards the WFM: the own chain (C-004), the anchors (DER) and no others (C-006)."""
    context = make_tls_context(anchors, min_tls=config.wfm.min_tls)
    load_key_pair(context, config.identity.certificate, config.identity.key)
    return context


def load_key_pair(context, certificate_file, key_file, where="identity"):
    """Lets an SSLContext present a chain.

    Raises Untrusted, also while an operator has replaced only one of the two files (E-010).
    """
    asked = []  # nobody can type a password here; to raise in there upsets Python 3.7
    try:
        context.load_cert_chain(certificate_file, key_file, lambda: asked.append(True) or "")
    except FileNotFoundError:
        missing = f"key {key_file}" if os.path.exists(certificate_file) else f"certificate {certificate_file}"
        raise Untrusted(f"{where}.{missing}: there is no such file") from None
    except (OSError, ValueError) as error:
        words = "it holds no private key in PEM, or is unreadable; name the file that does"
        if asked:
            words = "it is encrypted; store it unencrypted, mode 0600"
        elif "MISMATCH" in str(error):
            words = (f"not the key of {where}.certificate {certificate_file}; name the one that it was made"
                     " with")
        elif isinstance(error, PermissionError):
            words = "unreadable (Permission denied); run as root, or as its owner"
        raise Untrusted(f"{where}.key {key_file}: {words}") from None


def run_own_handshake(certificate_file, key_file, anchors):
    """Raises ValueError unless the own chain leads to one of the anchors (DER).

    OpenSSL judges, in a handshake with itself (E-012).
    """
    import ssl
    client = make_tls_context(anchors)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client.verify_mode = ssl.CERT_NONE              # only the server's side is asked, as a WFM would be
    server.verify_mode = ssl.CERT_REQUIRED
    server.verify_flags |= 0x80000                  # X509_V_FLAG_PARTIAL_CHAIN: see make_tls_context
    server.load_verify_locations(cadata=make_pem(anchors))
    for context in (client, server):
        load_key_pair(context, certificate_file, key_file)
    there = ssl.MemoryBIO()
    back = ssl.MemoryBIO()
    ends = [client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True)]
    for end in ends * 3:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise ValueError(getattr(error, "verify_message", None) or make_printable(str(error))) from None


def judge_own_chain(config, own, bundle, state):
    """Raises Untrusted for a new own chain that does not lead to the trust bundle (E-012).

    A chain that once did is used on after the bundle has changed, because the WFM decides; `strays` in the
    state's trust then names its leaf.  The handshake is made once for each pair of leaf and bundle.
    own: the leaf Certificate.
    """
    leaf = sha256_digest(own.der)
    pair = leaf + sha256_digest(b"".join(bundle.anchors))
    if state["identity"] == pair:
        return
    try:
        run_own_handshake(config.identity.certificate, config.identity.key, bundle.anchors)
    except ValueError as error:
        message = (f"identity.certificate {config.identity.certificate}: its chain does not lead to the trust"
                   f" bundle ({error})")
        if not (state["identity"] or "").startswith(leaf):
            raise Untrusted(f"{message}: it is certified by {make_name(own.issuer)}; ask whoever runs the WFM"
                            " for a certificate and a bundle that belong together") from None
        log("error", f"{message} any more; have it issued anew")
        state["trust"]["strays"] = leaf
        return
    state["identity"] = pair
    state["trust"].pop("strays", None)


# Trust bundle and discovery.

def parse_trust_bundle(data):
    """A SPIFFE bundle (JWK Set) or PEM certificates to a TrustBundle; raises ValueError (C-034 to C-037)."""
    anchors = parse_pem(data)
    value = {"keys": []}
    if not anchors:
        value = parse_json(data, "the trust bundle")
        check_shape(value, {"keys": list}, "the trust bundle")          # a JWK Set
    for index, key in enumerate(value["keys"]):
        if isinstance(key, dict) and key.get("use") == "x509-svid":
            x5c = key.get("x5c")
            first = x5c[0] if isinstance(x5c, list) and x5c else None
            check_shape(first, r"\S+", f"keys[{index}].x5c")            # no white space there (RFC 7517, 4.7)
            anchors.append(parse_base64(first))
    if not anchors:
        raise ValueError("no X.509 anchor in it (no key with use x509-svid); whoever runs the WFM has the"
                         " bundle")
    for anchor in anchors:
        parse_certificate(anchor)
    numbers = [value.get(name) for name in ("spiffe_sequence", "spiffe_refresh_hint")]
    good = [item if type(item) is int and 0 <= item <= MAX_VERSION else None for item in numbers]
    return TrustBundle(anchors, *good)


def check_sequence(bundle, trust, trust_domain):
    """Raises ValueError where the sequence of a TrustBundle went back (C-043)."""
    known = trust.get("sequence")
    same = trust.get("trustDomain") == trust_domain and None not in (known, bundle.sequence)
    if same and bundle.sequence < known:
        raise ValueError(f"spiffe_sequence went back from {known} to {bundle.sequence} (a security event, or"
                         " a rebuilt identity service: then unenroll and enroll again)")


def parse_discovery(data, document_url, trust_domain, public):
    """A discovery document to a Discovery; raises ValueError (C-033 to C-035).

    trust_domain: of the own SVID, None where there is none yet.  public: whether the system's store vouched
    for the document, which may then name no other origin.
    """
    value = parse_json(data, "the discovery document")
    check_shape(value, {"trustDomain": "(?s).*"}, "the discovery document")
    domain = value["trustDomain"]
    if trust_domain not in (None, domain):
        raise ValueError(f"it is for trust domain {make_printable(domain, 100)}, the own SVID is of"
                         f" {trust_domain}")
    uri = parse_discovered("trustBundleUri", read_url, value, document_url, public)
    parts = {name: item.parse(value, document_url, public) for name, item in COMPANIONS.items()}
    return Discovery(domain, uri, parts)


def parse_discovered(name, reader, members, document_url, public):
    """A URL out of the members of a discovery document; raises ValueError."""
    try:
        uri = reader(members.get(name), "")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if public and find_origin(uri) != find_origin(document_url):
        raise ValueError(f"{name} {uri} is of another origin than the document;"
                         " set identity.ca to allow that")
    return uri


def find_origin(url):
    """(host, port) of an https URL."""
    from urllib.parse import urlsplit
    parts = urlsplit(url)
    return parts.hostname, parts.port or 443


def fetch_discovery(config, trust_domain, now):
    """The Discovery of identity.discovery; raises Unreachable, Untrusted, Refused.

    Without parts, and with identity.trust_bundle, where there is no such document (C-046).
    """
    settings = config.identity
    known = Discovery(trust_domain, settings.trust_bundle, {})
    if not settings.discovery:
        return known
    where = f"identity.discovery {settings.discovery}"
    answer = fetch_from_mis(settings.discovery, config)
    if answer.status == 404 and "://" in (settings.trust_bundle or ""):
        return known
    check_response(answer, where, now)
    public = not (settings.ca or settings.pins)
    try:
        return parse_discovery(answer.body, settings.discovery, trust_domain, public)
    except ValueError as error:
        raise Untrusted(f"{where}: {error}") from None


def is_remote(settings):
    """Whether the trust bundle comes from an identity service, and not from a file."""
    return bool(settings.discovery) or "://" in (settings.trust_bundle or "")


def load_trust_bundle(config, store):
    """The TrustBundle at hand, None where an identity service has to be asked first.

    Raises Untrusted for a file of no use.
    """
    remote = is_remote(config.identity)
    path = store.path("trust-bundle.json") if remote else config.identity.trust_bundle
    data = read_file(path, MAX_CERTIFICATES)
    if data is None and remote:
        return None
    try:
        if data is None:
            raise ValueError("there is no such file; whoever runs the WFM has it")
        return parse_trust_bundle(data)
    except ValueError as error:
        if not remote:
            raise Untrusted(f"identity.trust_bundle {path}: {error}") from None
        log("warning", "the cached trust bundle is unusable and is fetched anew", reason=str(error))
        return None


def is_bundle_due(config, state, hint, asked, now):
    """Whether the identity service has to be asked again.

    hint: seconds after which the bundle at hand asks for it.  asked: when it was done last (Unix seconds).
    """
    trust = state["trust"]
    if now < trust.get("quiet", 0) <= now + MAX_WAIT:               # it asked for that (C-056)
        return False
    wanted = [name for name, item in COMPANIONS.items() if item.wanted(config)]
    if not trust.keys() >= {"source", *wanted}:
        return True
    periods = [min(hint, MAX_WAIT) if hint else config.identity.refresh]
    for companion in COMPANIONS.values():
        periods += companion.limits(state)
    return not asked <= now < asked + min(periods)


def obtain_trust_bundle(config, store, state, trust_domain, now, keep=True, anew=False):
    """The current TrustBundle, fetched when due; a new one replaces all anchors at once (C-038 to C-042).

    trust_domain: of the own SVID, None where there is none yet.  keep: store what was fetched.  anew: fetch
    it in any case.  Where it cannot be had or is refused, the one at hand stays in use; where there is none,
    raises Unreachable or Untrusted.
    """
    held = load_trust_bundle(config, store)
    asked = store.load_memo().get("trust") or state["trust"].get("refreshedAt") or 0
    due = anew or not held or is_bundle_due(config, state, held.refresh_hint, asked, now)
    if not is_remote(config.identity) or not due:
        return held
    try:
        return fetch_trust_bundle(config, store, state, held, trust_domain, now, keep)
    except (ValueError, MargoError) as error:
        if not held:
            raise error if isinstance(error, Unreachable) else Untrusted(f"no usable trust bundle: {error}")
        if getattr(error, "retry_after", None):
            state["trust"]["quiet"] = now + error.retry_after
        log("warning", "the trust bundle cannot be refreshed; the one at hand stays in use",
            reason=str(error))
        return held


def fetch_trust_bundle(config, store, state, held, trust_domain, now, keep):
    """The TrustBundle as the identity service has it now; raises ValueError, MargoError.

    held: the one at hand, or None; where nothing is new, nothing is written.
    """
    trust = state["trust"]
    trust_domain, url, parts = fetch_discovery(config, trust_domain, now)
    for name, companion in COMPANIONS.items():
        if companion.wanted(config) and (parts or name not in trust):
            if trust.get(name) and not parts.get(name):
                log("warning", f"discovery names no {companion.title} any more; what is at hand counts on")
            trust[name] = parts.get(name)
    answer = fetch_from_mis(url, config)
    check_response(answer, f"trust bundle {url}", now)
    store.load_memo()["trust"] = now
    bundle = parse_trust_bundle(answer.body)
    check_sequence(bundle, trust, trust_domain)
    if bundle == held and trust.get("source") == url:
        return held
    make_tls_context(bundle.anchors)                # OpenSSL can use them; else the one at hand stays
    if keep:
        write_file(store.path("trust-bundle.json"), answer.body)
    trust.update(source=url, sequence=bundle.sequence, refreshedAt=now, trustDomain=trust_domain)
    log("info", "new trust bundle", source=url, anchors=len(bundle.anchors), sequence=bundle.sequence)
    return bundle


# The Margo Identity Service, known by identity.ca, by pins, or by the system's store.

def obtain_mis_context(config, url):
    """(SSLContext, check_peer) for the identity service at a URL.

    It is known by identity.ca or the system's store, by pins, or by both; the trust bundle has no say here
    (C-030, C-044).  A pin names a key, and not where its certificate is.  So over a first connection the
    service shows its certificates, and nothing is said.  Those whose key is pinned become the only anchors
    of the next connection, and OpenSSL judges as ever (E-005).
    """
    import ssl
    settings, timeout = config.identity, config.wfm.timeout
    context = make_tls_context(ca_file=settings.ca, min_tls=config.wfm.min_tls)
    if not settings.pins:
        return context, None
    if not settings.ca:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    shown = ask_chain(url, context, timeout)
    pinned = [der for der in shown + context.get_ca_certs(binary_form=True) if make_pin(der) in settings.pins]
    if not pinned:
        raise Untrusted(f"{url}: it presents no certificate whose key is in identity.pins")
    narrow = make_tls_context(pinned, min_tls=config.wfm.min_tls)
    # an address has no name to check (E-016)
    narrow.check_hostname = not re.fullmatch(r"[0-9.]+|.*:.*", find_origin(url)[0])

    def check_peer(chain):
        if settings.ca and chain[0] != shown[0]:
            raise Untrusted(f"{url}: the certificate that identity.ca vouches for is not the pinned one")
    return narrow, check_peer


def make_pin(der):
    """base64 of the SHA-256 of a certificate's public key, "" for one that cannot be read."""
    import hashlib
    try:
        return make_base64(hashlib.sha256(parse_certificate(der).spki).digest())
    except ValueError:
        return ""


def fetch_chain(url, context, timeout):
    """The certificates of the service at a URL (DER, see get_chain); nothing is said on the connection."""
    def look(chain):
        raise Silence("seen enough", chain=chain)

    try:
        request("GET", url, {}, None, context, timeout, 0, look)
    except Silence as seen:
        return seen.chain


def ask_chain(url, context, timeout):
    """The same, and before Python 3.10 what openssl shows above the leaf, too; nobody has verified that."""
    found = fetch_chain(url, context, timeout)
    if sys.version_info < (3, 10):
        host, port = find_origin(url)
        # it fails where it is asked for a certificate of its own, after it has shown them
        command = ["openssl", "s_client", "-showcerts", "-connect", f"[{host}]:{port}"]
        found += parse_pem(run_command(command, timeout).stdout)
    return found


def fetch_from_mis(url, config, headers={"Accept": JSON_TYPE}, limit=MAX_CERTIFICATES):
    """GET from the Margo Identity Service, of JSON unless headers say otherwise (C-045).

    Only revocation lists, which are signed, may come without TLS.
    """
    context, check_peer = obtain_mis_context(config, url) if url.startswith("https:") else (None, None)
    return request("GET", url, headers, None, context, config.wfm.timeout, limit, check_peer)


# Keys, which openssl makes and uses; the agent never holds a private one.

def run_openssl(command, *values, data=b"", expected=b""):
    """What one openssl command prints on stdout.

    command: its fixed words as one would type them; values: what follows.  Raises CommandError where it does
    not say `expected` or ends with another code than 0, and ConfigError where there is no openssl.
    """
    output = run_command(["openssl", *command.split(), *values], 60, data=data)
    if output.code or expected not in output.stdout + output.stderr.encode():
        raise CommandError(f"openssl {command.partition(' ')[0]} failed: {output.stderr}")
    return output.stdout


def lend_file(data):
    """A file that holds `data` until it is closed, in memory where that goes; openssl and ssl want a name."""
    import tempfile
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    file = tempfile.NamedTemporaryFile(prefix="margo-", dir=memory)
    file.write(data)
    file.flush()
    return file


def obtain_key(path, algorithm=None):
    """Makes a key (PKCS#8 PEM, mode 0600) unless there is one; whether it did (C-018, E-030).

    Raises CommandError.
    """
    if os.path.exists(path) or is_uri(path):        # whoever made the token made its key
        return False
    kind = KEY_KINDS.get(algorithm or "ecdsa-p256-sha256", "RSA -pkeyopt rsa_keygen_bits:3072")
    write_file(path, run_openssl("genpkey -algorithm " + kind, expected=b"PRIVATE KEY"))
    log("info", "new private key", path=path)
    return True


def load_public_key(path):
    """The public key of a private one, as it stands in a certificate (DER); raises CommandError."""
    return run_openssl("pkey -pubout -outform DER -in", path)


def run_csr(path, form="PEM"):
    """A PKCS#10 request for a key; it carries no names, because the issuer decides on them (E-035)."""
    return run_openssl("req -new -batch -sha256 -subj / -outform", form, "-key", path)


# ----------------------------------------------------------------------------------------------------------
# 12. Eligibility
# ----------------------------------------------------------------------------------------------------------

def check_eligibility(constraints, capabilities):
    """Raises ComponentError where a device does not meet `deviceConstraints` (protocol 8).

    INSUFFICIENT_CAPACITY comes first, NOT_ELIGIBLE only if capacity holds (C-202).  One rule that matches is
    enough, no rules are no condition (C-204).  capabilities: the document reported for the device; its totals
    count, not what is free.
    """
    properties = capabilities["properties"]
    labels = capabilities.get("labels", {})
    lack = find_lack(constraints.get("capacityRequirements") or {}, properties)
    if lack:
        raise ComponentError("INSUFFICIENT_CAPACITY", lack)
    reasons = [find_mismatch(rule, properties, labels) for rule in constraints.get("eligibilityRules") or ()]
    if reasons and all(reasons):
        words = [f"eligibilityRules[{index}]: {reason}" for index, reason in enumerate(reasons)]
        raise ComponentError("NOT_ELIGIBLE", "; ".join(words))


def find_lack(required, properties):
    """What of `capacityRequirements` the properties of a device do not offer, in words, or ""."""
    cpu = required.get("cpu")
    if cpu:
        wanted = cpu.get("architectures")
        # one entry must do: cores are never summed (C-203)
        most = max((entry.get("cores", 0) for entry in properties.get("cpus") or ()
                    if not wanted or entry.get("architecture") in wanted), default=0)
        if most < cpu["cores"]:
            kinds = " or ".join(map(str, wanted or ["any architecture"]))
            return f"cpu: {cpu['cores']} cores of {kinds} are needed, there are {most}"
    for key in ("memory", "storage"):
        if required.get(key) and parse_size(required[key]) > parse_size(properties.get(key, "0")):
            return f"{key}: {required[key]} are needed, there are {properties.get(key, 'none')}"
    return ""


def find_mismatch(rule, properties, labels):
    """Why an eligibility rule does not match, in words, or "".

    All its selectors have to match, each with all its expressions (C-204).
    """
    # property keys are pointers, label keys are exact (C-205)
    looks = {"propertySelector": lambda key: find_pointer(properties, key),
             "labelSelector": lambda key: (key in labels, labels.get(key))}
    words = "is false"
    try:
        check_shape(rule, dict, "the rule")
        for name, look in looks.items():
            for expression in get_expressions(rule, name) if rule.get(name) is not None else ():
                shown = make_printable(" ".join(map(str, expression.values())), 200)
                words = f"{name} {shown} is false"
                if not is_match(expression, look):
                    return words
    except ValueError as error:                     # what breaks the rules is false (C-212)
        return f"{words}, because {error}"
    return ""


def get_expressions(holder, name):
    """The matchExpressions of a selector; raises ValueError where there are none."""
    check_shape(holder, {name: {"matchExpressions": [{"key": "(?s).*", "operator": "(?s).*"}]}}, "")
    if not holder[name]["matchExpressions"]:
        raise ValueError(f"{name}.matchExpressions: none")
    return holder[name]["matchExpressions"]


def find_pointer(value, pointer):
    """(True, what an RFC 6901 JSON Pointer leads to) or (False, None).

    Raises ValueError for what is no pointer.
    """
    if not re.fullmatch(r"(/([^~/]|~[01])*)+", pointer, re.S):
        raise ValueError("the key is no JSON Pointer")
    for part in pointer[1:].split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, list) and re.fullmatch(r"0|[1-9][0-9]{0,8}", part) and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            return False, None
    return True, value


def is_match(expression, look):
    """Whether one matchExpression holds; look: key to (present, value).

    Raises ValueError for one that breaks the rules.
    """
    operator = expression["operator"]
    values = expression.get("values")
    if (operator in ("In", "NotIn", "Gt", "Lt")) == ("values" not in expression):   # C-208 to C-211
        raise ValueError(f"{operator} takes {'no ' if 'values' in expression else ''}values")
    present, value = look(expression["key"])
    if operator in ("Exists", "DoesNotExist"):
        return present == (operator == "Exists")
    if operator in ("ContainsAll", "ContainsAny"):
        parts = get_expressions(expression, "itemSelector")     # their keys are relative to the item (C-211)
        combine = all if operator == "ContainsAll" else any
        return isinstance(value, list) and all(isinstance(item, dict) for item in value) and any(
            combine([is_match(part, lambda key, item=item: find_pointer(item, key)) for part in parts])
            for item in value)
    if operator in ("Gt", "Lt"):
        limit = parse_limit(values)
        return get_kind(value) == "number" and (value > limit if operator == "Gt" else value < limit)
    if operator not in ("In", "NotIn"):
        raise ValueError(f"{make_printable(operator, 40)} is no operator")
    check_shape(values, list, "values")
    kinds = set(map(get_kind, values))
    if kinds not in ({"text"}, {"number"}) and (kinds != {"boolean"} or len(values) > 1):
        raise ValueError("values must be texts, or numbers, or one boolean")
    listed = isinstance(value, list)
    items = value if listed else [value]
    there = list(map(get_kind, items))
    if not items or None in there or listed and "boolean" in there:     # false for both (C-206)
        return False
    return any(get_kind(item) in kinds and item in values for item in items) == (operator == "In")


def parse_limit(values):
    """The one number that Gt and Lt compare with; raises ValueError (C-210)."""
    limit = values[0] if isinstance(values, list) and len(values) == 1 else None
    if isinstance(limit, str) and re.fullmatch(r"[-+]?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?", limit):
        return float(limit)
    if get_kind(limit) != "number":
        raise ValueError("values must be one number")
    return limit


# ----------------------------------------------------------------------------------------------------------
# 13. Capabilities
# ----------------------------------------------------------------------------------------------------------

# What shows equipment: its kind, a folder of /sys, a pattern of the names in it; and of some a file or folder
# below such a name, and a pattern that is found in the file, or among the names in that folder.
PERIPHERAL_SIGNS = (
    ("gpu", "class/drm", "card[0-9]+"),
    ("display", "class/drm", ".+", "status", "^connected"),
    ("camera", "class/video4linux", ".+"),
    ("microphone", "class/sound", "pcmC[0-9]+D[0-9]+c"),
    ("speaker", "class/sound", "pcmC[0-9]+D[0-9]+p"),
)
# Of a network interface the first row that fits.  What comes and goes with containers is of no kind, so that
# the document does not change with them.
INTERFACE_SIGNS = (
    ("wifi", "class/net", ".+", "wireless", "."),
    ("wifi", "class/net", ".+", "phy80211", "."),
    ("cellular", "class/net", "wwan.*"),
    ("cellular", "class/net", ".+", "uevent", "DEVTYPE=wwan"),
    ("canbus", "class/net", ".+", "type", "^280$"),
    ("", "class/net", "(?:lo|veth|br-|docker|podman|cni|virbr|tap|tun|wg|dummy|bond|vlan|vxlan|flannel).*"),
    ("", "class/net", ".+", "bridge", "."),
    ("ethernet", "class/net", ".+", "type", "^1$"),
    ("bluetooth", "class/bluetooth", ".+"),
    ("usb", "bus/usb/devices", ".+"),
    ("rs232", "class/tty", "ttyS.*", "type", "^(?!0$)."),
)


def read_fact(*path):
    """The text of a small file of /proc or /sys, the names in a folder, "" where there is neither."""
    path = os.path.join(*path)
    try:
        if os.path.isdir(path):
            return "\n".join(sorted(os.listdir(path)))
        with open(path, "rb") as file:
            return file.read(65536).decode("utf-8", "replace").strip("\0 \t\r\n")
    except OSError:
        return ""


def read_signs(root, signs):
    """{path in /sys: kind}, each by the first of some signs that fits."""
    found = {}
    for kind, folder, names, *inner in signs:
        folder = f"{root}/sys/{folder}/"
        for name in re.findall(f"(?m)^{names}$", read_fact(folder)):
            path = folder + name
            if path not in found and (not inner or re.search(inner[1], read_fact(path, inner[0]))):
                found[path] = kind
    return found


def detect_properties(state_dir, root="/", hostname=False):
    """What the running system says of itself, in rc.3's property names.

    Values that the device keeps from one poll to the next.  hostname: whether its name is told, too (draft).
    """
    cpu = {"cores": len(os.sched_getaffinity(0))}
    if os.uname().machine in ARCHITECTURES:
        cpu["architecture"] = ARCHITECTURES[os.uname().machine]
    memory = read_fact(root, "proc/meminfo").partition("MemTotal:")[2].split() or ["0"]         # in kB
    disk = os.statvfs(state_dir if os.path.isdir(state_dir) else "/")
    kinds = set(read_signs(root, INTERFACE_SIGNS).values()) - {""}
    found = {
        "vendor": detect_text(root, "sys_vendor", "") or "unknown",
        "modelNumber": detect_text(root, "product_name", "model") or "unknown",
        "serialNumber": detect_text(root, "product_serial", "serial-number") or "unknown",
        "cpus": [cpu],
        "memory": f"{int(memory[0]) // 1024}Mi",
        "storage": f"{disk.f_blocks * disk.f_frsize // MIB}Mi",
        "peripherals": detect_peripherals(root),
        "interfaces": [{"type": kind} for kind in sorted(kinds)],
    }
    label = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"           # RFC 1123
    name = hostname and re.match(label, os.uname().nodename)
    if name:
        found["hostname"] = name.group()
    return found


# What boards say that have nothing of their own to say, without blanks and signs; and what counts up or down,
# from whose start five or more characters are taken.
PLACEHOLDERS = frozenset((
    "oem default defaultstring standard none null empty blank invalid tbd test dummy na unknown undefined"
    " unspecified notspecified notapplicable notavailable notprovided notpresent notset noassettag noserial"
    " noserialnumber serial serialno serialnumber 03000200040005000006000700080009").split())
COUNTING = ("0123456789abcdef 123456789abcdef 12345678901234567890 fedcba9876543210 9876543210"
            " 987654321").split()


def is_placeholder(text):
    """Whether the firmware's text says nothing of this one device.

    So does the name of the field itself, such as `System Serial Number`, and one character again and again.
    """
    text = text.lower()
    plain = re.sub(r"[\W_]", "", text)
    repeats = len(set(plain)) == 1 and len(text) > 2
    counts = len(plain) > 4 and any(row.startswith(plain) for row in COUNTING)
    named = re.match(r"to\Wbe\Wfilled|(type ?[0-9]+ \W*)?(system|chassis|base ?board|board|product)\W", text)
    return plain in PLACEHOLDERS or not plain.strip("0") or repeats or counts or bool(named)


def detect_text(root, dmi, tree):
    """One text of the firmware, "" for a placeholder: from DMI on a PC, from the device tree elsewhere."""
    text = read_fact(root, "sys/class/dmi/id", dmi)
    if not text and tree:
        text = read_fact(root, "proc/device-tree", tree)
    return "" if is_placeholder(text) else make_printable(text, 120)


def detect_peripherals(root):
    """Graphics, displays, cameras and sound as /sys shows them."""
    found = []
    for path, kind in read_signs(root, PERIPHERAL_SIGNS).items():
        item = {"type": kind}
        model = read_fact(path, "name") if kind == "camera" else ""
        if model:
            item["model"] = make_printable(model, 120)
        if item not in found:
            found.append(item)
    return found


def get_device_id(device, root="/"):
    """The device's id: configured, or the hardware's serial number, or the machine id.

    Its characters are those that need no escape in a URL (C-086).
    """
    if device.id:
        return device.id
    found = device.serialNumber or detect_text(root, "product_serial", "serial-number")
    machine = read_fact(root, "etc/machine-id")     # `uninitialized` in an image that has not booted yet
    found = found or (machine if re.fullmatch("(?!0+$)[0-9a-f]+", machine) else "")
    name = re.sub(r"[^A-Za-z0-9._~-]+", "-", found).strip("-.")
    if not name:
        raise ConfigError(
            "device.id: not set, and this hardware has no serial number or machine id to take instead"
        )
    return name


HOSTING_PROPERTIES = ("cpus memory storage peripherals interfaces otelCollector supportedRuntimes"
                      " supportedDeploymentTypes").split()


def make_capabilities(detected, device, device_id, deployment_types):
    """The DeviceCapabilitiesManifest of rc.3 (protocol 3.5).

    What the operator says counts more than what was detected (C-085).  A device on which nothing runs
    workloads says nothing of hosting (C-084).
    """
    properties = dict(detected, supportedRuntimes=["oci"], supportedDeploymentTypes=list(deployment_types),
                      otelCollector=True)
    properties.update({key: device[key] for key in ("vendor", "modelNumber", "serialNumber") if device[key]})
    properties.update(device.properties)
    if not deployment_types:
        properties = {key: value for key, value in properties.items() if key not in HOSTING_PROPERTIES}
    properties["id"] = device_id
    # extensions stand at the root (protocol 3.5)
    document = {name: item for name, item in properties.items() if name.startswith("x-")}
    document["properties"] = {name: item for name, item in properties.items() if name not in document}
    if device.labels:
        document["labels"] = dict(device.labels)
    return document


def load_capabilities(devices, config):
    """{device id: capabilities document} as they are now; a child is what the configuration says of it."""
    documents = {}
    for device in devices:
        nothing = {"peripherals": [], "interfaces": []}
        own = not device.silence
        detected = detect_properties(config.state_dir, hostname=config.device.hostname) if own else nothing
        documents[device.device_id] = make_capabilities(detected, device.settings, device.device_id,
                                                        sorted(device.drivers))
    return documents


def report_devices(documents, source, state, always):
    """PUTs what changed of {device id: capabilities document}, a gateway's own first.

    DELETEs that of a device that has gone (C-081, C-082, C-220, C-223).  always: all are sent, and every
    fault is raised.  Changes state["enrollment"].  What the WFM does not take waits by a back-off of its own,
    and holds up nothing else.  Returns whether the WFM could be reached.
    """
    known = (state["enrollment"] or {}).get("devices", {})
    devices = [*documents, *sorted(set(known) - set(documents), reverse=True)]
    for key in list(state["waits"]):                # also of a device that has gone before it was known
        if key.partition(" ")[2] not in ["", *devices]:
            del state["waits"][key]
    for device_id in devices:
        key = f"capabilities {device_id}"
        wait = state["waits"].get(key, {})
        clock = get_clock()
        if find_wait(wait, clock) and not always:
            continue
        try:
            report_device(device_id, documents, source, state, always)
            state["waits"].pop(key, None)
        except (Refused, Unreachable, Untrusted) as error:
            if always or not state["enrollment"]:
                raise
            log("error", "the WFM does not take the capabilities", device=device_id, reason=error.message)
            state["waits"][key] = make_hold(wait, error, clock, get_random())
            if not error.status and not isinstance(error, Refused):
                return False
    return True


def report_device(device_id, documents, source, state, always, again=True):
    """PUTs one device's capabilities, or DELETEs those of one that has gone; raises what is no verdict.

    A WFM that does not know the gateway of a child is told of the gateway first (protocol 2.2).
    """
    own_id = next(iter(documents))
    devices = dict((state["enrollment"] or {}).get("devices", {}))
    digest = device_id in documents and sha256_digest(make_json(documents[device_id]))
    if devices.get(device_id) == digest and not always:
        return
    try:
        if digest:
            source.put_capabilities(device_id, documents[device_id])
            log("info", "capabilities reported", device=device_id)
        else:
            source.delete_capabilities(device_id)
            log("info", "a device has gone; its capabilities are withdrawn", device=device_id)
    except Refused as error:
        if again and digest and device_id != own_id and error.code in ("gateway-not-found", "HTTP 404"):
            report_device(own_id, documents, source, state, True)
            report_device(device_id, documents, source, state, True, again=False)
            return
        judged = error.code in ("invalid-request", "semantic-error", "HTTP 400", "HTTP 413", "HTTP 422")
        if not state["enrollment"] or not judged and (digest or error.status < 400):
            raise                                   # no verdict on the document: it is sent again (C-082)
        log("error", "the WFM refuses the capabilities", device=device_id, reason=error.message)
    # What was refused is noted, too: it is not sent again unchanged.
    if digest:
        devices[device_id] = digest
    else:
        devices.pop(device_id)
    state["enrollment"] = {"id": source.client_id, "devices": devices}


# ----------------------------------------------------------------------------------------------------------
# 14. Compose driver
# ----------------------------------------------------------------------------------------------------------

Changes = define("Changes", "kept idle making leaving",
    "What becomes of the services of a project: {name: Container} that go on, names of those that need"
    " no start, [Service] to be made, and [[Container]] that leave, those that stop together in one list,"
    " whoever depends on others first.")
Job = define("Job", "workload project folder known deadline current restarts volumes",
    "One apply: what runs, in which folder its files are, what an earlier apply returned, until when;"
    " {service: id of its container} as far as it has come, {id: how often it had been restarted} of what ran"
    " before, {service: {path: volume}} of volumes to which nobody gave a name.")
Shown = define("Shown", "state code restarts health volumes check said",
    "One container as `inspect` shows it: the engine's word for its state, numbers, the word for its health"
    " where there is a check, {path: name} of volumes in it, its Check or None, what that has printed last.",
    0, 0, "", {}, None, "")
Check = define("Check", "interval retries start",
    "A health check, wherever it was said: seconds between two, misses that count, seconds of grace.")
# How docker shows a container, in podman's form.
DOCKER_FORM = ('{"Id":{{json .ID}},"Names":[{{json .Names}}],"State":{{json .State}},'
               '"Status":{{json .Status}},"Labels":{%s}}')
# What podman, or docker, says of itself, by our words.
INFO = {"architecture": ("arch", "Architecture"), "root": ("graphRoot", "DockerRootDir"),
        "version": ("Version", "ServerVersion"), "network": ("networkBackend",),
        "runtime": ("DefaultRuntime",)}
PULL_NOTE = 60                      # seconds between two lines of the log about a pull
LOG_LINES = 4000                    # of a log that are looked at for its end
MAX_LOG = 256 * KIB                 # bytes of them
RUNS_TOO = {"amd64": "386", "arm64": "arm"}         # what a processor usually runs beside its own
# What versions of an engine lack.
LACKS = (("podman", "4.7", "`host-gateway` is the gateway of the first network"),
         ("podman", "4.8", "`driver_opts` of a volume take no `size`; `tmpfs` of a service takes one"),
         ("docker", "20.10", "`host-gateway` fails"))
# With these an engine looks a program up, and the kernel does not start it: its environment is too long.
UNSTARTABLE = ["--ulimit=stack=262144", *(f"--env=MARGO_TRIAL_{name}=" + "x" * 66000 for name in "AB")]
# An engine's words for what does not run.
AT_REST = ("exited", "created", "initialized", "stopped", "configured")


def make_claim(owner, state):
    """The Claim of an agent to what runs: by its state, and by the owner that it is now ("": not known)."""
    records = state["deployments"]
    services = [component["services"] for record in records.values() for component in record["components"]]
    for record in records.values():
        services += (record["running"] or {}).get("services", {}).values()
    ids = {facts.get("id") for items in services for facts in items.values()}
    wanted = {item["deploymentId"].lower() for item in (state["accepted"] or {}).get("deployments", ())}
    return Claim(owner, frozenset(state["owners"]), wanted.union(records), ids - {None},
                 frozenset(state["pulled"]))


def is_ours(claim, deployment_id, owner, container_id=None):
    """Whether a workload, or a network or volume of one, is this agent's.

    It is by its owner's label, whatever became of the state.  One that the state tells of is, too, unless it
    is labelled by a stranger: by the container's id, or by the deployment's where the label is of an earlier
    time, or older than such labels (contract, On the engine).
    """
    known = deployment_id.lower() in claim.deployments and (not owner or owner in claim.owners)
    return known or container_id in claim.ids or owner == claim.owner != ""


def judge_startup(names, facts, complete=False):
    """Where a start stands: ((service, code, failure) or None, {service: what is waited for}, {finished}).

    names: of services; facts: {service: Shown} of those that have a container; complete: all of them have to
    end (C-163 to C-165).
    """
    waiting = {}
    finished = set()
    for name in names:
        seen = facts.get(name)
        if seen is None:
            words = f"the container of service {name} is gone: somebody removed it"
            return (name, "INSTALL_FAILED", words), {}, finished
        ended = seen.state in ("exited", "stopped", "dead")
        if seen.restarts or ended and seen.code != 0:
            code = f" with code {seen.code}" if ended else ""
            again = f" ({seen.restarts} restarts)" if seen.restarts else ""
            return (name, "INSTALL_FAILED", f"service {name} exited{code}{again}"), {}, finished
        if ended:
            finished.add(name)
        elif seen.state != "running":
            waiting[name] = f"{name} is {seen.state}"
        elif seen.health == "unhealthy":
            said = seen.said and f"; its health check has printed: {seen.said}"
            return (name, "UNHEALTHY", f"service {name} is unhealthy{said}"), {}, finished
        elif seen.health not in ("", "healthy"):
            waiting[name] = f"{name} is not healthy yet"
        elif complete:
            waiting[name] = f"{name} has not ended"
    return None, waiting, finished


def mask(text, values):
    """A tool's words without the values of parameters (D-35)."""
    spelt = {form for value in values
             for form in (value, make_printable(value, len(value)), *value.splitlines())}
    for form in sorted(spelt, key=len, reverse=True):
        text = text.replace(form, "***") if len(form) > 2 else text
    return text


def is_usable(container, service, known):
    """Whether a container was made for a service as it is wanted, and can go on from its state."""
    ours = not known or known["hash"] != service.hash or known.get("id", container.id) == container.id
    return ours and (container.service, container.hash) == (service.name, service.hash) and (
        container.state in AT_REST or container.state in ("running", "restarting"))


def plan_services(services, present, known, networks):
    """The Changes that lead from what is there to what is wanted (P-7, P-16).

    present: [Container] of this component; known: what an earlier apply returned; networks: names of those
    that are about to be made.  Made anew is, too, whose network is, who shares a namespace of a service that
    starts anew, and who holds a port or address that one needs which is made before it.
    """
    kept, making = {}, []
    idle = set()
    rivals = find_rivals(services)
    for service in services:
        facts = known.get(service.name)
        usable = [item for item in present if is_usable(item, service, facts)]
        running = [item for item in usable if item.state == "running"]
        displaced = running and any((service.name, other.name) in rivals for other in making)
        joined = networks.intersection(item.network for item in service.networks)
        if usable and not displaced and not joined and idle.issuperset(service.shares):
            kept[service.name] = (running or usable)[0]
            if running or facts and facts["finished"] and facts["hash"] == service.hash:
                idle.add(service.name)
        else:
            making.append(service)
    leaving = [item for item in present if item not in kept.values()]
    return Changes(kept, idle, making, order_leaving(services, leaving))


def order_leaving(services, leaving):
    """[[Container]]: those that stop at once in one list, each before what it depends on.

    What the file no longer names is in the first one.
    """
    levels, groups = {}, {}
    for service in reversed(services):              # whoever depends on others comes first here
        level = levels.setdefault(service.name, 0)
        for name in service.depends_on:
            levels[name] = max(levels.get(name, 0), level + 1)
    for item in leaving:
        groups.setdefault(levels.get(item.service, 0), []).append(item)
    return [groups[level] for level in sorted(groups)]


def is_same_network(labels, facts, arguments):
    """Whether a network that is there is what these create arguments make.

    One that an agent made before there was such a mark may be, unless it is open and should not be.
    """
    if LABEL_HASH in labels:
        return f"--label={LABEL_HASH}={labels[LABEL_HASH]}" in arguments
    return facts.get("internal", False) == ("--internal" in arguments)


def plan_networks(wanted, there, project):
    """What becomes of networks: ({name: create arguments} to be made, [names] to go before, and last).

    wanted: as in a Project; there: {name: (labels, facts)} of those and of all others of this compose
    project.  One of somebody else stays as it is.  One that is no longer wanted goes first where a new one
    may be after its addresses.
    """
    ours = {name for name, (labels, _) in there.items() if labels.get(LABEL_PROJECT) == project}
    new = {name: arguments for name, arguments in wanted.items() if arguments is not None and (
        name not in there or name in ours and not is_same_network(*there[name], arguments))}
    changed = sorted(ours.intersection(new))
    dropped = sorted(ours - set(wanted))
    ranged = any(argument.startswith("--subnet=") for arguments in new.values() for argument in arguments)
    return new, changed + (dropped if ranged else []), [] if ranged else dropped


# Options of `create` that a trial goes without: they need a network, or another container, or a run.
UNTRIED = ("--(init\\Z|volume|tmpfs|publish|add-host|dns|mac-address|health|no-health|restart|pid=c|ipc=c)|"
           "--sysctl=\"?net[./]ipv[46][./](conf|neigh)[./]")


def make_trial(service, engine, written):
    """The Service of a trial, see ComposeDriver.rehearse; written: volumes and folders that others fill.

    Docker can only start it, so that it is made unstartable.  Nothing is labelled anew for SELinux while
    another container uses it.
    """
    arguments = [argument for argument in service.arguments if not re.match(UNTRIED, argument)]
    mounts = [mount for mount in service.mounts if mount.source not in written]
    for mount in mounts:
        options = [option for option in mount.options if option not in ("z", "Z")]
        arguments.append(make_mount_argument(mount._replace(options=options)))
    if len(mounts) < len(service.mounts):           # its program may lie there: this one is in each container
        service = service._replace(command=())
        arguments += ["--entrypoint=/proc/self/exe", "--workdir=/"]
    arguments += UNSTARTABLE if engine != "podman" else []
    return service._replace(arguments=arguments, shares=(), hash="",
                            networks=[Attachment("none", None, None)])


def check_addresses(services, project, engine, there=None):
    """Raises ComponentError for an address that a network cannot give: an engine says so at the start alone.

    there: {name: (labels, facts)} of the networks that are there by now; without it an external one is passed
    over, and one of which podman will choose the subnet.  Docker gives none out of what it has chosen itself.
    """
    for service in services:
        for network, _, options in service.networks:
            arguments = project.networks.get(network)
            text = "\n".join(arguments or ())
            if arguments is None or engine == "podman" and "--subnet=" not in text:
                if there is None:
                    continue
                text = make_ranges(there.get(network, ({}, {}))[1])
            for option in options or ():
                kind, _, address = option.partition("=")
                if kind in ("--ip", "--ip6") and not may_have_address(text, address):
                    where = f"services.{service.name}.networks"
                    raise make_fault(f"{where}: {make_printable(address, 60)!r} lies in no `subnet` of"
                                     f" network {network}, or is the host's own there")


def check_external(project, networks, volumes, services):
    """Raises ComponentError where services use an external network or volume that is not there.

    networks, volumes: what is there, by its name.  To the engine a name could be the beginning of another
    one's id.
    """
    used = {item.network for service in services for item in service.networks}
    used.update(mount.source for service in services for mount in service.mounts)
    kinds = ("network", project.networks, networks), ("volume", project.volumes, volumes)
    for kind, wanted, there in kinds:
        for name in sorted(used.intersection(wanted).difference(there)):
            if wanted[name] is None:
                raise ComponentError("INSTALL_FAILED", f"there is no {kind} {name} on this device;"
                                     " `external: true` takes one that is there")


def find_rivals(services):
    """{(service, an earlier one): what both would have}, of the host's ports and addresses in networks."""
    taken, rivals = {}, {}
    for service in services:
        things = list(service.ports)
        for network, _, options in service.networks:
            things += [("", network, option.strip("-")) for option in options or ()]
        for address, *key in things:
            holders = taken.setdefault(tuple(key), [])
            for held, other in holders:
                if may_meet(held, address):
                    rivals[service.name, other] = f"{key[0]} {key[1]}"
            holders.append((address, service.name))
    return rivals


def may_meet(address, other):
    """Whether a port of the host at one address is one at the other, too; "" is every address."""
    general = {"", "0.0.0.0", "::"}.intersection((address, other))
    same_kind = (":" in address) == (":" in other)
    return address == other or "" in general or same_kind and bool(general)


def check_rivals(services):
    """Raises ComponentError for a port of the host, or an address, that two services would have at a time.

    Who starts once another one has ended can have what that had.
    """
    rivals = find_rivals(services)
    ended = set()
    for service in services:                        # they are started in this order
        ended.update(name for name, (condition, _) in service.depends_on.items()
                     if condition == "service_completed_successfully")
        for (name, other), thing in rivals.items():
            if name == service.name and other not in ended:
                raise make_fault(f"services.{name}: it cannot have {thing} beside service {other}")


def ask_ports(services, known):
    """Raises ComponentError for a port that another program holds; known: as in a Job, for what is held."""
    held = {tuple(port[1:]) for facts in known.values() for port in facts.get("ports", ())}
    for service in services:
        for address, *port in service.ports:
            if tuple(port) not in held and ask_taken(address, *port):
                where = f"{address or '*'}:{port[0]}/{port[1]}"
                raise ComponentError("PORT_IN_USE", f"another program holds the host's port {where}, which"
                                     f" service {service.name} publishes")


def ask_taken(address, number, protocol):
    """Whether somebody listens at an address and port, as far as is seen from here."""
    import errno
    import socket
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}.get(protocol, socket.SOCK_SEQPACKET)
    try:
        with socket.socket(family, kind) as probe:
            if ":" in address:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if protocol == "tcp":                   # else what was closed just now is in the way
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address or "0.0.0.0", number))
    except OSError as error:                        # whatever else there is, the engine will say
        return error.errno == errno.EADDRINUSE
    return False


def make_path(text):
    """A path in a container in its shortest spelling."""
    return re.sub("/+", "/", text).rstrip("/") or "/"


def make_volume_names(project, prefix, known, present, seen):
    """{service: {path: volume}} for each volume to which nobody gave a name: in the file, or by the image.

    It goes by a name of ours, so that whatever is made in the place of a container finds it.  known, present,
    seen: what an earlier apply returned and [Container] and {id: Shown} of what there is, where an earlier
    agent may have left a volume to the engine to name.
    """
    before = {name: dict(facts.get("volumes", {})) for name, facts in known.items()}
    for container in sorted(present, key=lambda item: item.state == "running"):
        if container.id in seen:
            before.setdefault(container.service, {}).update(seen[container.id].volumes)
    volumes = {}
    for service in project.services:
        named = set(map(make_path, service.files))
        unnamed = set(map(make_path, service.declared))
        for mount in service.mounts:
            paths = unnamed if mount.kind == "volume" and not mount.source else named
            paths.add(make_path(mount.target))
        there = before.get(service.name, {})
        volumes[service.name] = {}
        for path in sorted(unnamed - named):
            name = f"{prefix}_{service.name}_{sha256_digest(path.encode())[7:19]}"
            volumes[service.name][path] = there.get(path) or name
    return volumes


def find_program(name, environ):
    """Where a program lies on PATH, or None; shutil.which without all that shutil brings along."""
    paths = [os.path.join(folder, name) for folder in list_folders(environ)]
    return next((path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)), None)


def find_engine(setting, environ):
    """`podman`, `docker` or None: what is installed and looks usable, told without starting anything."""
    socket = environ.get("DOCKER_HOST") or os.path.exists("/var/run/docker.sock")
    for name in ("podman", "docker") if setting == "auto" else (setting,):
        if find_program(name, environ) and (name == "podman" or setting == name or socket):
            return name
    return None


def make_child_environment(environ, connection):
    """The environment of commands for a child device: nothing in it leads to what is the gateway's own."""
    return dict({key: item for key, item in environ.items() if key not in CONNECTIONS}, **connection)


def make_compose_driver(config, child=None, others=(), environ=None):
    """The ComposeDriver of the configuration, None where nothing on this device runs compose components.

    child: (device id, connection) of a child device, whose connection says which engine it has; others: ids
    of all other devices.
    """
    environ = dict(os.environ if environ is None else environ)
    environ.update(get_temporary(config.state_dir, environ))
    setting = config.runtime.engine if config.runtime.compose != "off" else ""
    if child:
        environ = make_child_environment(environ, child[1])
        setting = max({CONNECTIONS.get(key) for key in child[1]} & {"podman", "docker"}, default="")
        others = ["", *others]
    engine = setting and find_engine(setting, environ)
    return ComposeDriver(engine, config, environ, child or ("", {}), others) if engine else None


# Where podman looks for its own helpers, beside PATH.
HELPER_FOLDERS = ("/usr/local/libexec/podman", "/usr/local/lib/podman", "/usr/libexec/podman",
                  "/usr/lib/podman")


def list_active(containers):
    """[id] of those containers that there is something to stop of."""
    return [container.id for container in containers if container.state not in AT_REST]


def find_containers(deployment_id, containers, component=None, kind=None):
    """The containers of one deployment; of one component and one deployment type, where they are given."""
    wanted = deployment_id.lower(), component, kind
    return [item for item in containers
            if wanted == (item.deployment_id.lower(), component and item.component, kind and item.type)]


def find_cause(stderr):
    """What an engine says of a failure, without what it tried before: from its first `Error` on.

    Ids of 64 digits are cut to the 12 that the engine shows elsewhere.
    """
    cause = re.split(r"(?:^|\\n)(?=Error)", stderr, maxsplit=1)[-1]       # made printable
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", cause)[-1500:]


def is_before(version, other):
    """Whether a version is earlier than another one, such as 4.7; one that is unknown is not."""
    first, second = ([int(number) for number in re.findall("[0-9]+", text)[:2]] for text in (version, other))
    return bool(first) and first < second


class ComposeDriver:
    """Runs compose components by an engine's own commands.

    Containers are found by their labels, by one query for all, and judged by what the engine shows of them.
    """

    def __init__(self, engine, config, environ=None, child=("", {}), others=()):
        self.engine, self.config = engine, config
        self.environ = os.environ if environ is None else environ
        self.claim = NOBODY                         # by what a container is ours, as of the last look
        self.info = {}                              # see ask_info
        self.strangers = []                         # [Container] not ours that the last look has shown
        self.beside = ()                            # ids of other devices' containers that it has shown
        self.device_id, connection = child
        self.others = frozenset(others)             # devices whose containers are not ours, even here
        remote = set(CONNECTIONS) - {"CONTAINERS_STORAGE_CONF", "KUBECONFIG"}
        self.remote = not remote.isdisjoint(connection)

    def run(self, arguments, code=None, timeout=60, more=None):
        """The Output of one engine command; more: for its environment.

        With `code` a failure raises ComponentError of that code.
        """
        environ = dict(self.environ, **(more or {}))
        output = run_command([self.engine] + arguments, max(1.0, timeout), env=environ)
        if code and output.code:
            raise ComponentError(code, f"{self.engine} {arguments[0]} failed: {find_cause(output.stderr)}")
        return output

    def observe(self, records=(), claim=None):
        """Every container of ours in any state, by one query.

        records: of the deployments that are known to need this driver; a leftover is looked for all the same
        (P-11).  claim: by what one is ours; None: as it was told last.  Raises CommandError where the engine
        does not answer.
        """
        self.claim = claim or self.claim
        self.info = {}
        form = "json"
        if self.engine != "podman":
            form = DOCKER_FORM % ",".join(f'"{name}":{{{{json (.Label "{name}")}}}}' for name in LABELS)
        options = ["--all", "--no-trunc", f"--filter=label={LABEL_DEPLOYMENT}", f"--format={form}"]
        output = self.run(["ps"] + options, timeout=20 if self.remote else 60)
        if output.code:
            words = f"{self.engine} ps: {find_cause(output.stderr)}"
            raise CommandError(f"the container engine does not answer ({words}); put it right, or see"
                               " runtime.engine")
        found = parse_containers(output.stdout, self.engine, time.time())
        ours, self.strangers = part_containers(found, self.claim)
        self.beside = {container.id for container in ours if container.device_id in self.others}
        return [container for container in ours if container.id not in self.beside]

    def ask_strangers(self):
        """[Container] of other owners, as the last look has shown them."""
        return self.strangers

    def prepare(self, deployment, component, known, store, fetched):
        """Fetches and verifies what a component needs, and touches nothing that runs.

        Returns (what `apply` takes, facts of the package).  fetched: a list to which digests of packages and
        names of new images are added, also where it fails afterwards.
        """
        data, package = obtain_package(component, known, self.config, store, "compose")
        fetched.append(package["digest"])
        own_id, name = deployment.deployment_id, component.name
        folder = unpack_package(data, package["digest"], store.path("deployments", own_id.lower(), name),
                                self.config.policy.max_unpacked, relaxed=not component.revision)
        workload = Workload(own_id, name, make_project_name(name, own_id), folder,
                            make_variables(deployment, name), self.config.runtime.environment, component.wait,
                            self.device_id, self.claim.owner)
        again = bool(known) and known["digest"] == package["digest"]
        images = dict(known.get("images", {})) if again else {}
        prepared = self.resolve(workload, PULL_TIMEOUT, again, fetched, images)
        self.ask_names(*prepared)
        return prepared, dict(package, images=images) if images else package

    def ask_names(self, workload, project):
        """Raises ComponentError where a name that a component needs is another owner's; touches nothing."""
        containers = [make_container_name(workload.project, service.name) for service in project.services]
        advice = "remove it there, or call this one otherwise; `external: true` takes it as it is"
        items = {"network": project.networks, "volume": project.volumes,
                 "container": dict.fromkeys(containers, [])}
        for kind, wanted in items.items():
            for name, (labels, facts) in self.inspect_names(kind, list(wanted)).items():
                owner = labels.get(LABEL_OWNER, "")
                made_for = labels.get(LABEL_DEPLOYMENT, workload.deployment_id)
                private = name.startswith(labels.get(LABEL_PROJECT, "/") + "_")
                if private and made_for.lower() != workload.deployment_id.lower():
                    raise make_fault(f"{kind} {name} is of another deployment,"
                                     f" {make_printable(made_for, 60)}; what is shared has a name of its own",
                                     "POLICY_DENIED")
                if wanted[name] is not None and owner and not is_ours(
                        self.claim, workload.deployment_id, owner, facts.get("id")):
                    words = "remove it there" if kind == "container" else advice
                    raise ComponentError("NAME_TAKEN", f"{kind} {name} belongs to another agent,"
                                         f" {make_printable(owner, 300)}: {words}")

    def inspect_names(self, kind, names, there=()):
        """{name: (labels, facts)} of the containers, networks or volumes of these names that there are.

        facts: as the engine shows it, its words in lower case.  there: what has to be shown, because it is
        there (D-16).
        """
        output = self.run([kind, "inspect"] + names) if names else Output(0, b"", "")
        found = {}
        for item in parse_answer(output.stdout or b"[]", self.engine, list):
            facts = {key.lower(): value for key, value in item.items()}
            name = facts["name"].lstrip("/")
            labels = facts.get("labels") or facts.get("config", {}).get("Labels") or {}
            if name in names:                       # what is asked for may be the beginning of an id, too
                found[name] = labels, facts
        if not set(there).issubset(found):
            raise CommandError(f"{self.engine} {kind} inspect failed: {output.stderr[-500:]}")
        return found

    @staticmethod
    def list_ports(prepared):
        """[[address or "", port, protocol]] of the host that what was prepared will hold."""
        return [port for service in prepared[1].services for port in service.ports]

    def check(self, claim):
        """What `doctor` says of this driver; raises CommandError."""
        return f"{self.engine} answers, containers of ours: {len(self.observe((), claim))}"

    def list_volumes(self):
        """The names of this agent's volumes."""
        label = f"--filter=label={LABEL_OWNER}={self.claim.owner}"
        return self.run(["volume", "ls", label, "--format={{.Name}}"]).stdout.decode().split()

    def ask(self, argv):
        """The mapping that a program prints as JSON; {} where it prints none."""
        try:
            return parse_answer(run_command(argv, 60, env=self.environ).stdout, argv[0], dict)
        except CommandError:
            return {}

    def ask_info(self):
        """{architecture, root, version, network, runtime: text} that the engine has said since the last look.

        root: the folder of its images; runtime: docker's; "" for what it does not say.
        """
        if not self.info:
            told = self.ask([self.engine, "info", "--format={{json .}}"])
            for part in ("host", "store", "version"):
                told.update(told.get(part) or {})
            self.info = {key: next((told[name] for name in names if told.get(name)), "")
                         for key, names in INFO.items()}
        return self.info

    def list_lacks(self):
        """What the engine lacks by its version, and podman's own helpers here, in words.

        ([why applications with a network fail or do not find each other], [why others fail]).
        """
        info = self.ask_info()
        notes = [f"{self.engine} before {version}: {words}" for engine, version, words in LACKS
                 if engine == self.engine and is_before(info["version"], version)]
        network = info["network"]
        if network == "cni":
            return ["podman has its networks from CNI: services do not find each other by name; install"
                    " netavark and aardvark-dns"], notes
        if network != "netavark" or self.remote:
            return [], notes
        everywhere = {"PATH": os.pathsep.join([*HELPER_FOLDERS, *list_folders(self.environ)])}
        wanted = self.environ.get("NETAVARK_FW")
        backend = find_program("netavark", everywhere)
        if backend and not wanted:
            wanted = self.ask([backend, "version"]).get("default_fw_driver", "iptables")
        firewalls = {"iptables": ["iptables"], "nftables": ["nft"]}
        programs = ["netavark", "aardvark-dns"] + firewalls.get(wanted, [])
        words = {"aardvark-dns": "services do not find each other by name"}
        lacks = [f"install {name}: without it {words.get(name, 'applications with a network fail')}"
                 for name in programs if not find_program(name, everywhere)]
        if not find_program("catatonit", everywhere):
            notes.append("install catatonit: without it `init: true` fails")
        return lacks, notes

    def resolve(self, workload, timeout, again=False, fetched=None, images=None):
        """The compose file read, checked and resolved, the images pulled.

        That is all that can fail without touching what runs (C-154, D-11).  again: this package ran here
        before; then an image that is here will do where its registry does not answer (P-1).  fetched: as in
        prepare.  images: {image of the file: the name by which it was found good}, kept up.
        """
        project = self.load_project(workload)
        fetched = [] if fetched is None else fetched
        images = {} if images is None else images
        services = []
        for service in project.services:            # all are judged before one is pulled
            name = service.image
            try:
                for judge in JUDGES:
                    name = judge(name, self.config)
            except (ComponentError, CommandError) as error:
                name = images.get(name, name)
                self.excuse(error, name, again)
            services.append(service._replace(image=name))
            images.update({service.image: name} if name != service.image else {})
        for service in services:
            try:
                fetched.extend(self.pull(service, timeout))
            except (ComponentError, CommandError) as error:
                self.excuse(error, service.image, again)
        return workload, project._replace(services=self.look_at_images(services))

    def look_at_images(self, services):
        """The services with what their images declare.

        Raises ComponentError for an image that cannot run here, or lacks a health check that is awaited: both
        are found out before anything stops (K5, K18).
        """
        own = self.ask_info()["architecture"]
        own = ARCHITECTURES.get(own, own)
        checked = set()
        result = []
        for service in services:
            output = self.run(["image", "inspect", service.image], "PULL_FAILED")
            made_for, check, paths, words = parse_answer(output.stdout, self.engine,
                                                         lambda items: parse_image(items[0]))
            bare = "--entrypoint=" in service.arguments and not service.command
            result.append(service._replace(declared=paths, command=words if bare else service.command))
            named = [argument.partition("=")[0] for argument in service.arguments]
            if "--platform" not in named and own and made_for not in (own, RUNS_TOO.get(own)):
                raise ComponentError(
                    "INSTALL_FAILED", f"image {service.image} is made for {made_for}, and this device is"
                    f" {own}; a `platform` in the file says that it can run it all the same")
            if "--no-healthcheck" not in named and (check or "--health-cmd" in named):
                checked.add(service.name)
        for service in services:
            for other, (condition, _) in service.depends_on.items():
                if condition == "service_healthy" and other not in checked:
                    raise make_fault(f"services.{service.name}.depends_on.{other}: it has no health check"
                                     " that could be awaited")
        return result

    def excuse(self, error, image, again):
        """Raises the error for which an image cannot be had, unless one that is here will do (P-1)."""
        denied = error.code == "POLICY_DENIED"
        if not again or denied or not self.has_image(image):
            code = error.code if isinstance(error, ComponentError) else "PULL_FAILED"
            words = error.message if image in error.message else f"image {image}: {error.message}"
            raise ComponentError(code, words, retry_after=error.retry_after)
        log("warning", "the image that is here is used, as it cannot be pulled now", image=image,
            reason=error.message)

    def load_project(self, workload):
        """The Project of a workload's compose file, its own files laid where they are mounted from.

        Raises ComponentError.
        """
        folder = Folder(workload.folder, self.environ)
        try:
            text = read_inside(folder, "compose.yaml", "compose.yaml").encode("utf-8", "surrogateescape")
            project = make_project(load_yaml(text), workload, self.config.policy, self.engine, folder)
            check_addresses(project.services, project, self.engine)
        except YAMLError as error:
            raise make_fault(str(error)) from None
        except ComponentError as error:             # it may show what a parameter has put into the file
            raise ComponentError(error.code, mask(error.message, workload.parameters.values())) from None
        for note in project.notes:
            log("warning", f"compose.yaml: {note}", component=workload.component)
        for service in project.services:
            where = f"services.{service.name}"
            if self.remote and (service.files or any(mount.found for mount in service.mounts)):
                raise make_fault(f"{where}: configs, secrets and bind mounts are files of the gateway, which"
                                 " a child device does not see")
            taken = [name for name in find_handed(service.environment) if name in self.environ]
            if taken:
                raise make_fault(f"{where}.environment.{taken[0]}: the agent has a variable of this name, so"
                                 " its value has one line here, of at most 60000 bytes", "PARAMETER_INVALID")
        mounts = [mount for service in project.services for mount in service.mounts]
        folder.keep([mount.found for mount in mounts if mount.found and mount.found.own])
        return project

    def has_image(self, name):
        """Whether an image is on the device."""
        return self.run(["image", "inspect", "--format={{.Id}}", name]).code == 0

    def pull(self, service, timeout):
        """Has a service's image on the device; returns [its name] where it was not there before.

        One that is there is not asked for again unless pull_policy says so (P-1).
        """
        present = self.has_image(service.image)
        if present and service.pull != "always":
            return []
        if service.pull == "never":
            raise ComponentError(
                "PULL_FAILED", f"image {service.image} is not on the device, and pull_policy is never")
        environ = self.clear_temporary(self.check_space(service.image))
        log("info", "an image is pulled", image=service.image)
        ask_registries(find_registry(service.image), self.config,
                       lambda registry: self.pull_from(registry.host, service, timeout, environ))
        return [] if present else [service.image]

    def pull_from(self, host, service, timeout, environ):
        """Pulls a service's image from its registry, or from a mirror, whose name it then does not keep."""
        import errno
        own = find_registry(service.image)
        name = host + service.image[len(own):]
        platform = [argument for argument in service.arguments if argument.startswith("--platform=")]
        if host != own and self.engine != "podman" and "@" in name:
            raise ComponentError("PULL_FAILED", "docker knows an image by its digest under its registry's own"
                                 " name alone; give the daemon this mirror instead")
        before = host == own or self.has_image(name)
        program, options = self.make_access(host)
        command = program + ["pull", "--quiet"] + platform + options + [name]
        try:
            output = run_command(command, timeout, env=environ, watch=follow_pull(name, environ))
        finally:
            remove_folder(os.path.join(self.config.state_dir, "registries"))
        if output.code:                             # a full disk is told of in the system's own words
            full = os.strerror(errno.ENOSPC).lower() in output.stderr.lower()
            cause = find_cause(output.stderr)
            raise ComponentError("DISK_FULL" if full else "PULL_FAILED",
                                 f"{self.engine} cannot pull {name} for {service.name}: {cause}")
        if host != own:                             # a digest becomes a tag here, and podman knows it by both
            kept = re.sub("(:[^:/@]*)?@(sha256):", r":\2-", service.image)
            self.run(["tag", name, kept], "PULL_FAILED")
        if not before:
            self.remove_image(name)

    def check_space(self, image):
        """The folder in which the engine keeps its images, "" where that is elsewhere.

        Raises ComponentError DISK_FULL where that is as good as full already (P-4); whether an image fits,
        its pull says.
        """
        if self.remote:
            return ""
        root = self.ask_info()["root"]
        if not os.path.isdir(root):
            return ""
        check_space(root, 0, f"image {image}")
        return root

    def clear_temporary(self, root):
        """The environment of a pull; temporary files of earlier pulls that were cut off go first.

        Where the state directory has less room than the disk of `root`, where images are kept, the engine
        uses its own folder.
        """
        folder = os.path.join(self.config.state_dir, "tmp")
        if self.environ.get("TMPDIR") != folder or not os.path.isdir(folder):
            return self.environ
        empty_folder(folder)
        if not root or get_space(folder)[0] >= get_space(root)[0]:
            return self.environ
        return {key: value for key, value in self.environ.items() if key != "TMPDIR"}

    def make_access(self, host):
        """(command, options) with which the engine reaches a registry as `registries` says.

        Credentials lie in a file of mode 0600, for as long as the pull lasts.
        """
        settings = self.config.registries.get(host)
        if not settings:
            return [self.engine], []
        folder = os.path.join(self.config.state_dir, "registries")
        create_folder(folder)
        program = [self.engine]
        options = []
        basic = load_credentials(host, settings)
        if basic:
            path = os.path.join(folder, "config.json")
            write_file(path, make_json({"auths": {host: {"auth": basic[len("Basic "):]}}}))
            if self.engine == "podman":
                options.append(f"--authfile={path}")
            else:
                program += ["--config", folder]
        if self.engine == "podman" and settings.insecure:
            options.append("--tls-verify=false")
        elif self.engine == "podman" and settings.ca and not self.remote:   # others take what is installed
            write_file(os.path.join(folder, "ca.crt"), read_file(settings.ca, MAX_CERTIFICATES) or b"")
            options.append(f"--cert-dir={folder}")
        return program, options

    def remove_image(self, name):
        """Removes an image; False where the engine keeps it, because something else uses it."""
        return self.run(["image", "rm", name]).code == 0

    def apply(self, prepared, containers, known, deadline):
        """Makes the component's containers as prepared; {service: facts} once they run.

        containers: as observed before it was prepared, so that the engine is asked again.  known: what an
        earlier apply returned.  Unchanged services keep their containers; safe to repeat.  Raises
        ComponentError, CommandError.
        """
        workload, project = prepared
        self.free_names(workload.project)
        present = self.look_up(workload)
        seen = self.inspect([container.id for container in present])
        restarts = {container.id: seen[container.id].restarts for container in present
                    if container.state == "running" and container.id in seen}
        volumes = make_volume_names(project, workload.project, known, present, seen)
        job = Job(workload, project, os.path.dirname(workload.folder), known, deadline, {}, restarts, volumes)
        check_rivals(project.services)
        own = {facts.get("id") for facts in known.values()}
        if not self.remote and own.issuperset(restarts):        # else who holds what?
            ask_ports(project.services, known)
        finished = self.carry_through(job, present)
        started = {container.id: container.started for container in self.look_up(workload)}
        result = {}
        for service in project.services:
            container_id = job.current.get(service.name, "")
            result[service.name] = {
                "hash": service.hash, "finished": service.name in finished, "image": service.image,
                "id": container_id, "started": started.get(container_id, 0), "ports": service.ports,
                "volumes": volumes[service.name]}
        return result

    def look_up(self, workload):
        """[Container] of one component as it is now."""
        return find_containers(workload.deployment_id, self.observe(), workload.component)

    def carry_out(self, job, arguments, more=None):
        """The Output of a command that has to succeed; its words may hold values of parameters."""
        output = self.run(arguments, timeout=job.deadline - time.monotonic(), more=more)
        if output.code:
            words = mask(output.stderr, job.workload.parameters.values())
            for name, container_id in job.current.items():
                words = words.replace(container_id, name)
            lacks = self.list_lacks()[0] if arguments[0] == "start" else []
            words = "; ".join([find_cause(words), *lacks])
            raise ComponentError("INSTALL_FAILED", f"{self.engine} {arguments[0]} failed: {words}")
        return output

    def carry_through(self, job, present):
        """All that is new is made, then what goes or changes is stopped, then the new is started.

        Returns the finished services.  So what cannot be made touches nothing, and ports, addresses and
        volumes change hands with one outage (P-20).  What was replaced is removed last, because it is the
        quickest way back.  Where a network has to go first, all that leaves goes with it, and the new is made
        after that.
        """
        services = job.project.services
        project = job.workload.project
        networks = self.list_networks(job.workload.deployment_id, project, "INSTALL_FAILED",
                                      job.project.networks)
        new, first, last = plan_networks(job.project.networks, networks, project)
        changes = plan_services(services, present, job.known, set(new))
        check_external(job.project, networks, self.create_volumes(job), changes.making)
        leaving = {container.name: container.id for group in changes.leaving for container in group}
        stopping = [list_active(group) for group in changes.leaving]
        first = self.ask_free(first, job.project.networks, leaving)
        job.current.update({name: container.id for name, container in changes.kept.items()})
        self.try_networks(job, new, [networks.pop(name)[1] for name in first])
        for service in changes.making if any(stopping) else ():
            self.rehearse(service, job, changes.idle)
        if not first:
            self.create_all(job, new, changes.kept, leaving)
            networks.update(self.inspect_names("network", list(new)))
        check_addresses(changes.making, job.project, self.engine, networks)
        if any(stopping):
            self.ask_addresses(changes.making, networks, {item.id for item in present})
        try:
            stopped = job.deadline
            for ids in stopping:
                stopped = self.stop(ids, stopped)
            if first:
                self.discard(leaving.values(), job.deadline)
                leaving = {}
                for name in first:
                    self.carry_out(job, ["network", "rm", name])
                self.create_all(job, new, changes.kept, leaving)
            for service in services:
                self.await_dependencies(service, job)
                if service.name not in changes.idle and not self.start(service, job, changes.kept):
                    return self.carry_through(job, self.look_up(job.workload))
            names = [service.name for service in services]
            settle = self.config.runtime.settle
            finished = self.await_startup(names, job, settle) if job.workload.wait else set()
        except FAULTS:
            if leaving and self.config.runtime.on_failure != "rollback":    # kept for the way back alone
                self.run(["rm", "--force", *leaving.values()])
            raise
        self.discard(leaving.values(), job.deadline)
        self.drop_files(job)
        for name in last:
            if self.run(["network", "rm", name]).code:
                log("warning", "a network that is not needed any more stays: somebody else uses it",
                    network=name)
        return finished

    @staticmethod
    def drop_files(job):
        """Removes the files of `configs` and `secrets` that no service has any more."""
        contents = [content for service in job.project.services for content in service.files.values()]
        files = set(map(make_file_name, contents))
        for name in os.listdir(job.folder):
            if re.fullmatch("config-[0-9a-f]{32}", name) and name not in files:
                try:
                    os.remove(os.path.join(job.folder, name))
                except OSError as error:            # that is no reason to take an update back
                    log("warning", "a file that nothing needs stays", file=name, reason=error.strerror)

    def list_networks(self, deployment_id, project, code, names=()):
        """{name: (labels, facts)} of the networks of these names and of all that were made for a project.

        One of somebody else is shown without labels.
        """
        mark = f"--filter=label={LABEL_PROJECT}={project}"
        found = self.run(["network", "ls", mark, "--format={{.Name}}"], code).stdout.decode().split()
        there = self.inspect_names("network", sorted({*found, *names}), found)
        for name, (labels, facts) in there.items():
            if not is_ours(self.claim, deployment_id, labels.get(LABEL_OWNER, "")):
                there[name] = {}, facts
        return there

    def ask_free(self, names, wanted, leaving):
        """Those of these networks that nobody uses once containers have left, {name: id}.

        Raises ComponentError for a wanted one that somebody else uses.
        """
        free = []
        for name in names:
            strange = self.list_members(name).difference(leaving.values())
            if not strange:
                free.append(name)
            elif name in wanted:
                words = f"network {name} is defined anew, and container {min(strange)[:12]} is in it"
                raise ComponentError(
                    "INSTALL_FAILED", f"{words}, which is not of this component: disconnect it")
        return free

    def list_members(self, network):
        """The ids of all containers in a network."""
        form = ["--all", "--no-trunc", f"--filter=network={network}", "--format={{.ID}}"]
        return set(self.run(["ps"] + form, "INSTALL_FAILED").stdout.decode().split())

    def ask_addresses(self, services, networks, ours):
        """Raises ComponentError for an address that another container has in one of these networks.

        ours: ids of the containers of this component, whose addresses are free by then.
        """
        import ipaddress
        form = "--format={{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}} {{end}}"
        for service in services:
            for network, _, options in service.networks:
                wanted = {str(ipaddress.ip_address(option.partition("=")[2])) for option in options or ()
                          if option.startswith("--ip") and network in networks}
                others = self.list_members(network).difference(ours) if wanted else ()
                held = self.run(["inspect", form, *others]).stdout.decode().split() if others else ()
                for address in wanted.intersection(held):
                    raise ComponentError("INSTALL_FAILED", f"service {service.name} cannot have {address} in"
                                         f" network {network}: another container has it")

    def try_networks(self, job, new, going):
        """Raises ComponentError for a network that could not be made once others have gone (K23).

        It is made by another name and removed again, unless it may want addresses that those have still.
        going: what the engine shows of those.
        """
        for name, arguments in new.items() if going else ():
            subnets = find_ranges("subnet", "\n".join(arguments))
            held = find_ranges("subnet", "\n".join(map(make_ranges, going)))
            if subnets and not any(one.overlaps(other) for one in subnets for other in held):
                self.carry_out(job, ["network", "create", *arguments, f"{name}-try"])
                self.carry_out(job, ["network", "rm", f"{name}-try"])

    def create_volumes(self, job):
        """Makes the volumes that are not there yet; those that were, as inspect_names shows them."""
        labels = make_arguments("--label", make_shared_labels(job.workload))
        volumes = {name: labels for paths in job.volumes.values() for name in paths.values()}
        volumes.update(job.project.volumes)
        there = self.inspect_names("volume", list(volumes))
        for name, arguments in volumes.items():
            if arguments is not None and name not in there:
                self.carry_out(job, ["volume", "create", *arguments, name])
            elif arguments is not None:
                kept = (there[name][1].get("options") or {}).get("type", "") == "tmpfs"
                if kept != ("--opt=type=tmpfs" in arguments):
                    log("warning", "a volume is there with other driver_opts, and stays so", volume=name)
        return there

    def create_all(self, job, networks, kept, leaving):
        """Makes networks and what is not kept of the containers, each by the name of its service.

        leaving: {name: id} of containers; one that has such a name gets another one before.  Nothing is
        stopped yet, so that this is no part of the outage.
        """
        for name, arguments in networks.items():
            self.carry_out(job, ["network", "create", *arguments, name])
        for service in job.project.services:
            name = make_container_name(job.workload.project, service.name)
            if name in leaving:                     # it may have gone meanwhile
                self.run(["rename", leaving[name], f"{name}-old-{leaving[name][:12]}"])
            if service.name not in kept:
                job.current[service.name] = self.create(service, job, name)
            elif kept[service.name].name != name:
                self.carry_out(job, ["rename", kept[service.name].id, name])

    def create(self, service, job, name):
        """Makes the container of a service, joined to its networks, not started yet; its id.

        Where that fails because its image is damaged, that is put right, and it is tried again.
        """
        labels = make_labels(job.workload, service.name, service.hash)
        marks = [f"--name={name}"] + [f"--label={key}={item}" for key, item in labels.items()]
        arguments = ["create", *marks, *self.prepare_options(service, job), service.image, *service.command]
        handed = find_handed(service.environment)
        output = self.run(arguments, timeout=job.deadline - time.monotonic(), more=handed)
        if output.code:
            self.renew_image(service, job)
            output = self.carry_out(job, arguments, handed)
        words = output.stdout.decode("utf-8", "replace").split()
        for network, aliases, addresses in service.networks[1:]:
            aliases = [f"--alias={alias}" for alias in [service.name] + aliases]
            self.carry_out(job, ["network", "connect"] + aliases + addresses + [network, name])
        return words[-1] if words else name

    def rehearse(self, service, job, idle):
        """Raises ComponentError for what an engine finds out only when a container starts (K23).

        One of the same settings, without a network, is brought to where its program would run: its user and
        folders, devices, limits and the program are there by then, or not, while all that runs goes on.  What
        ran here before need not be tried.  It goes without what another service may lay out once it starts;
        idle: names of those that do not.
        """
        if job.known.get(service.name, {}).get("hash") == service.hash:
            return
        others = [item for item in job.project.services if item != service and item.name not in idle]
        mounts = [mount for item in others for mount in item.mounts]
        written = {mount.source for mount in mounts if mount.source and "ro" not in mount.options}
        if self.engine != "podman" and self.ask_info()["runtime"] not in ("runc", "crun"):
            return                                  # gVisor or Kata may start what is made unstartable
        name = make_container_name(job.workload.project, service.name) + f"-try-{os.urandom(4).hex()}"
        container_id = self.create(make_trial(service, self.engine, written), job, name)
        output = self.run(["init" if self.engine == "podman" else "start", container_id],
                          timeout=job.deadline - time.monotonic())
        self.run(["rm", "--force", container_id], "REMOVE_FAILED")
        if output.code:
            words = mask(find_cause(output.stderr), job.workload.parameters.values())
            raise ComponentError("INSTALL_FAILED",
                                 f"service {service.name} could not be started: {self.engine}: {words}")

    def prepare_options(self, service, job):
        """The options of `create` for a service; its files are written."""
        volumes = job.volumes[service.name]
        # Else podman hands in the agent's own proxy, password and all.
        options = ["--http-proxy=false"] if self.engine == "podman" else []
        options += self.write_environment(service, job.folder) + self.write_files(service, job.folder)
        unnamed = {f"--volume={path}" for path in volumes}
        options += [argument for argument in service.arguments if make_path(argument) not in unnamed]
        options += [f"--volume={volume}:{path}" for path, volume in volumes.items()]
        first = service.networks[0]
        options.append(f"--network={first[0]}")
        for owner in service.shares:                # whose container may have another name yet
            name = f"=container:{make_container_name(job.workload.project, owner)}"
            now = f"=container:{job.current[owner]}"
            options = [option[:-len(name)] + now if option.endswith(name) else option for option in options]
        if self.engine == "podman" and any(option.endswith(":host-gateway") for option in options):
            address = self.ask_gateway(first[0])
            options = [re.sub(":host-gateway\\Z", f":{address}", option) for option in options]
        if first[1] is not None:
            options += [f"--network-alias={alias}" for alias in [service.name] + first[1]] + first[2]
        return options

    def ask_gateway(self, network):
        """The host's address as a container in this network sees it; from 4.7 on podman knows it itself."""
        if not is_before(self.ask_info()["version"], "4.7"):
            return "host-gateway"
        form = "--format={{range .Subnets}}{{.Gateway}} {{end}}"
        gateways = self.run(["network", "inspect", form, network]).stdout.decode().split()
        return min(gateways, key=lambda item: ":" in item, default="127.0.0.1")

    def free_names(self, project):
        """Frees names of a project that storage alone holds, as a killed `podman create` leaves them."""
        if self.engine != "podman":
            return
        output = self.run(["ps", "--all", "--external", "--format=json"])
        held = parse_answer(output.stdout.strip() or b"[]", self.engine, lambda items: {
            item["Id"]: " ".join(item["Names"] or ()) for item in items or () if item["State"] == "storage"})
        for container_id, name in held.items():
            if name.startswith(project + "-"):
                log("warning", "a name is freed that the engine's storage held for no container",
                    container=name)
                self.run(["rm", "--force", container_id])

    def renew_image(self, service, job):
        """Pulls an image of ours anew where not even a bare container can be made of it (P-1).

        Its registry has to have it.
        """
        platform = [argument for argument in service.arguments if argument.startswith("--platform=")]
        if f"{self.device_id} {service.image}".strip() not in self.claim.images:
            return
        marks = make_arguments("--label", make_labels(job.workload, service.name, ""))
        probe = self.run(["create", *marks, *platform, "--network=none", service.image, "true"])
        if not probe.code:
            self.run(["rm", "--force"] + probe.stdout.decode().split()[-1:], "INSTALL_FAILED")
            return
        asked = service._replace(pull="always")
        try:
            self.pull(asked, PULL_TIMEOUT)          # fetches nothing that storage thinks it has
        except (ComponentError, CommandError) as error:
            log("warning", "a damaged image cannot be pulled anew now", image=service.image,
                reason=error.message)
            return
        if self.remove_image(service.image):
            log("warning", "a damaged image is pulled anew", image=service.image)
            self.pull(asked, PULL_TIMEOUT)

    def start(self, service, job, kept):
        """Starts a service's container; False where a kept one could not be started and is removed.

        So are those of the services that share a namespace of it.
        """
        arguments = ["start", job.current[service.name]]
        if service.name not in kept:
            self.carry_out(job, arguments)
        elif self.run(arguments, timeout=job.deadline - time.monotonic()).code:
            log("warning", "a container that cannot be started is made anew", service=service.name)
            sharing = [item.name for item in job.project.services if service.name in item.shares]
            self.discard([job.current[name] for name in [*sharing, service.name]], job.deadline)
            return False
        return True

    def write_environment(self, service, folder):
        """The environment by a file of mode 0600, never on a command line; what no line can hold, by name."""
        handed = find_handed(service.environment)
        items = sorted(service.environment.items())
        lines = [f"{name}={text}\n" for name, text in items if name not in handed]
        path = os.path.join(folder, f"{service.name}.env")
        write_file(path, "".join(lines).encode())
        return [f"--env-file={path}"] + [f"--env={name}" for name in sorted(handed)]

    def write_files(self, service, folder):
        """Files of `configs` and `secrets`, mounted read-only.

        What runs has its own still, see make_file_name: it may be started again at any time.
        """
        arguments = []
        for target, content in sorted(service.files.items()):
            path = os.path.join(folder, make_file_name(content))
            write_file(path, content.text.encode("utf-8", "surrogateescape"), content.mode)
            if (content.uid, content.gid) != (-1, -1):
                try:
                    os.chown(path, content.uid, content.gid)
                except OSError as error:
                    owner = f"{content.uid}:{content.gid}"
                    raise ComponentError("INSTALL_FAILED", f"{target} cannot be given to {owner}"
                                         f" ({error.strerror}); leave out its uid and gid") from None
            arguments.append(f"--volume={path}:{target}:ro")
        return arguments

    def inspect(self, ids):
        """{id: Shown} of those containers that can be looked at; CommandError where none answers."""
        ids = list(ids)
        output = self.run(["inspect", "--type=container"] + ids) if ids else Output(0, b"[]", "")
        seen = parse_answer(output.stdout.strip() or b"[]", self.engine,
                            lambda items: dict(map(parse_seen, items)))
        if ids and not seen:                        # where all are gone, or one alone is damaged
            self.observe()
            for container_id in ids if len(ids) > 1 else ():
                seen.update(self.inspect([container_id]))
        return seen

    def await_dependencies(self, service, job):
        """Waits until what a service depends on is as its condition says."""
        for condition in ("service_healthy", "service_completed_successfully"):
            names = [name for name, (wanted, _) in service.depends_on.items()
                     if wanted == condition and name in job.current]
            if names:
                self.await_startup(names, job, 0, condition.endswith("successfully"))

    def await_startup(self, names, job, settle, complete=False):
        """Waits until all these services run, are healthy, and stay so for `settle` seconds.

        Returns the set of those that finished with exit code 0.  Raises ComponentError at once for one that
        failed (C-164), or when the time is over.  Earlier restarts of what ran before are forgiven.
        complete: wait for their end instead.
        """
        checks, calm = {}, None
        began = time.monotonic()
        secrets = job.workload.parameters.values()
        while True:
            seen = self.inspect([job.current[name] for name in names])
            facts = {}
            for name in names:
                key = job.current[name]
                if key in seen:
                    restarts = seen[key].restarts - job.restarts.get(key, 0)
                    health = self.ask_health(key, seen[key], checks)
                    facts[name] = seen[key]._replace(restarts=restarts, health=health)
            failure, waiting, finished = judge_startup(names, facts, complete)
            now = time.monotonic()
            late = now > job.deadline
            if waiting and late:
                words = f"not up within {job.deadline - began:.0f} s: {', '.join(waiting.values())}"
                failure = next(iter(waiting)), "INSTALL_TIMEOUT", words
            if failure:
                name, code, words = failure
                raise ComponentError(code, mask(words, secrets) + self.tail_log(job.current[name], secrets))
            calm = None if waiting else calm or now
            restless = any(not facts[name].health for name in names if name not in finished)
            if not waiting and (not restless or late or now - calm >= settle):
                return finished
            time.sleep(0.4)

    def ask_health(self, container_id, seen, checks):
        """The health of a container in the engine's word, "" where nobody checks it.

        podman may have nobody to run a check: it is run here.  It may fail for so many intervals after the
        start period, or after it passed last.  checks: {container: (word, until when it may fail)}, kept up.
        """
        if self.engine != "podman" or not seen.check or seen.state != "running":
            return seen.health
        now = time.monotonic()
        patience = seen.check.interval * seen.check.retries
        if self.run(["healthcheck", "run", container_id], timeout=120).code == 0:
            checks[container_id] = "healthy", now + patience
        word, until = checks.setdefault(container_id, ("starting", now + seen.check.start + patience))
        return "unhealthy" if now >= until else word

    def tend(self, containers, chance):
        """Runs one health check a cycle, of a container by chance, where podman has no systemd that does.

        The next look shows it.
        """
        if self.engine != "podman" or self.remote or os.path.isdir("/run/systemd/system"):
            return
        checked = [item for item in containers if item.health and item.state == "running"]
        if checked:
            container = checked[int(chance * len(checked))]
            try:
                self.run(["healthcheck", "run", container.id], timeout=30)
            except CommandError as error:
                log("warning", "a health check hangs", container=container.name, reason=error.message)

    def tail_log(self, container, secrets):
        """The end of a container's log for an error message: 20 lines, 2 KiB; "" where there is none.

        The values of parameters are masked.
        """
        try:
            command = [self.engine, "logs", "--timestamps", f"--tail={LOG_LINES}", container]
            output = run_command(command, 60, env=self.environ, limit=MAX_LOG, ends=True)
        except CommandError as error:
            return f"; its log cannot be had: {error.message}"
        if output.code:
            return ""
        text = mask(merge_logs(output.stdout, output.errors), secrets)[-2048:]
        return f"; its log ends: {make_printable(text, 2048)}" if text else ""

    def stop(self, ids, deadline):
        """Stops containers within their own grace period, or kills them once the time is over: none runs on.

        Returns the deadline for what follows.  One that is not there any more is passed over.
        """
        if not ids:
            return deadline
        passing = ["--ignore"] if self.engine == "podman" else []
        try:
            code = self.run(["stop", *passing, *ids], timeout=deadline - time.monotonic()).code
        except CommandTimeout:
            code = 1
        if code:
            log("warning", "killed, because it did not stop in time",
                containers=" ".join(item[:12] for item in ids))
            if self.run(["kill"] + ids).code:
                self.run(["rm", "--force"] + ids, "INSTALL_FAILED")
            deadline = time.monotonic() + 60
        return deadline

    def remove_containers(self, containers, deadline):
        """Stops containers within their own grace period and removes them."""
        deadline = self.stop(list_active(containers), deadline)     # what cannot be is removed by force
        self.discard([container.id for container in containers], deadline)

    def discard(self, ids, deadline):
        """Removes containers; one whose namespace another one shares goes after that one."""
        for _ in tuple(ids):
            output = self.run(["rm", "--force", *ids], timeout=deadline - time.monotonic())
            if not output.code:
                return
            ids = [container.id for container in self.observe() if container.id in ids]
        if ids:
            raise ComponentError("REMOVE_FAILED", f"{self.engine} rm failed: {find_cause(output.stderr)}")

    def bring_back(self, before, deadline):
        """Undoes a start: what has been made since goes, and what ran runs again.

        before: the containers of one deployment, as they were.  Returns what came of it, in words.
        """
        states = {container.id: container.state for container in before}
        there = find_containers(before[0].deployment_id, self.observe())
        self.remove_containers([container for container in there if container.id not in states], deadline)
        for container in there:
            if container.state in AT_REST and states.get(container.id, "created") not in AT_REST:
                self.run(["start", container.id], "INSTALL_FAILED", deadline - time.monotonic())
        return "what ran before runs again" if there else ""

    def remove(self, deployment_id, component, containers, deadline):
        """Removes a component's containers, whatever their state, and its networks; volumes stay.

        Needs no compose file.  Raises ComponentError REMOVE_FAILED unless the engine says that nothing is
        left (P-11, D-21).
        """
        project = make_project_name(component, deployment_id)
        self.free_names(project)
        there = find_containers(deployment_id, containers, component, "compose")
        self.remove_containers(there[::-1], deadline)
        for name, (labels, _) in self.list_networks(deployment_id, project, "REMOVE_FAILED").items():
            if labels:
                self.run(["network", "rm", name], "REMOVE_FAILED")
        for container in find_containers(deployment_id, self.observe(), component):
            raise ComponentError("REMOVE_FAILED", f"container {container.name} is still there")


def follow_pull(image, environ):
    """A function to call while an image is pulled: it logs how far that is, often where a person looks on.

    podman keeps what it has fetched of layers in its folder for temporary files, until they are unpacked.
    """
    start = time.monotonic()
    pause = PULL_NOTE // 20 if sys.stderr.isatty() else PULL_NOTE
    due = [start + pause]

    def tell():
        now = time.monotonic()
        if now < due[0]:
            return
        due[0] = now + pause
        files = [os.path.join(folder, name) for folder, _, names in os.walk(environ.get("TMPDIR", ""))
                 for name in names]
        fetched = sum(os.path.getsize(path) for path in files if os.path.exists(path))
        log("info", "an image is being pulled", image=image, seconds=int(now - start), fetched=fetched)
    return tell


def merge_logs(*streams):
    """The last 20 lines of what a program said on two streams, each line behind its time, in their order.

    An engine reads each stream by itself, in large pieces: where a program talks a lot, the end of one may
    come long before that of the other.  So up to ten lines of each are there.
    """
    said, errors = [stream.decode("utf-8", "replace").strip().splitlines() for stream in streams]
    last = said[min(10, len(errors)) - 20:] + errors[min(10, len(said)) - 20:]
    last.sort(key=lambda line: line.partition(" ")[0])
    return "\n".join(line.partition(" ")[2] for line in last).strip()


def part_containers(containers, claim):
    """([Container] of ours, [Container] of others): from here on nobody sees what is not ours."""
    parts = {True: [], False: []}
    for item in containers:
        parts[is_ours(claim, item.deployment_id, item.owner, item.id)].append(item)
    return parts[True], parts[False]


def find_health(state, status):
    """(state, health) of a container from its state and its status, where `ps` alone shows it."""
    (health,) = re.findall(r"\((?:health: )?(healthy|unhealthy|starting)\)\Z", str(status)) or [""]
    return "unhealthy" if (state, health) == ("running", "unhealthy") else state, health


def parse_seen(item):
    """An element of what `inspect` prints of containers to (id, Shown)."""
    state = item["State"]
    health = state.get("Health") or state.get("Healthcheck") or {}
    said = [entry.get("Output") or "" for entry in health.get("Log") or ()]
    mounts = [mount for mount in item.get("Mounts") or () if mount.get("Type") == "volume"]
    volumes = {make_path(mount["Destination"]): mount["Name"] for mount in mounts}
    return item["Id"], Shown(state["Status"], state.get("ExitCode", 0), item.get("RestartCount", 0),
                             health.get("Status", ""), volumes,
                             parse_check(item["Config"].get("Healthcheck") or {}),
                             make_printable(said[-1].strip(), 500) if said else "")


def parse_image(item):
    """An element of what `image inspect` prints to (architecture, Check or None, volumes' paths, command)."""
    config = item.get("Config") or {}
    check = parse_check(item.get("Healthcheck") or config.get("Healthcheck") or {})
    return item["Architecture"], check, list(config.get("Volumes") or ()), config.get("Cmd") or ()


def parse_check(item):
    """The health check of a container, or an image, as `inspect` prints it to a Check; None: there is none.

    Its times are nanoseconds; zero is not said.
    """
    if (item.get("Test") or ["NONE"])[0] == "NONE":
        return None
    interval = item.get("Interval", 0) / 1e9 or 30.0
    return Check(interval, item.get("Retries") or 3, item.get("StartPeriod", 0) / 1e9)


def find_started(status, now):
    """About when docker says that a container was started, in Unix seconds; 0 where that is vague."""
    match = re.match("Up (Less than a|[0-9]+) seconds?", str(status))
    return int(now) - int(match.group(1).replace("Less than a", "0")) if match else 0


def parse_containers(data, engine, now=0):
    """The engine's list of containers to [Container]; now: Unix seconds.

    Raises CommandError for what is not of the expected form.
    """
    def read(items):
        if not isinstance(items, (list, type(None))):
            raise TypeError("no list")
        found = []
        for item in items or ():
            labels = item["Labels"]
            marks = [labels[LABEL_DEPLOYMENT], *(labels.get(name, "") for name in LABELS[1:])]
            state, health = find_health(item["State"].lower(), item.get("Status"))
            started = item.get("StartedAt") or find_started(item.get("Status"), now)
            found.append(Container(item["Id"], item["Names"][0], *marks[:4], state, "compose", marks[4],
                                   started, health, marks[5]))
        return found

    if engine != "podman":                          # which prints one a line
        data = b"[" + b",".join(data.splitlines()) + b"]"
    return [container for container in parse_answer(data or b"[]", engine + " ps", read)
            if re.fullmatch(UUID_PATTERN, str(container.deployment_id))]    # others are somebody else's


DRIVERS["compose"] = make_compose_driver


# ----------------------------------------------------------------------------------------------------------
# 15. Compose file
# ----------------------------------------------------------------------------------------------------------

def find_parameters(deployment, component):
    """[(Parameter, pointer)] of all that reaches a component, in the document's order; not of nulls."""
    pairs = [(parameter, target) for parameter in deployment.parameters for target in parameter.targets]
    return [(parameter, pointer) for parameter, (pointer, names) in pairs
            if parameter.value is not None and component in names]


# Names that the tools themselves obey.  A parameter of such a name would steer the tool (D-18, C-184).
TOOL_VARIABLES = ("COMPOSE_", "DOCKER_", "CONTAINER_", "CONTAINERS_", "PODMAN_")


def make_variables(deployment, component):
    """The parameters of one compose component as {NAME: text}; raises ComponentError PARAMETER_INVALID.

    A later parameter for the same name wins; a list becomes JSON text (protocol 7, C-180, C-182).
    """
    variables, spelling = {}, {}
    for parameter, name in find_parameters(deployment, component):
        value = parameter.value
        text = make_json(value).decode() if isinstance(value, list) else scalar_text(value)
        first = spelling.setdefault(name.lower(), name)
        fault = ""
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or name.upper().startswith(TOOL_VARIABLES):
            fault = (f"{make_printable(name)!r} is not a name that an environment variable of a container may"
                     " have")
        elif "\0" in text:
            fault = "holds a NUL character"
        elif first != name:
            fault = f"the names {first} and {name} differ only in case"
        if fault:
            raise ComponentError("PARAMETER_INVALID", f"parameter {make_printable(parameter.name)}: {fault}")
        variables[name] = text
    return variables


def make_project_name(component, deployment_id):
    """`<component>-<deploymentId>` as engines take names, at most 63 characters.

    What is changed or cut ends with a hash of the whole, so that no two can meet (D-19, D-20).
    """
    whole = f"{component}-{deployment_id}"
    name = re.sub(r"[^a-z0-9_-]", "-", whole.lower())
    if name == whole.lower() and len(name) <= 63:
        return name
    return f"{name[:52]}-{sha256_digest(whole.lower().encode())[7:17]}"


Workload = define("Workload",
                  "deployment_id component project folder parameters environment wait device_id owner",
    "One compose component to run: project name, folder with compose.yaml, {NAME: text} of parameters and of"
    " runtime.environment, the child device it is for, the owner to label it with.", "", "")
Service = define(
    "Service", "name image arguments command environment files networks depends_on pull hash ports"
               " mounts shares follows declared",
    "One service as the engine is told of it.  files: {path in the container: Content}; networks:"
    " [Attachment]; depends_on: {service: (condition, required)}; hash: of all that makes its container what"
    " it is; ports: [[address or \"\", port, protocol]] that it holds of the host; mounts: [Mount]; shares:"
    " services whose namespaces it shares; follows: those with which it is made anew; declared: paths at"
    " which its image has volumes.", (), (), (), ())
Project = define("Project", "services networks volumes notes",
    "A compose file ready to run: services in starting order, {engine's name: create arguments} (None for"
    " what is external), and what of the file has no effect, in words.", ())
Mount = define("Mount", "kind source target options found",
    "An item of `volumes` or `tmpfs`: bind, volume or tmpfs; host path or volume (\"\" for one without"
    " name), path in the container, engine's options; found: the Source of a bind mount.", None)
Port = define("Port", "argument address numbers protocol choice",
    "An item of `ports` as the engine takes it, and what it holds of the host: an address or \"\", a range of"
    " ports, tcp, udp or sctp; or the range of which the engine chooses one.")
Attachment = define("Attachment", "network aliases options",
    "What a container joins: the engine's name of a network, further names in it, arguments; or a network"
    " mode, None, None.", None)
Content = define("Content", "text mode uid gid",
    "A file of `configs` or `secrets`: what is in it, and who may read it.", 0o644, -1, -1)
Reading = define("Reading", "workload policy engine folder variables volumes networks contents aliases",
    "What the services of one file are read with: Variables, {name: (engine's name, create arguments)} of"
    " volumes and of networks, {section: {name: text}} of configs and secrets, {service: further names}.")

LABEL_DEPLOYMENT, LABEL_COMPONENT = "org.margo.deployment", "org.margo.component"
LABEL_SERVICE = "org.margo.service"
LABEL_HASH, LABEL_PROJECT, LABEL_DEVICE = "org.margo.hash", "org.margo.project", "org.margo.device"
LABEL_OWNER = "org.margo.owner"
LABELS = LABEL_DEPLOYMENT, LABEL_COMPONENT, LABEL_SERVICE, LABEL_HASH, LABEL_DEVICE, LABEL_OWNER


def make_fault(text, code="INVALID_DEPLOYMENT"):
    """A ComponentError about the compose file."""
    return ComponentError(code, f"compose.yaml: {text}")


# Variables

class Variables(ChainMap):
    """{NAME: text} for one compose file.  `room`: how many characters these may still bring into it."""

    room = 8 * MIB
    unset = frozenset()                             # names that the file uses, and nobody gives

    def spend(self, count, where):
        """Takes characters from the room; raises ComponentError where none is left, so nothing is a bomb."""
        self.room -= count
        if self.room < 0:
            raise make_fault(f"{where}: variables, env files and ports bring more than {Variables.room}"
                             " characters into the file")


def interpolate(text, variables, where, depth=0):
    """`$NAME`, `${NAME}`, `${NAME:-default}` with the operators - ? + :- :? :+, and `$$` in one text.

    As in compose an unset name is an empty text, and a `$` that begins none of these stays.  Raises
    ComponentError that names the place.
    """
    if depth > 32:
        raise make_fault(f"{where}: a $ in more than 32 others")
    pattern = re.compile(r"\$(\$|[A-Za-z_]\w*|\{(?:([A-Za-z_]\w*)(:?[-?+]|\}))?)", re.A)
    result, position = [], 0
    match = pattern.search(text)
    while match:
        short, name, operator = match.groups()
        if short == "{":
            raise make_fault(f"{where}: a ${{ that is not ${{NAME}}; a $ that is meant is written $$")
        result.append(text[position:match.start()])
        position = match.end()
        name = name or short
        value = "$" if name == "$" else variables.get(name, "")
        if operator not in (None, "}"):
            end = find_brace(text, position, variables, where)
            given = name in variables and bool(value or ":" not in operator)
            if given == operator.endswith("+"):     # what stands behind the operator counts
                value = interpolate(text[position:end], variables, where, depth + 1)
                if operator.endswith("?"):
                    raise make_fault(f"{where}: {name} is needed: {value}", "PARAMETER_INVALID")
            position = end + 1
        elif name not in variables and name != "$":
            variables.unset |= {name}
        result.append(value)
        variables.spend(len(value), where)
        match = pattern.search(text, position)
    return "".join(result) + text[position:]


def find_brace(text, position, variables, where):
    """The closing brace of a `${…` whose inside starts at `position`, on the same line, as compose finds it.

    Each brace that opens inside is closed there, but of two in a row one counts.  Where they do not come in
    pairs it is the last of the line.  What is looked through is spent: many could look through each other.
    """
    end = re.compile("[^\n]*").match(text, position).end()
    depth = 1
    for match in re.compile(r"\{.?|}").finditer(text, position, end):
        depth += -1 if match.group() == "}" else 1
        if not depth:
            end = match.end()
            break
    variables.spend(end - position, where)
    last = text.rfind("}", position, end)
    if last < 0:
        raise make_fault(f"{where}: a ${{ that is not closed on its line")
    return last


def interpolate_all(value, variables, where=""):
    """Every text below a value interpolated.  Keys stay as they are; numbers stay numbers."""
    if isinstance(value, dict):
        return {name: interpolate_all(item, variables, f"{where}.{name}")
                for name, item in make_names(value, where).items()}
    if isinstance(value, list):
        return [interpolate_all(item, variables, f"{where}[{index}]") for index, item in enumerate(value)]
    return interpolate(value, variables, where) if isinstance(value, str) else value


def make_names(value, where):
    """A mapping with its keys as text; raises ComponentError where two are the same then."""
    names = {to_text(key, f"{where or 'the file'}: a name"): item for key, item in value.items()}
    if len(names) < len(value):
        raise make_fault(f"{where}: a key occurs twice")
    return names


# What compose strips before a value, and behind it.
BLANKS = " \t\v\f\r\x85\xa0"
BLANKS_BEHIND = BLANKS + ("\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028"
                          "\u2029\u202f\u205f\u3000")
# A name, and perhaps = or : and a value in quotes, or all that stands on the line.
ENV_LINE = (r"(?:export[ \t]+)?([\w.-]+)~*(?:[=:](?:"
            r"~*(?:'([^'\\]*(?:\\.[^'\\]*)*)'|\"([^\"\\]*(?:\\.[^\"\\]*)*)\")~*(?:#[^\n]*)?|"
            r"(?!~*['\"])([^\n]*)))?(?:\n|\Z)").replace("~", f"[{BLANKS}]")


def parse_env_file(text, variables, where, earlier=None):
    """An env file to {NAME: text}: `NAME=value` or `NAME: value`, `export`, comments, and quotes.

    A value may name the variables, and those of earlier lines and files.  A name alone takes the variable's
    value.  earlier: {NAME: text} of the files before, to which this one's are added.
    """
    result = {} if earlier is None else earlier
    variables.spend(len(text), where)
    variables.maps.append(result)
    for match in re.finditer(rf"[{BLANKS_BEHIND}\n]+|#[^\n]*|{ENV_LINE}|(.)", text.lstrip("\ufeff"), re.S):
        name, single, double, plain, odd = match.groups()
        if odd or "\\0" in (double or "").replace("\\\\", ""):     # compose has a way of its own with \0
            number = text.count("\n", 0, match.start()) + 1
            raise make_fault(f"{where}, line {number}: expected NAME=value")
        if single is not None:
            result[name] = single.replace("\\'", "'")
        elif double is not None or plain is not None:
            if plain is None:       # of these ESCAPES lacks only the dollar, which interpolation takes by two
                raw = re.sub(r'\\([abfnrtv"\\$])', lambda found: ESCAPES.get(found.group(1), "$$"), double)
            else:                                   # what begins with # is no comment
                raw = plain.lstrip(BLANKS).partition(" #")[0].rstrip(BLANKS_BEHIND)
            result[name] = interpolate(raw, variables, f"{where}, {name}")
        elif name in variables:
            result[name] = variables[name]
    variables.maps.pop()
    return result


# Readers: each takes a value and its place, and returns what is meant or raises ComponentError of the place.

def to_text(value, where):
    """A scalar as text; a number keeps its spelling."""
    if value is None or isinstance(value, (dict, list)):
        raise make_fault(f"{where}: expected a single value")
    text = scalar_text(value)
    if re.search("[\0\ud800-\udfff]", text):
        raise make_fault(f"{where}: holds a NUL character, or bytes that are no UTF-8")
    return text


def to_form(pattern, words, make=str):
    """A reader of text of one form: the pattern, what that is in words, and what is made of the text."""
    def read_form(value, where):
        text = to_text(value, where)
        if not re.fullmatch(pattern, text, re.ASCII):
            raise make_fault(f"{where}: {make_printable(text, 100)!r} is not {words}")
        return make(text)
    return read_form


def parse_period(text):
    """A duration of compose, such as 1m30s or 500ms, to seconds."""
    units = {"h": 3600, "m": 60, "s": 1, "ms": 0.001, "us": 0.000001}
    return sum(float(number) * units[unit] for number, unit in re.findall("([0-9.]+)([a-z]+)", text))


PERIOD = r"(?=.{1,100}\Z)([0-9]+(\.[0-9]+)?(h|ms|us|m|s))+", "a duration such as 1m30s"
to_period = to_form(*PERIOD)
# In whole seconds: an engine would take zero as not said.
to_grace = to_form(*PERIOD, make=lambda text: str(max(1, round(parse_period(text)))))
SIZE = r"-1|[0-9]+(\.[0-9]+)? ?([kmgtKMGT]?[bB]?|[KMGT]i[bB]?)", "a size such as 64m"
to_size = to_form(*SIZE)
to_number = to_form(r"-?([0-9]+(\.[0-9]*)?|\.[0-9]+)", "a number")
to_count = to_form("[0-9]{1,9}", "a whole number", int)
to_name = to_form(r"[a-zA-Z0-9][\w.-]*", "a name of a container")
to_one = to_form("1", "supported; only 1 is")
to_flag = to_form("(?i)true|yes|on|y|false|no|off|n", "true or false, nor a word for it in YAML 1.1",
                  make=lambda text: text.lower() in ("true", "yes", "on", "y"))


def to_list(value, where):
    """A list of texts; a single text is one too."""
    return [to_text(item, where) for item in (value if isinstance(value, list) else [value])]


def to_search(value, where):
    """`dns_search`: a list of texts; an engine takes a dot for no search at all, which is "" in compose."""
    return [text or "." for text in to_list(value, where)]


def to_pairs(value, where):
    """A mapping, or a list of NAME=value, as {NAME: text or None}."""
    if isinstance(value, dict):
        return {key: None if item is None else to_text(item, f"{where}.{key}") for key, item in value.items()}
    pairs = [item.partition("=") for item in to_list(value, where)]
    return {name: text if mark else None for name, mark, text in pairs}


def to_values(value, where):
    """A mapping, or a list of NAME=value, as {NAME: text}."""
    return {name: text or "" for name, text in to_pairs(value, where).items()}


def to_labels(value, where):
    """`labels` as {name: text}, without those by which containers are found again."""
    labels = to_values(value, where)
    if any(name.startswith(("org.margo.", "com.docker.compose.")) for name in labels):
        raise make_fault(f"{where}: org.margo.… and com.docker.compose.… are the agent's own")
    return {name: text for name, text in labels.items()         # by these podman updates it behind our back
            if not name.startswith(("io.containers.autoupdate", "PODMAN_SYSTEMD_UNIT"))}


def to_links(value, where):
    """`links`, each SERVICE[:ALIAS], as [(service, alias or "")]."""
    links = [text.partition(":")[::2] for text in to_list(value, where)]
    return [(owner, alias and to_name(alias, where)) for owner, alias in links]


def to_driver_options(value, where):
    """`driver_opts` of a volume: those of a tmpfs, for others name files of the host."""
    options = to_values(value, where)
    text = "\0".join(f"{key}={item}" for key, item in sorted(options.items()))
    if not re.fullmatch(f"|(device=tmpfs\0)?(o=(({TMPFS_OPTION}),?)*\0)?type=tmpfs", text):
        deny(where, "only those of a tmpfs are supported; a folder of the host is named where it is mounted")
    return options


def to_words(value, where):
    """A command: a list as it is, a text split as a shell splits it."""
    if not isinstance(value, str):
        return to_list(value, where)
    words = [[]]
    # no other white space parts words
    pattern = r"([ \t\r\n]+)|'([^']*)'|\"([^\"\\]*(?:\\.[^\"\\]*)*)\"|\\(.)|([^ \t\r\n'\"\\]+)|."
    for match in re.finditer(pattern, to_text(value, where), re.S):
        blank, single, double, escaped, plain = match.groups()
        if not match.lastindex:
            raise make_fault(f"{where}: a quotation or a \\ that is not closed")
        if blank:
            words.append([])
        elif double is not None:                    # a space is what YAML has made of a line end
            words[-1].append(re.sub(r'\\([$`"\\\n ])', lambda found: found.group(1).strip("\n"), double))
        else:
            words[-1] += [single or plain or escaped or ""] if escaped != "\n" else []
    return ["".join(parts) for parts in words if parts]


def to_mode(value, where):
    """The permissions of a file: an octal number, or a plain one as compose takes it."""
    octal = isinstance(value, str) or to_text(value, where).startswith("0")
    text = to_form("0?o?[0-7]{1,4}" if octal else "[0-9]{1,4}", "a file mode such as 0440")(value, where)
    return int(text.replace("o", ""), 8 if octal else 10)


def to_hosts(value, where):
    """`extra_hosts` as [HOST:ADDRESS]; a name may have several addresses."""
    if isinstance(value, dict):
        pairs = sorted(value.items())
    else:
        pairs = [re.match("([^=:]*)[=:]?(.*)", item, re.S).groups() for item in to_list(value, where)]
        pairs = [(name, text.split(",")) for name, text in pairs]
    return [f"{name}:{text.strip('[]')}" for name, item in pairs for text in to_list(item, f"{where}.{name}")]


def to_restart(value, where):
    """`restart`: the engine's own words."""
    form = to_form("|no|always|unless-stopped|on-failure(:[0-9]+)?", "a restart policy")
    return "no" if value is False else form(value, where)


def to_external(value, where):
    """`external`: true or false, or in older files a mapping that has the name."""
    return to_text(value.get("name"), f"{where}.name") if isinstance(value, dict) else to_flag(value, where)


def to_namespace(*words):
    """A reader of `pid`, `ipc` and their like: the words that are known, or service:NAME."""
    words += ("service:NAME",)
    form = to_form("|" + "|".join(words).replace("NAME", ".+"), f"supported; known are {', '.join(words)}")

    def read_namespace(value, where):
        if re.match("container:|ns:", str(value)):
            deny(where, f"{make_printable(str(value), 60)!r} is not supported: it is not this application's")
        return form(value, where)
    return read_namespace


def to_test(value, where):
    """`test` of a health check as [CMD, word …], [CMD-SHELL, text] or [NONE]."""
    words = to_list(value, where)
    if not isinstance(value, list):
        words = ["CMD-SHELL"] + words
    if words != ["NONE"] and (words[:1] != ["CMD"] and words[:-1] != ["CMD-SHELL"] or not "".join(words[1:])):
        raise make_fault(f"{where}: expected a text, [CMD, …], [CMD-SHELL, text] or [NONE]")
    return words


# What is no name in a registry: a transport of podman's before the first colon, or a tag before a slash.
TRANSPORT = (r"(containers-storage|dir|docker|docker-archive|docker-daemon|oci|oci-archive|ostree|sif|"
             r"tarball|https?):|[^/]*:(?![0-9]+/)[^/]*/")
to_image_name = to_form(
    r"(?=.{1,512}\Z)(?!.*//)([A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{1,5})?/)?[a-z0-9][a-z0-9._/-]*"
    r"(:\w[\w.-]{0,127})?(@[a-z0-9]+:[0-9a-f]{32,128})?",
    "an image name: [HOST[:PORT]/]PATH[:TAG][@DIGEST], the path in lower case")


def to_image(value, where):
    """The whole name of an image: one without a registry is Docker Hub's, for every engine.

    None is a file of this device.
    """
    text = to_text(value, where)
    if re.match(TRANSPORT, text[:512]):
        deny(where, f"{make_printable(text, 100)!r} is not read from a registry, as an image has to be")
    to_image_name(text, where)
    if find_registry(text) != "docker.io" or text.startswith("docker.io/"):
        return text
    return f"docker.io/{'' if '/' in text.partition('@')[0] else 'library/'}{text}"


def find_registry(image):
    """The registry host that an image name begins with; Docker's own where it names none."""
    first, slash, _ = image.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else "docker.io"


# Readers of items that have a long and a short syntax: the long one comes as Settings.

def to_limit(item, where):
    """One of `ulimits`: SOFT:HARD, or one number for both."""
    text = f"{item.soft}:{item.hard}" if isinstance(item, Settings) else item
    return to_form("-?[0-9]+(:-?[0-9]+)?", "a limit, or soft and hard")(text, where)


def to_device(item, where):
    """One of `devices` as HOST[:CONTAINER[:RIGHTS]]."""
    if isinstance(item, Settings):
        item = ":".join(filter(None, [item.source, item.target, item.permissions]))
    return to_text(item, where)


def to_source(item, where):
    """One of the top-level `configs` or `secrets` as (where its text comes from, what it is there)."""
    given = [(key, item[key]) for key in ("file", "content", "environment")
             if isinstance(item, Settings) and item[key] is not None]
    if len(given) != 1:
        raise make_fault(f"{where}: expected one of file, content, environment")
    return given[0]


def make_span(text):
    """PORT or PORT-PORT as a range, which is empty for what is none."""
    match = re.fullmatch("([0-9]{1,5})(?:-([0-9]{1,5}))?", text)
    first, last = map(int, match.groups(match.group(1))) if match else (0, 0)
    return range(first, last + 1) if 1 <= first and last <= 65535 else range(0)


def to_port(item, where):
    """An item of `ports` as a Port; in short [[ADDRESS:][PORTS]:]PORTS[/PROTOCOL]."""
    import ipaddress
    if isinstance(item, Settings):
        item = f"{item.host_ip or ''}:{item.published or ''}:{item.target or ''}/{item.protocol or 'tcp'}"
    text = to_text(item, where)
    match = re.fullmatch("(?ai)(?:(?:(.*):)?([0-9-]*):)?([0-9-]+)(?:/(tcp|udp|sctp))?", text)
    address, published, target, protocol = match.groups("") if match else [""] * 4
    published = "" if published == "0" else published               # the engine chooses one
    inside = make_span(target)
    outside = make_span(published or target)
    try:
        address = address and str(ipaddress.ip_address(re.sub(r"\A\[(.*)\]\Z", r"\1", address)))
    except ValueError:
        inside = ()
    if not inside or not outside or len(inside) not in (1, len(outside)):
        raise make_fault(f"{where}: {make_printable(text, 60)!r} is not a port")
    text = f"[{address}]:" if ":" in address else address and f"{address}:"
    text += f"{published}:{target}" if text or published else target
    protocol = protocol.lower() or "tcp"
    chosen = len(inside) < len(outside)
    return Port(text if protocol == "tcp" else f"{text}/{protocol}", address,
                outside if published and not chosen else (), protocol, outside if chosen else ())


def to_tmpfs(value, where):
    """`tmpfs`, each PATH[:OPTIONS], as [Mount]."""
    parts = [text.partition(":") for text in to_list(value, where)]
    return [Mount("tmpfs", "", target, list(filter(None, options.split(","))))
            for target, _, options in parts]


def to_mount(item, where):
    """An item of `volumes` as a Mount; `create_host_path` and `consistency` ask for nothing."""
    if isinstance(item, Settings):
        words = [item.read_only, item.volume.nocopy, item.bind.propagation, item.bind.selinux,
                 item.tmpfs.size, item.tmpfs.mode]
        if not item.type or item.type == "bind" and not item.source:
            raise make_fault(f"{where}: expected a type, and the source of a bind mount")
        return Mount(item.type, item.source or "", item.target or "", list(filter(None, words)))
    source, colon, rest = to_text(item, where).partition(":")
    target, _, options = rest.partition(":")
    if not source or ":" in options:
        raise make_fault(f"{where}: expected source:target[:options]")
    if not colon:
        return Mount("volume", "", source, [])
    # compose drops these two, and an engine does not know the other
    words = [word for word in options.split(",") if not re.fullmatch("|[ug]id=[0-9]+|consistent", word)]
    return Mount("bind" if source[0] in "/.~" else "volume", source, target, words)


def to_word(word):
    """A reader of a flag that is one word to the engine; "" where it is false."""
    return lambda value, where: word if to_flag(value, where) else ""


# The form of a file.  A form is a reader; a dict of known keys and their forms; {None: form} for names of the
# application's own, {list: form} where a list of such names will do, too; [form]; or a pair for what has two
# syntaxes: the form of the long one, and the key that a single value is for, or the reader of what both give.

def make_form(reader, names, **forms):
    """The form of a mapping: names that one reader reads, and others with their forms."""
    return dict(dict.fromkeys(names.split(), reader), **forms)


# The keys of a service that are options of the engine ...
SERVICE_OPTIONS = dict(
    make_form(to_text, "user working_dir stop_signal cpuset platform mac_address"),
    hostname=to_form("(?s).{0,64}", "a host name of at most 64 characters"),
    **make_form(to_size, "mem_limit memswap_limit mem_reservation shm_size"),
    **make_form(to_number, "mem_swappiness oom_score_adj cpus cpu_period cpu_quota cpu_shares pids_limit"),
    **make_form(to_flag, "init read_only privileged tty stdin_open"),
    **make_form(to_list, "cap_add cap_drop device_cgroup_rules security_opt group_add dns dns_opt"),
    devices=[(make_form(to_text, "source target permissions"), to_device)],
    pid=to_namespace("private", "host"), ipc=to_namespace("private", "shareable", "none", "host"),
    userns_mode=to_form("|host|auto|nomap|keep-id(:[a-z]+=[0-9]+(,[a-z]+=[0-9]+)*)?",
                        "host, auto, nomap or keep-id"),
    dns_search=to_search, stop_grace_period=to_grace, restart=to_restart, extra_hosts=to_hosts,
    labels=to_labels, sysctls=to_values,
    ulimits={None: (make_form(to_text, "soft hard"), to_limit)})
# ... and keys whose options have other names.
RENAMED = {"working_dir": "workdir", "mem_limit": "memory", "memswap_limit": "memory-swap",
           "mem_reservation": "memory-reservation", "mem_swappiness": "memory-swappiness",
           "cpuset": "cpuset-cpus", "stdin_open": "interactive", "devices": "device",
           "device_cgroup_rules": "device-cgroup-rule", "dns_opt": "dns-option",
           "userns_mode": "userns", "stop_grace_period": "stop-timeout", "extra_hosts": "add-host",
           "labels": "label", "sysctls": "sysctl", "ulimits": "ulimit", "enable_ipv6": "ipv6",
           "ipv4_address": "ip", "ipv6_address": "ip6"}

CONTENT_FORM = {None: (make_form(to_text, "file content environment name"), to_source)}
FILES_FORM = [(make_form(to_text, "source target", mode=to_mode, uid=to_count, gid=to_count), "source")]
# What of `deploy` is for many devices: compose does not use it either.  It is noted.
UNUSED = "endpoint_mode labels placement rollback_config update_config"
DEPLOY_FORM = {
    "mode": to_form("replicated", "supported; only replicated is"), "replicas": to_one,
    "resources": {"limits": make_form(to_number, "cpus pids", memory=to_size),
                  "reservations": make_form(to_number, "cpus", memory=to_size)},
    **make_form(lambda value, where: True, UNUSED),
    "restart_policy": make_form(to_text, "delay window", max_attempts=to_count,
                                condition=to_form("none|on-failure|any", "none, on-failure or any"))}
MOUNT_FORM = make_form(
    to_text, "source target consistency", read_only=to_word("ro"), volume={"nocopy": to_word("nocopy")},
    type=to_form("bind|volume|tmpfs", "supported; known are bind, volume, tmpfs"),
    bind=make_form(to_text, "propagation selinux", create_host_path=to_flag),
    tmpfs={"size": to_form(*SIZE, make=lambda text: "size=" + re.sub("(?i) |i?b", "", text)),
           "mode": lambda value, where: f"mode={to_mode(value, where):o}"})
SERVICE_FORM = dict(
    SERVICE_OPTIONS, image=to_image, command=to_words, entrypoint=to_words, environment=to_pairs,
    profiles=to_list, expose=to_list, links=to_links, container_name=to_name, attach=to_flag, scale=to_one,
    configs=FILES_FORM, secrets=FILES_FORM, deploy=DEPLOY_FORM, tmpfs=to_tmpfs,
    volumes=[(MOUNT_FORM, to_mount)],
    env_file=[({"path": to_text, "required": to_flag}, "path")],
    network_mode=to_namespace("none", "host", "bridge"),
    pull_policy=to_form("always|missing|if_not_present|never", "a pull policy that is supported"),
    blkio_config={"weight": to_number}, logging={"driver": to_text, "options": to_values},
    ports=[(make_form(to_text, "target published host_ip protocol mode name app_protocol"), to_port)],
    depends_on={list: make_form(to_flag, "required restart", condition=to_form(
        "service_(started|healthy|completed_successfully)", "a condition that is known"))},
    networks={list: make_form(to_text, "ipv4_address ipv6_address mac_address", aliases=to_list,
                              priority=to_count)},
    healthcheck=make_form(to_period, "interval timeout start_period start_interval", test=to_test,
                          retries=to_count, disable=to_flag))
NETWORK_FORM = make_form(
    to_flag, "internal attachable enable_ipv6", name=to_text, external=to_external, labels=to_labels,
    driver=to_form("bridge|default", "supported; only bridge is"),
    ipam={"driver": to_form("default", "supported; only default is"),
          "config": [make_form(to_text, "subnet gateway ip_range")]})
VOLUME_FORM = {"name": to_text, "external": to_external, "labels": to_labels,
               "driver_opts": to_driver_options,
               "driver": to_form("|local", "supported; only local is")}
FILE_FORM = {"name": to_text, "version": to_text, "services": {None: SERVICE_FORM},
             "networks": {None: NETWORK_FORM}, "volumes": {None: VOLUME_FORM}, "configs": CONTENT_FORM,
             "secrets": CONTENT_FORM}

# What to write instead of a key that is not supported.
ADVICE = {"build": "nothing is built on a device; name what was built by `image`",
          "extends": "write its settings out",
          "include": "put everything into compose.yaml", "gpus": "name device files by `devices`",
          "runtime": "the engine's own is used",
          "volumes_from": "name the volumes themselves",
          "annotations": "write them as `labels`", "cgroup_parent": "the engine's own is used",
          "driver_opts": "leave it to the engine", "devices": "name device files by the service's `devices`",
          "external": "use `file` or `environment`",
          "external_links": "join a network that is `external`",
          "domainname": "put it into `hostname`", "label_file": "write them as `labels`",
          "uts": "set `hostname`",
          "models": "run what serves them as a service", "post_start": "let the entrypoint do it",
          "pre_stop": "let the entrypoint do it on `stop_signal`",
          "develop": "it is for a developer's machine",
          "oom_kill_disable": "set `mem_limit`", "storage_opt": "set it for the engine"}


def read_value(value, form, where="", variables=None):
    """A value by its form: Settings with None for keys that are not there, {name: …}, and what readers give.

    Texts are interpolated; keys never are, and x-… keys of the format are dropped unread.  Raises
    ComponentError: for all keys that are not supported, or else for the first value that is wrong.
    """
    unknown, faults = [], []

    def read(value, form, where):
        if isinstance(form, list):
            items = value if isinstance(value, list) or value is None else [value]
            return [read(item, form[0], f"{where}[{index}]") for index, item in enumerate(items or ())]
        form, reader = form if isinstance(form, tuple) else (form, form)
        if isinstance(reader, str) and not isinstance(value, dict):
            value = {reader: value}
        try:
            if isinstance(form, dict) and (form is reader or value is None or isinstance(value, dict)):
                value = read_keys(value, form, where)
            elif not faults:                        # after one fault only keys are looked for
                value = interpolate_all(value, variables, where)
            return reader(value, where) if callable(reader) and value is not None and not faults else value
        except ComponentError as error:
            faults.append(error)

    def read_keys(value, form, where):
        if isinstance(value, list) and list in form:
            value = dict.fromkeys(to_list(interpolate_all(value, variables, where), where))
        if not isinstance({} if value is None else value, dict):
            raise make_fault(f"{where}: expected a mapping")
        value = make_names(value or {}, where)
        each = form.get(None) or form.get(list)
        result = Settings()
        for key in value if each else {**value, **form}:
            place = f"{where}.{key}" if where else key
            part = each or form.get(key)
            if part:
                result[key] = read(value.get(key), part, place)
            elif not key.startswith("x-"):
                unknown.append((place, key, list(form)))
        return result

    result = read(value, form, where)
    check_keys(unknown)
    for error in faults[:1]:
        names = ", ".join(sorted(variables.unset)[:5]) if variables else ""
        words = names and f" (used in the file, and no parameter gives it: {names})"
        raise ComponentError(error.code, error.message + words)
    return result


def check_keys(unknown):
    """Raises ComponentError that names keys that are not supported, MAX_NAMED at most, and what to write."""
    import difflib
    texts = []
    told = set()
    for place, key, known in unknown[:MAX_NAMED]:
        near = [f"did you mean {name}?" for name in difflib.get_close_matches(key, known, 1)]
        advice = "" if key in told else ADVICE.get(key, "".join(near))
        told.add(key)
        one = ": this key is not supported" if len(unknown) == 1 else ""
        texts.append(f"{make_printable(place, 200)}{one}" + (f" ({advice})" if advice else ""))
    if texts:
        raise make_fault(("these keys are not supported: " if len(texts) > 1 else "") + ", ".join(texts))


# What stands beside `services`

def make_volumes(document, workload):
    """Top-level `volumes` as {name: (engine's name, create arguments or None for an external one)}."""
    return {name: make_shared(name, value, workload, f"volumes.{name}",
                              make_arguments("--opt", value.driver_opts))
            for name, value in document.volumes.items()}


# Words that an engine takes for a mode where the name of a network is expected.
MODES = "host none bridge private default nat slirp4netns pasta container pod ns".split()


def make_networks(document, workload):
    """Top-level `networks` as make_volumes has it; `default` is always there."""
    networks = {}
    for name, value in dict({"default": read_value(None, NETWORK_FORM)}, **document.networks).items():
        arguments = make_options(value, ("internal", "enable_ipv6"))
        for item in value.ipam.config:
            arguments += make_options(item, ("subnet", "gateway", "ip_range"))
        try:
            find_ranges("subnet", "\n".join(arguments))
        except ValueError as error:
            raise make_fault(f"networks.{name}.ipam: {error}") from None
        mark = sha256_digest(make_json(make_arguments("--label", value.labels) + arguments))[7:39]
        networks[name] = make_shared(name, value, workload, f"networks.{name}",
                                     arguments + [f"--label={LABEL_HASH}={mark}"])
        if networks[name][0] in MODES:
            raise make_fault(f"networks.{name}: {networks[name][0]!r} is a mode to the engine and no network;"
                             " set `network_mode` of the services")
    return networks


def make_shared_labels(workload):
    """{label: text} by which a volume or network says by whom it was made for what."""
    return {LABEL_PROJECT: workload.project, LABEL_DEPLOYMENT: workload.deployment_id,
            LABEL_OWNER: workload.owner}


def make_shared(name, value, workload, where, arguments):
    """(the engine's name, create arguments) of a volume or network; its labels are added."""
    named = value.external if isinstance(value.external, str) else value.name
    own = named or (name if value.external else f"{workload.project}_{name}")
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,254}", own):
        raise make_fault(f"{where}: {make_printable(own, 60)!r} is not a name here")
    check_name(own, workload, where)
    labels = dict(value.labels or {}, **make_shared_labels(workload))
    return own, None if value.external else make_arguments("--label", labels) + arguments


def check_name(name, workload, where):
    """Raises ComponentError for a name that the agent gives to what it makes for another deployment."""
    other = re.search(rf"-({UUID_PATTERN})[_-]", name)
    if other and other.group(1).lower() != workload.deployment_id.lower():
        deny(where, f"{make_printable(name, 120)!r} is of another deployment; what is shared has a name of"
             " its own")


def make_contents(document, variables, folder):
    """Top-level `configs` and `secrets` as {section: {name: text}}."""
    contents = {"configs": {}, "secrets": {}}
    for section, texts in contents.items():
        for name, (kind, text) in document[section].items():
            where = f"{section}.{name}.{kind}"
            if kind == "file":
                text = read_inside(folder, text, where)
            elif kind == "environment":
                if text not in variables:
                    raise make_fault(f"{where}: there is no parameter {make_printable(text, 60)!r}",
                                     "PARAMETER_INVALID")
                text = variables[text]
            texts[name] = text
    return contents


def read_inside(folder, name, where):
    """The text of a file of the package, bytes that are no UTF-8 escaped.

    Raises ComponentError where it is none of its files.
    """
    data = folder.read(name)
    if data is None:
        raise make_fault(f"{where}: {make_printable(name)!r} is not a file of the archive of at most {MIB}"
                         " bytes")
    return data.decode("utf-8", "surrogateescape")


def find_aliases(services, notes):
    """{service: [further names]}: its container_name, and what others link it as.  Adds to `notes`."""
    taken = {name: name for name in services}
    aliases = {}
    for name, service in services.items():
        names = [(owner, alias) for owner, alias in [(name, service.container_name)] + (service.links or [])
                 if alias and owner in services]
        for owner, alias in names:
            aliases.setdefault(owner, []).append(alias)
        more = [(name, alias) for item in service.networks.values() for alias in item.aliases or ()]
        for owner, alias in names + more:
            if taken.setdefault(alias, owner) != owner:
                notes.append(f"services.{name}: the name {make_printable(alias, 60)} also leads to service"
                             f" {taken[alias]}")
    return aliases


# Services

def make_options(settings, keys, prefix="--"):
    """The engine's arguments for what stands at some keys: its options are called like these, or RENAMED."""
    options = [(prefix + RENAMED.get(key, key).replace("_", "-"), settings[key]) for key in keys]
    return [argument for option, value in options for argument in make_arguments(option, value)]


def make_arguments(option, value):
    """What was read as arguments: a flag, one for each of a list, NAME=value for each name; none for ""."""
    if value is None or isinstance(value, bool):
        return [option] if value else []
    if isinstance(value, dict):
        return [f"{option}={name}={item}" for name, item in sorted(value.items())]
    return [f"{option}={item}" for item in (value if isinstance(value, list) else [value]) if item != ""]


# What podman takes several of in one argument, as a line of comma-separated values.
LISTED = ("--add-host --cap-add --cap-drop --device --dns --dns-option --dns-search --group-add --log-opt"
          " --publish --sysctl --ulimit").split()


def make_single(argument):
    """An argument by which podman takes exactly what was read: a comma in it would begin one more value."""
    option, _, value = argument.partition("=")
    if option not in LISTED or not re.search('[,"\r\n]', value):
        return argument
    return '{}="{}"'.format(option, value.replace('"', '""'))


def make_service_options(service, workload):
    """The arguments of a service that options of the engine take as they are.

    What `deploy` says stands above the service's own keys.
    """
    limits = service.deploy.resources.limits
    deployed = {"cpus": limits.cpus, "mem_limit": limits.memory, "pids_limit": limits.pids,
                "mem_reservation": service.deploy.resources.reservations.memory,
                "restart": make_restart(service.deploy.restart_policy)}
    options = {key: deployed.get(key) or service[key] for key in SERVICE_OPTIONS}
    options.update(blkio_weight=service.blkio_config.weight, log_driver=service.logging.driver,
                   log_opt=service.logging.options, pid=make_namespace(service.pid, workload),
                   ipc=make_namespace(service.ipc, workload))
    return make_options(options, sorted(options, key=lambda key: RENAMED.get(key, key)))


def make_restart(policy):
    """`deploy.restart_policy` in the engine's words; None where it says nothing."""
    word = {"none": "no", "on-failure": "on-failure"}.get(policy.condition, "always")
    attempts = f":{policy.max_attempts}" if word == "on-failure" and policy.max_attempts else ""
    return word + attempts if any(item is not None for item in policy.values()) else None


def make_ports(ports, reading, where):
    """Arguments for these Ports, each once, and [[address or "", port, protocol]] that they hold of the host.

    Of two spellings of one, such as 80:80 and 0.0.0.0:80:80, the later one counts.
    Of a range for one port podman takes none, so it is the range's first.
    """
    arguments, held = [], []
    for port in {re.sub(r"\A0\.0\.0\.0:", "", port.argument): port for port in ports}.values():
        numbers, argument = port.numbers, port.argument
        if port.choice and reading.engine == "podman":
            numbers = port.choice[:1]
            argument = re.sub("-[0-9]+:", ":", argument)
        reading.variables.spend(64 * len(numbers), where)   # what they take of the memory
        arguments.append(f"--publish={argument}")
        held += [[port.address, number, port.protocol] for number in numbers]
    return arguments, held


def make_health(check, engine):
    """`healthcheck` as arguments."""
    import shlex
    kind, *words = check.test or [None]
    if check.disable or kind == "NONE":
        return ["--no-healthcheck"]
    test = words[0] if words else None
    if kind == "CMD" and engine == "podman" and (words[1:] or not re.search(r"\s", test)):
        test = make_json(words).decode() if words[1:] else f"CMD {test}"    # a list of one is for a shell
    elif kind == "CMD":
        test = " ".join(map(shlex.quote, words))
    elif engine == "podman" and re.match(r"(?i)\[|cmd|none", test or ""):
        test = f"CMD-SHELL {test}"                  # podman would take it for a list, or for one of its words
    keys = ("cmd", "interval", "timeout", "retries", "start_period")
    return make_options(dict(check, cmd=test), keys, "--health-")


def find_member(members, name, where, section):
    """What a name means of those that stand at the top; raises ComponentError where there is none."""
    if name not in members:
        raise make_fault(f"{where}: {make_printable(name, 60)!r} is not among the top-level {section}")
    return members[name]


def make_mounts(service, reading, where):
    """[Mount] of a service, ready for the engine; of two at one path the later one counts.

    What lies in the package is mounted read-only: what was verified stays as it is, and no container can put
    a link there that the next start would follow out of the package.
    """
    mounts = {}
    items = [(f"{where}.{key}[{index}]", mount) for key in ("tmpfs", "volumes")
             for index, mount in enumerate(getattr(service, key) or ())]
    for place, mount in items:
        if not mount.target.startswith("/") or ":" in mount.source + mount.target:
            raise make_fault(f"{place}: expected source:target[:options] with an absolute target")
        if mount.kind == "bind":
            found = reading.folder.look(mount.source)
            kept = [option for option in mount.options if option not in ("ro", "rw")]
            mount = mount._replace(found=found, options=["ro"] + kept if found.own else mount.options)
        elif mount.source:
            mount = mount._replace(source=find_member(reading.volumes, mount.source, place, "volumes")[0])
        check_mount(place, mount, reading.policy, reading.folder)
        mounts[mount.target.rstrip("/")] = mount
    return list(mounts.values())


def make_mount_argument(mount):
    """A Mount as the engine takes it."""
    source = mount.found.path if mount.found else mount.source
    parts = [part for part in (source, mount.target, ",".join(mount.options)) if part]
    return ("--tmpfs=" if mount.kind == "tmpfs" else "--volume=") + ":".join(parts)


def make_file_name(content):
    """The name of the file of a Content on the disk: another one for what differs in anything."""
    return f"config-{sha256_digest(make_json(make_content_mark(content)))[7:39]}"


def make_content_mark(content):
    """What tells a Content from any other: the digest of its text, and the rest of it."""
    return [sha256_digest(content.text.encode("utf-8", "surrogateescape")), *content[1:]]


def make_files(service, reading, where):
    """`configs` and `secrets` of a service as {path in the container: Content}."""
    files = {}
    for section, root in (("configs", "/"), ("secrets", "/run/secrets/")):
        for index, item in enumerate(service[section]):
            place = f"{where}.{section}[{index}]"
            name = item.source or ""
            text = find_member(reading.contents[section], name, place, section)
            target = item.target or name
            target = target if target.startswith("/") else root + target
            if ":" in target:
                raise make_fault(f"{place}: {make_printable(target, 60)!r} is not a path")
            mode = 0o644 if item.mode is None else item.mode & 0o777
            owner = [-1 if number is None else number for number in (item.uid, item.gid)]
            files[target] = Content(text, mode, *owner)
    return files


def make_attachments(name, service, reading, where):
    """[Attachment]: the first is joined at creation and the others before the start.

    Where there is only a network mode, that alone.
    """
    if service.network_mode:
        if service.networks:
            raise make_fault(f"{where}.network_mode: cannot stand beside networks")
        return [Attachment(make_namespace(service.network_mode, reading.workload), None)]
    wanted = service.networks or read_value({"default": None}, SERVICE_FORM["networks"])
    joined = []
    for network, value in sorted(wanted.items(), key=lambda pair: -(pair[1].priority or 0)):
        own = find_member(reading.networks, network, f"{where}.networks", "networks")[0]
        options = make_options(value, ("ipv4_address", "ipv6_address", "mac_address"))
        aliases = dict.fromkeys((value.aliases or []) + reading.aliases.get(name, []))
        for alias in aliases:
            check_name(alias, reading.workload, f"{where}.networks.{network}")
        joined.append(Attachment(own, list(aliases), options))
    return joined


def find_ranges(kind, text):
    """The subnets, gateways or ip_ranges of a network in its create arguments, a line each, or in what an
    engine shows, as JSON; raises ValueError.
    """
    import ipaddress
    return [ipaddress.ip_network(item, False)
            for item in re.findall(f'(?im)(?:^--|"){kind}(?:=|": *")([^"\n]+)', text)]


def make_ranges(facts):
    """What find_ranges takes of what an engine shows of a network."""
    return make_json([facts.get(key) for key in ("ipam", "subnets", "plugins")]).decode()


def may_have_address(text, address):
    """Whether a container can have an address in a network, by what find_ranges takes.

    The ends of a subnet are nobody's, and the gateway is the host.
    """
    import ipaddress
    try:
        address = ipaddress.ip_address(address)
        subnets, gateways, ranges = [find_ranges(kind, text) for kind in ("subnet", "gateway", "ip-?range")]
        subnet = next(subnet for subnet in subnets if address in subnet)
        taken = [item.network_address for item in gateways if item.network_address in subnet]
        if not taken and not ranges:                # of which docker takes the first one
            taken = [subnet.network_address + 1]
    except (ValueError, StopIteration):
        return False
    return address not in (subnet.network_address, subnet.broadcast_address, *taken)


def make_container_name(project, service):
    """The name of a service's container."""
    return f"{project}-{service}-1"


def make_namespace(text, workload):
    """A namespace as the engine takes it: that of another service is that of its container."""
    owner = (text or "").partition("service:")[2]
    return f"container:{make_container_name(workload.project, owner)}" if owner else text


def find_shared(service):
    """The names of the services whose namespaces a service shares."""
    modes = [service.network_mode or "", service.pid or "", service.ipc or ""]
    return [mode[8:] for mode in modes if mode.startswith("service:")]


def make_environment(service, reading, where):
    """The environment of a container: env files, then `environment`, then the device's own (C-185).

    In `environment` a name alone takes the parameter of its name, and where there is none the container gets
    none.  A value in an env file may name those of `environment`, which stand above its own.
    """
    variables = reading.variables
    given = {name: variables.get(name) if text is None else text
             for name, text in (service.environment or {}).items()}
    variables.maps.append({name: text for name, text in given.items() if text is not None})
    environment = {}
    for item in service.env_file:
        path = item.path or ""
        found = reading.folder.look(path)
        if item.required is not False or found.kind or not found.own:
            text = read_inside(reading.folder, path, f"{where}.env_file")
            parse_env_file(text, variables, path, environment)
    variables.maps.pop()
    environment.update(given, **reading.workload.environment)
    environment = {name: text for name, text in environment.items() if text is not None}
    for name, text in environment.items():
        check_variable(name, to_text(text, f"{where}.environment.{make_printable(name, 60)}"),
                       f"{where}.environment")
    return environment


# A text that an env file of the engine cannot hold is taken from the environment of the engine's own command.
# These names have a meaning there: for the loader and the C library, for Go, for the engines and what they
# start.
OBEYED = (
    r"PATH|HOME|USER|LOGNAME|SHELL|TERM|LANG|LANGUAGE|TZ|TZDIR|TMPDIR|TEMP|TMP|PWD|OLDPWD|IFS|ENV|"
    r"POSIXLY_CORRECT|BASH_.*|LD_.*|LC_.*|GO(DEBUG|GC|MAXPROCS|MEMLIMIT|TRACEBACK|RACE|ROOT|PATH|COVERDIR|"
    r"FIPS.*)|XDG_.*|MALLOC_.*|GLIBC_.*|GCONV_PATH|GETCONF_.*|LOCPATH|LOCALDOMAIN|NLSPATH|RES_OPTIONS|"
    r"HOST(NAME|ALIASES)?|(HTTPS?|FTP|ALL|NO)_PROXY|_.*|CONTAINERS?_.*|DOCKER.*|PODMAN.*|BUILDAH.*|LIBPOD.*|"
    r"STORAGE_.*|REGISTR.*|CNI_.*|NETAVARK.*|AARDVARK.*|OCI_.*|CRIU.*|RUNC.*|CRUN.*|LIBKRUN.*|CONMON.*|"
    r"DBUS_.*|NOTIFY_.*|LISTEN_.*|SYSTEMD_.*|SSL_CERT_.*|SSLKEYLOGFILE|OPENSSL_.*|SSH_A.*|GPG|GNUPGHOME|"
    r"OTEL_.*|RUST_.*|FUSE_.*|USERNS.*|COMPOSE_.*")


def find_handed(environment):
    """{name: text} of the variables that no line of an env file holds.

    The engine's command takes them from its own environment.
    """
    return {name: text for name, text in environment.items()
            if re.search("[\r\n]", text) or len(f"{name}={text}".encode()) > 60000}


def check_variable(name, text, where):
    """Raises ComponentError for a variable that no process, or no engine, can be given."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise make_fault(f"{where}: {make_printable(name)!r} is not a variable name")
    fault = ""
    if len(f"{name}={text}".encode()) >= 128 * 1024:
        fault = "a variable has less than 128 KiB"
    elif find_handed({name: text}) and re.fullmatch(OBEYED, name, re.I):
        fault = "a variable of this name has one line of at most 60000 bytes"
    if fault:
        raise make_fault(f"{where}.{name}: {fault}; use a file from `configs`", "PARAMETER_INVALID")


def make_dependencies(service):
    """`depends_on` as {service: (condition, required)}.

    A service whose namespace is shared, and one that is linked, comes first too.
    """
    result = {other: (item.condition or "service_started", item.required is not False)
              for other, item in service.depends_on.items()}
    for other in find_shared(service) + [owner for owner, _ in service.links or ()]:
        result.setdefault(other, ("service_started", True))
    return result


# What a file may ask for

# An engine's own further options can name files of the host (podman: `O,upperdir=…`, the log option `path`):
# only these are taken.
MOUNT_OPTION = ("ro|rw|z|Z|copy|nocopy|cached|delegated|consistent|exec|noexec|nosuid|nodev|private|rprivate|"
                "slave|rslave")
# What names nothing but the size of a tmpfs, its owner and what may be done in it.
TMPFS_OPTION = "(size|mode|uid|gid|nr_inodes)=[0-9]+[kmgKMG%]?|ro|rw|exec|noexec|nosuid|nodev|noatime"
LOG_OPTIONS = "max-size max-file max-buffer-size mode compress tag labels labels-regex env env-regex".split()
LOG_DRIVERS = {"podman": "json-file k8s-file journald none".split(),
               "docker": "json-file local journald syslog none".split()}
# {key: what a service may ask for by it where policy.privileged is deny}; the capabilities are those that
# every container has by itself, on each engine.
HARMLESS = {
    "privileged": "(?!)", "oom_score_adj": "[^-].*", "pid": "private|service:.*",
    "ipc": "private|shareable|none|service:.*", "userns_mode": "(?!host).*", "devices": "(?!)",
    "device_cgroup_rules": "(?!)", "group_add": "(?!keep-groups).*",
    "security_opt": "no-new-privileges([:=]true)?",
    "cap_add": "(?i)(CAP_)?(CHOWN|DAC_OVERRIDE|FOWNER|FSETID|KILL|NET_BIND_SERVICE|SETFCAP|SETGID|SETPCAP|"
               "SETUID|SYS_CHROOT)"}


def deny(place, why):
    """Raises ComponentError POLICY_DENIED."""
    raise make_fault(f"{place}: {why}", "POLICY_DENIED")


def check_policy(where, service, policy):
    """Raises ComponentError POLICY_DENIED for what the settings of a service may not ask for."""
    if service.network_mode == "host" and policy.host_network != "allow":
        deny(f"{where}.network_mode", "the host's network is denied by policy.host_network")
    if policy.privileged == "allow":
        return
    for key, pattern in HARMLESS.items():
        for item in service[key] if isinstance(service[key], list) else filter(None, [service[key]]):
            allowed = key == "devices" and any(is_device(item, entry) for entry in policy.devices)
            if not allowed and not re.fullmatch(pattern, str(item), re.S):
                setting = "policy.devices" if key == "devices" else "policy.privileged"
                deny(f"{where}.{key}", f"{make_printable(str(item), 80)!r} is denied by {setting}")


def is_device(item, pattern):
    """Whether one of `devices`, HOST[:CONTAINER[:RIGHTS]], is a file that an entry of policy.devices names.

    In that * stands for anything but a slash.
    """
    path = item.split(":")[0]
    names = re.escape(pattern).replace(r"\*", "[^/]*")
    return ".." not in path.split("/") and bool(re.fullmatch(names, path))


def check_logging(where, logging, engine):
    """Raises ComponentError for a log driver, or an option of it, that the engine lacks or that leads out."""
    driver = logging.driver or LOG_DRIVERS[engine][0]
    options = logging.options or {}
    if driver not in LOG_DRIVERS[engine]:
        known = ", ".join(LOG_DRIVERS[engine])
        raise make_fault(f"{where}.driver: {engine} has no {make_printable(driver, 40)!r}, but {known}")
    for name in options:
        if name not in LOG_OPTIONS:
            deny(f"{where}.options.{make_printable(name, 60)}", f"only {', '.join(LOG_OPTIONS)} are allowed")
    if engine == "podman" and driver != "journald" and "tag" in options:
        raise make_fault(f"{where}.options.tag: podman takes it for the driver journald alone")


def check_mount(where, mount, policy, folder):
    """Raises ComponentError for a mount of what is not there, or of what policy.host_paths does not allow."""
    known = TMPFS_OPTION if mount.kind == "tmpfs" else MOUNT_OPTION
    for option in mount.options:
        if not re.fullmatch(known, option):
            deny(where, f"the mount option {make_printable(option, 80)!r} is not allowed")
    if mount.kind != "bind":
        return
    source = make_printable(mount.source, 200)
    found = mount.found
    if mount.source.startswith("~"):
        deny(where, f"{source} is in a home folder; name the path itself")
    if found.socket:
        deny(where, f"{source} is an engine's socket or leads to one, which is never handed out")
    if not any(is_below(found.real, folder.resolve(root)) for root in ["", *policy.host_paths]):
        real = make_printable(found.real, 200)
        way = f" (it leads to {real})" if real != source else ""
        deny(where, f"{source}{way} is outside of policy.host_paths")
    if not found.kind:
        owner = "the package" if found.own else "this device"
        raise make_fault(f"{where}: {owner} has no {source}; use a named volume for data")


def check_ways(services):
    """Raises ComponentError where a service can write to a folder above what it or another one mounts.

    It could put a link there, which the engine would follow at the next start.
    """
    mounts = [(service.name, mount) for service in services for mount in service.mounts]
    mounts = [(name, mount) for name, mount in mounts if mount.kind == "bind" and not mount.found.own]
    for name, mount in mounts:
        for other, above in mounts:
            inside = mount.found.real != above.found.real and is_below(mount.found.real, above.found.real)
            if inside and "ro" not in above.options:
                names = [make_printable(item.source, 200) for item in (mount, above)]
                deny(f"services.{name}.volumes",
                     f"{names[0]} lies in {names[1]}, where service {other} may write: it"
                     " could put a link there. Mount one of both, or the upper one read-only")


def is_below(path, root):
    """Whether a path is `root` or lies below it."""
    return path == root or path.startswith(root.rstrip("/") + "/")


# A whole file

def make_project(document, workload, policy, engine, folder=None):
    """A compose file's value to a Project; raises ComponentError.  folder: the package as a Folder.

    All that parameters mean is settled here, so that none ever reaches a tool's own environment (C-180,
    D-18).  Everything is read once, into records, and policy is held against these.
    """
    services = document.get("services") if isinstance(document, dict) else None
    if not (services and isinstance(services, dict)):
        raise make_fault("no services")
    folder = folder or Folder(workload.folder)
    notes = []
    variables = make_file_variables(workload, folder)
    document = dict(document, services=find_wanted(services, variables, notes))
    document = read_value(document, FILE_FORM, "", variables)
    reading = Reading(workload, policy, engine, folder, variables, make_volumes(document, workload),
                      make_networks(document, workload), make_contents(document, variables, folder),
                      find_aliases(document.services, notes))
    for name, service in document.services.items():
        notes += [f"services.{name}.deploy.{key} is not used: there is one device" for key in UNUSED.split()
                  if service.deploy[key]]
    services = {name: make_service(name, service, reading) for name, service in document.services.items()}
    check_ways(services.values())
    order = make_hashes(order_services(services))
    notes += [f"{name} is used, and no parameter gives it: it is empty; give it, or write"
              f" ${{{name}:-DEFAULT}}" for name in sorted(variables.unset)]
    used = {item.network for service in order for item in service.networks}
    used.update(mount.source for service in order for mount in service.mounts)
    networks, volumes = [{name: arguments for name, arguments in shared.values() if name in used}
                         for shared in (reading.networks, reading.volumes)]
    return Project(order, networks, volumes, notes)


def make_file_variables(workload, folder):
    """The Variables of a file: its own defaults in `.env`, two that are compose's own, the parameters."""
    variables = Variables(workload.parameters)
    if folder.look(".env").kind:
        variables.maps.append(parse_env_file(read_inside(folder, ".env", ".env"), variables, ".env"))
    variables.maps.insert(1, {"PWD": ".", "COMPOSE_PROJECT_NAME": workload.project})
    return variables


def find_wanted(services, variables, notes):
    """The services that are started: those of no profile, or of one that COMPOSE_PROFILES in `.env` names.

    What an image was built from is left out where it is named, and noted.
    """
    started = {}
    owners = {f"container:{service['container_name']}": name for name, service in services.items()
              if isinstance(service, dict) and "container_name" in service}
    profiles = set(variables.get("COMPOSE_PROFILES", "").split(","))
    for name, service in make_names(services, "services").items():
        where = f"services.{name}"
        # It becomes part of the name of a file.
        if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}", name):
            raise make_fault(f"services: {make_printable(name, 60)!r} is not a service name")
        if not isinstance(service, dict):
            raise make_fault(f"{where}: expected a mapping")
        wanted = interpolate_all(service.get("profiles") or [], variables, f"{where}.profiles")
        if wanted and profiles.isdisjoint(to_list(wanted, f"{where}.profiles")):
            continue
        if "build" in service and service.get("image"):
            service = {key: item for key, item in service.items() if key != "build"}
            notes.append(f"{where}.build is not used: the image is pulled")
        for key in ("network_mode", "pid", "ipc"):  # a container of ours has another name
            owner = owners.get(str(service.get(key)))
            service = dict(service, **{key: f"service:{owner}"}) if owner else service
        started[name] = service
    return started


def make_service(name, service, reading):
    """A Service from its settings, held against the policy.  Its hash comes when all are known."""
    where = f"services.{name}"
    if not service.image:
        raise make_fault(f"{where}.image: expected the name of an image")
    mounts = make_mounts(service, reading, where)
    check_policy(where, service, reading.policy)
    check_logging(f"{where}.logging", service.logging, reading.engine)
    ports, held = make_ports(service.ports, reading, f"{where}.ports")
    arguments = make_service_options(service, reading.workload) + ports
    command = service.command or []
    if service.entrypoint is not None:
        arguments.append(f"--entrypoint={''.join(service.entrypoint[:1])}")
        command = service.entrypoint[1:] + command
    if reading.engine == "podman":
        arguments = list(map(make_single, arguments))
    arguments += make_health(service.healthcheck, reading.engine) + list(map(make_mount_argument, mounts))
    if sum(map(len, arguments + command)) > 64 * 1024:
        raise make_fault(f"{where}: its settings, labels and command together have more than 64 KiB")
    return Service(name, service.image, arguments, command, make_environment(service, reading, where),
                   make_files(service, reading, where), make_attachments(name, service, reading, where),
                   make_dependencies(service), service.pull_policy or "missing", "", held, mounts,
                   find_shared(service),
                   [other for other, item in service.depends_on.items() if item.restart])


def order_services(services):
    """The services so that each comes after what it depends on.

    Raises ComponentError for a circle or an unknown name.
    """
    order = {}
    todo = list(services)[::-1]
    path = []
    while todo:
        name = todo[-1]
        if name in order or path[-1:] == [name]:    # all that it depends on has been added
            order.setdefault(todo.pop(), services[name])
            path = [other for other in path if other != name]
            continue
        path.append(name)
        for other, (_, required) in reversed(list(services[name].depends_on.items())):
            if other in path:
                circle = path[path.index(other):] + [other]
                raise make_fault(f"depends_on goes in a circle: {' -> '.join(circle)}")
            if other in services:
                todo.append(other)
            elif required:
                raise make_fault(f"services.{name}.depends_on: there is no service"
                                 f" {make_printable(other, 60)!r} that is started")
    return list(order.values())


def make_hashes(order):
    """The services, each with a hash of all that makes its container.

    A service that shares another's namespace is made anew with it; so is one that depends on it with
    `restart`.
    """
    final = {}
    for service in order:
        contents = {path: make_content_mark(item) for path, item in service.files.items()}
        shared = [final[other].hash for other in service.shares + service.follows if other in final]
        parts = [service.image, service.arguments, service.command, service.environment, contents,
                 service.networks, shared]
        final[service.name] = service._replace(hash=sha256_digest(make_json(parts))[7:39])
    return list(final.values())


def make_labels(workload, service, digest):
    """The labels by which containers are found again, and those by which compose finds them.

    None is left out for being empty: an image has labels of its own.
    """
    return {**make_shared_labels(workload), LABEL_COMPONENT: workload.component, LABEL_SERVICE: service,
            LABEL_HASH: digest, LABEL_DEVICE: workload.device_id,
            "com.docker.compose.project": workload.project, "com.docker.compose.service": service,
            "com.docker.compose.container-number": "1", "com.docker.compose.config-hash": digest,
            "com.docker.compose.oneoff": "False"}


# ----------------------------------------------------------------------------------------------------------
# 16. Packages
# ----------------------------------------------------------------------------------------------------------

COMPOSE_ARTIFACT = "application/vnd.org.margo.component.compose+json"
COMPOSE_LAYER = "application/vnd.org.margo.component.compose.tar+gzip"
CHART_CONFIG = "application/vnd.cncf.helm.config.v1+json"
CHART_LAYER = "application/vnd.cncf.helm.chart.content.v1.tar+gzip"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64",
                 "armv7l": "arm", "armv6l": "arm", "armv8l": "arm"}
MAX_ENTRIES = 10000                                 # files in one archive


Reference = define("Reference", "host name tag",
    "Where a component's package lies: registry host[:port], repository name, tag.")
Entry = define(
    "Entry",
    "path kind mode link offset size",
    "One checked entry of an archive: path below the top-level folder, `file`, `folder` or `link`; of a file"
    " its mode and the place of its bytes, of a link where it leads to.",
    "", 0, 0,
)


def parse_reference(repository, revision):
    """`oci://host[:port]/name` and a tag to a Reference; raises ComponentError (C-153)."""
    part = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
    match = re.fullmatch(rf"oci://({REGISTRY_PATTERN})/({part}(?:/{part})*)", repository)
    if not match or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", revision):
        raise ComponentError(
            "INVALID_DEPLOYMENT",
            f"{make_printable(repository)}:{make_printable(revision)} is not an OCI reference",
        )
    return Reference(match.group(1), match.group(2), revision)


def parse_challenge(header):
    """`WWW-Authenticate` to [(scheme in lower case, {parameter: value})] (RFC 9110, 11.6.1)."""
    from urllib.request import parse_http_list
    challenges = []
    for item in parse_http_list(header or ""):
        scheme, parameter = re.fullmatch(r"(?s)(?:([A-Za-z]+)(?:\s+|\Z)(?!=))?(.*)", item).groups()
        if scheme:
            challenges.append((scheme.lower(), {}))
        name, equals, value = parameter.partition("=")
        if challenges and equals:
            challenges[-1][1][name.strip().lower()] = value[1:-1] if value[:1] == '"' else value
    return challenges


def load_credentials(host, settings):
    """Authorization of a registry by user name and password; None where none are configured."""
    if not settings.username or not settings.password_file:
        return None
    secret = load_secret(f"registries.{host}.password_file", settings.password_file,
                         lambda words: ComponentError("PULL_UNAUTHORIZED", words))
    return make_authorization(secret, settings.username.encode())


class Registry:
    """One registry host as configured: where it is, whom it trusts, what it is told.

    Credentials never leave their host (C-169).
    """

    def __init__(self, host, config):
        self.host, self.timeout = host, config.wfm.timeout
        self.address = "registry-1.docker.io" if host == "docker.io" else host
        self.settings = config.registries.get(host) or make_settings({}, REGISTRY_SCHEMA, "", "", [])
        self.scheme = "http" if self.settings.insecure else "https"
        self.authorization = None
        # made when TLS is first needed: the system's store takes its time
        self.context = None

    def get(self, name, path, accept, limit):
        """GET below /v2/<name>/, with a login where one is asked for: a Response with status 200.

        Raises ComponentError PULL_UNAUTHORIZED, PULL_FAILED.
        """
        url = f"{self.scheme}://{self.address}/v2/{name}/{path}"
        response = self.fetch(url, accept, limit)
        if response.status == 401:
            challenge = ", ".join(response.headers.get_all("WWW-Authenticate") or ())
            self.authorization = self.authenticate(parse_challenge(challenge), name)
            response = self.fetch(url, accept, limit)
        return self.check(response, url, limit)

    def check(self, response, url, limit):
        """The Response, if its status is 200 and it has at most `limit` bytes; else raises ComponentError."""
        where = f"{url}: HTTP {response.status}"
        if find_verdict(response.status) is Untrusted:
            raise ComponentError("PULL_UNAUTHORIZED", f"{where}; {self.make_plea()}")
        if response.status != 200:
            absent = response.status == 404
            hint = "there is no such package" if absent else "it cannot be served now, tried again later"
            wait = parse_retry_after(response.headers.get("Retry-After"), time.time())
            raise ComponentError("PULL_FAILED", f"{where}; {hint}", retry_after=wait, status=response.status)
        if len(response.body) > limit:
            raise ComponentError("PULL_FAILED",
                                 f"{url}: the answer is longer than {limit} bytes, all that policy allows")
        return response

    def fetch(self, url, accept, limit):
        """One GET that follows at most five redirects.

        Authorization goes to this registry's own origin only.
        """
        from urllib.parse import urljoin, urlsplit
        try:
            origin = urlsplit(url)[:2]
            for _ in range(6):
                parts = urlsplit(url)
                if parts.scheme not in ("https", self.scheme):
                    raise ComponentError("PULL_FAILED",
                                         f"{make_printable(url)}: redirected to a scheme that is not allowed")
                own = parts[:2] == origin
                headers = {"Accept": accept}
                if self.authorization and own:
                    headers["Authorization"] = self.authorization
                response = self.request(url, headers, max(limit, MAX_ANSWER))
                if response.status == 401 and not own:
                    raise ComponentError(
                        "PULL_UNAUTHORIZED",
                        f"{make_printable(url)}: HTTP 401 after a redirect;"
                        f" credentials are for {self.host} alone",
                    )
                if response.status not in (301, 302, 303, 307, 308):
                    return response
                url = urljoin(url, response.headers.get("Location") or "")
        except ComponentError:
            raise
        except (MargoError, ValueError) as error:
            hint = f"; set registries.{self.host}.ca" if isinstance(error, Untrusted) else ""
            where = "" if isinstance(error, MargoError) else f"{make_printable(url)}: "
            raise ComponentError("PULL_FAILED", f"{where}{error}{hint}") from None
        raise ComponentError("PULL_FAILED", f"{make_printable(url)}: too many redirects")

    def request(self, url, headers, limit):
        """One GET, by TLS where the URL says so."""
        secure = url.startswith("https:")
        if secure and self.context is None:
            self.context = make_tls_context(ca_file=self.settings.ca, min_tls="1.2")
        return request("GET", url, headers, None, self.context if secure else None, self.timeout, limit)

    def authenticate(self, challenges, name):
        """The Authorization that answers a challenge; raises ComponentError PULL_UNAUTHORIZED."""
        from urllib.parse import urlencode
        basic = load_credentials(self.host, self.settings)
        for scheme, facts in challenges:
            if scheme == "basic" and basic:
                return basic
            if scheme == "bearer" and facts.get("realm", "").startswith(("https://", self.scheme + "://")):
                query = {"service": facts["service"]} if facts.get("service") else {}
                query["scope"] = facts.get("scope") or f"repository:{name}:pull"
                mark = "&" if "?" in facts["realm"] else "?"
                url = facts["realm"] + mark + urlencode(query)
                headers = {"Authorization": basic} if basic else {}
                try:
                    answer = parse_json(self.request(url, headers, MAX_ANSWER).body, "the token")
                    token = answer.get("token") or answer.get("access_token")
                    if isinstance(token, str) and re.fullmatch(r"[\x21-\x7e]+", token):
                        return "Bearer " + token
                except (MargoError, ValueError, AttributeError) as error:
                    log("warning", "no token from the registry", registry=self.host, reason=str(error))
        raise ComponentError("PULL_UNAUTHORIZED", self.make_plea())

    def make_plea(self):
        """What a registry's refusal asks of the operator, in words."""
        key = f"registries.{self.host}."
        if not self.settings.username:
            return f"registry {self.host} asks for a login; set {key}username and password_file"
        return (f"registry {self.host} refuses the login of {self.settings.username};"
                f" mend {key}username and password_file {self.settings.password_file or ''}".rstrip())


def obtain_package(component, known, config, store, kind):
    """The package of a component, verified and kept: (bytes, its facts {reference, digest}).

    known: its facts of an earlier time, or None; the same revision again is taken from the disk, network or
    not (P-1).  kind: compose or helm.  Raises ComponentError.
    """
    reference = f"{component.repository}:{component.revision}" if component.revision else component.repository
    data = store.load_artifact(known["digest"]) if known and known["reference"] == reference else None
    if data is not None:
        return data, known
    fetch = FETCHERS[component.repository.partition(":")[0]]
    digest, data = fetch(component, config, store, kind)
    return data, {"reference": reference, "digest": digest}


def fetch_component(component, config, store, kind):
    """The package of a component from a registry; see fetch_package."""
    return fetch_package(parse_reference(component.repository, component.revision), config, store, kind)


# by the scheme of a repository; other generations add theirs
FETCHERS = {"oci": fetch_component}


def fetch_package(reference, config, store, kind="compose"):
    """A Compose Archive or a chart from its registry's mirror, or from the registry: (digest, bytes).

    It is verified and kept; what is in the store already is not fetched again.  Raises ComponentError.
    """
    return ask_registries(reference.host, config, lambda registry: fetch_from_registry(
        reference, registry, config, store, kind))


def ask_registries(host, config, ask):
    """What `ask` has from the mirror of a registry, or from the Registry itself; raises ComponentError."""
    mirror = (config.registries.get(host) or {}).get("mirror")
    try:
        if mirror:
            return ask(Registry(re.sub("^https?://", "", mirror).rstrip("/"), config))
    except ComponentError as error:
        log("warning", "the mirror does not serve it; the registry itself is asked", mirror=mirror,
            reason=error.message)
    return ask(Registry(host, config))


def fetch_from_registry(reference, registry, config, store, kind):
    """fetch_package from one registry (protocol 6.2)."""
    where = f"{registry.host}/{reference.name}:{reference.tag}"
    answer = registry.get(reference.name, f"manifests/{reference.tag}", f"{OCI_MANIFEST}, {OCI_INDEX}",
                          config.policy.max_document)
    claimed = answer.headers.get("Docker-Content-Digest")
    if claimed and claimed.startswith("sha256:") and claimed != sha256_digest(answer.body):
        raise ComponentError(
            "DIGEST_MISMATCH",
            f"{where}: the registry names {claimed}, the manifest has {sha256_digest(answer.body)}",
        )
    digest, size = parse_package_manifest(answer.body, where, config.policy.max_artifact, kind)
    data = store.load_artifact(digest)
    if data is None:
        # it is kept, and unpacked to some times its size
        check_space(store.folder, 5 * size, where)
        data = registry.get(
            reference.name, f"blobs/{digest}", "*/*", min(size + 1, config.policy.max_artifact)
        ).body
        if len(data) != size or sha256_digest(data) != digest:
            raise ComponentError(
                "DIGEST_MISMATCH",
                f"{where}: the layer should be {digest} of {size} bytes,"
                f" it is {sha256_digest(data)} of {len(data)}",
            )
        store.save_artifact(digest, data)
    return digest, data


def check_space(folder, need, what):
    """Raises ComponentError DISK_FULL where `need` bytes more would fill a disk (P-4)."""
    free, margin = get_space(folder)
    if free < need + margin:
        raise ComponentError(
            "DISK_FULL",
            f"{what} takes about {need // KIB + 1} KiB, and of the {free // KIB} KiB that are free at"
            f" {folder} {margin // KIB} stay so; free some there",
        )


def parse_package_manifest(data, where, max_artifact, kind="compose"):
    """An OCI manifest's bytes to (digest, size) of the one layer of a Compose Archive or Helm chart.

    Raises ComponentError (C-155).
    """
    try:
        value = parse_json(data, "the OCI manifest")
        if not isinstance(value, dict) or value.get("schemaVersion") != 2:
            raise ValueError("not an OCI image manifest (schemaVersion 2)")
        if "manifests" in value:
            raise ValueError("an index of several images, where one Compose Archive is expected")
        layer = find_layer(value, kind)
        check_shape(layer.get("digest"), DIGEST_PATTERN, "the layer's digest")
        size = layer.get("size")
        if type(size) is not int or size < 1:
            found = make_printable(str(size), 80)
            raise ValueError(f"the layer's size: found {found!r}, expected a number of bytes")
        if size > max_artifact:
            raise ValueError(f"the layer has {size} bytes, policy.max_artifact is {max_artifact}")
    except ValueError as error:
        raise ComponentError("ARCHIVE_INVALID", f"{where}: {error}") from None
    return layer["digest"], size


def find_layer(value, kind):
    """The one layer of an OCI manifest that holds a package of a kind; raises ValueError."""
    layers = value.get("layers")
    wanted = COMPOSE_LAYER
    layers = layers if isinstance(layers, list) and all(isinstance(layer, dict) for layer in layers) else []
    if kind == "helm":
        wanted = CHART_LAYER
        config = value.get("config")
        if not isinstance(config, dict) or config.get("mediaType") != CHART_CONFIG:
            raise ValueError(f"not a Helm chart (its config is no {CHART_CONFIG})")
        # Beside it there may be its provenance.
        layers = [layer for layer in layers if layer.get("mediaType") == CHART_LAYER]
    elif value.get("artifactType") != COMPOSE_ARTIFACT:
        found = str(value.get("artifactType"))
        hint = ""
        if found == "application/vnd.docker.compose.project":
            hint = "; made by `docker compose publish`, which Margo does not take"
        raise ValueError(f"artifactType is {make_printable(found, 100)}, expected {COMPOSE_ARTIFACT}{hint}")
    if len(layers) != 1:
        raise ValueError("expected exactly one layer")
    found = make_printable(str(layers[0].get("mediaType")), 100)
    if found != wanted:
        raise ValueError(f"the layer's mediaType is {found}, expected {wanted}")
    return layers[0]


COMPOSE_NAMES = ("compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml")


def check_archive(data, max_unpacked, relaxed=False):
    """A Compose Archive's bytes to a file of its tar bytes and [Entry] (C-156 to C-162).

    Nothing is unpacked before all of it was found to be harmless.  Links count as what they lead to, so that
    a chain of them cannot leave the top-level folder either.  relaxed: as older generations packed, there
    need be no top-level folder, and the compose file may have its other names (protocol 6.5).  Raises
    ComponentError ARCHIVE_INVALID.
    """
    entries = {}
    tops = set()
    try:
        plain, members, end = unpack_tar(data, max_unpacked, MAX_ENTRIES)
        loose = relaxed and any("/" not in strip_dot(member.name) and not member.isdir()
                                for member in members)
        for member in members:
            add_entry(member, entries, tops, "package/" if loose else "")
        if any(piece.strip(b"\0") for piece in read_pieces(plain, end, max_unpacked)):
            raise ValueError(f"it is damaged at byte {end}")
        if not tops:
            raise ValueError("it is empty")
        if sum(entry.size for entry in entries.values()) > max_unpacked:
            raise ValueError(f"its files have more than {max_unpacked} bytes (policy.max_unpacked)")
        check_tree(entries)
        compose = entries.get("compose.yaml")
        others = [name for name in COMPOSE_NAMES[1:] if name in entries]
        if compose is None and others and relaxed:
            compose = entries["compose.yaml"] = entries[others[0]]._replace(path="compose.yaml")
        if compose is None or compose.kind != "file":
            raise ValueError("no compose.yaml in the top-level folder"
                             + (f" ({others[0]} is not taken for it)" if others else ""))
        # first folders, then files in the order in which their bytes come
        return plain, sorted(entries.values(), key=lambda entry: (entry.kind == "link", entry.offset))
    except ValueError as error:
        raise ComponentError("ARCHIVE_INVALID",
                             f"Compose Archive refused: {make_printable(str(error))}") from None


def strip_dot(name):
    """A name of a tar entry without the ./ that it may begin with."""
    return name[2:] if name.startswith("./") else name


def add_entry(member, entries, tops, top=""):
    """Checks one tar entry by itself and adds it to `entries`, by its path below the top-level folder.

    top: the folder that an archive without one is taken to lie in.  Raises ValueError.
    """
    name = strip_dot(member.name)
    if name in ("", ".") and member.isdir():
        return
    absolute = name.startswith("/")
    name = top + name
    first, *parts = name.rstrip("/").split("/")
    if absolute or {"..", "", "."} & {first, *parts} or not is_storable(name):
        raise ValueError(f"{make_printable(name)!r} is not a path inside the archive")
    path = "/".join(parts)
    tops.add(first)
    if len(tops) > 1:
        raise ValueError(f"more than one top-level entry ({', '.join(sorted(tops))})")
    if member.isdir():
        entry = Entry(path, "folder", 0o755)
    elif not path:
        raise ValueError(f"{name!r} stands at the top, where only one folder may stand")
    elif member.isfile() and not member.issparse():
        entry = Entry(path, "file", 0o755 if member.mode & 0o111 else 0o644, "", member.offset_data,
                      member.size)
    elif member.issym():
        if not member.linkname or not is_storable(member.linkname):
            raise ValueError(
                f"the link {name!r} leads to {make_printable(member.linkname)!r}, which is no path"
            )
        entry = Entry(path, "link", 0o777, member.linkname)
    elif member.islnk():
        target, _, inside = (top + strip_dot(member.linkname)).partition("/")
        source = entries.get(inside)
        if target != first or source is None or source.kind != "file":
            raise ValueError(
                f"the hard link {name!r} leads to {member.linkname!r},"
                " which is no earlier file of the archive"
            )
        entry = source._replace(path=path)
    else:
        raise ValueError(f"{name!r} is neither file, folder nor link")
    if path in entries and (entry.kind != "folder" or entries[path] != entry):
        raise ValueError(f"{name!r} occurs twice")
    entries[path] = entry


def is_storable(path):
    """Whether any file system takes a path: printable, no part over 255 bytes, not too long as a whole."""
    data = path.encode("utf-8", "surrogateescape")
    return path.isprintable() and len(data) <= 1000 and max(map(len, data.split(b"/"))) <= 255


def check_tree(entries):
    """Raises ValueError where a parent is no folder, a link leads out, or there are too many folders."""
    folders = set()
    for path, entry in entries.items():
        parent = path.rpartition("/")[0]
        while parent and parent not in folders:
            if parent in entries and entries[parent].kind != "folder":
                raise ValueError(f"{path!r} lies below {parent!r}, which is no folder")
            folders.add(parent)
            if len(folders) > MAX_ENTRIES:
                raise ValueError(f"more than {MAX_ENTRIES} folders")
            parent = parent.rpartition("/")[0]
        if entry.kind == "link":
            resolve_link(path, entries, 40)


def resolve_link(path, entries, hops):
    """The path that a path of the archive leads to once links are followed; ValueError: to the outside."""
    resolved = []
    todo = path.split("/")[::-1]
    while todo:
        part = todo.pop()
        if part == "..":
            if not resolved:
                raise ValueError(f"the link {path!r} leads out of the top-level folder")
            resolved.pop()
        elif part not in ("", "."):
            resolved.append(part)
        entry = entries.get("/".join(resolved))
        if entry and entry.kind == "link":
            hops -= 1
            if hops < 0 or entry.link.startswith("/"):
                raise ValueError(f"the link {path!r} leads out of the top-level folder, or in a circle")
            resolved.pop()
            todo.extend(entry.link.split("/")[::-1])
    return "/".join(resolved)


def load_entries(plain, entries, folder):
    """Each Entry, its path below a folder, and the bytes of a file piece by piece.

    plain: a file of the archive's tar bytes.  It would be unpacked anew to go back in it, so those of a hard
    link are taken from the path of the file before.
    """
    places = {}
    for entry in entries:
        path = os.path.join(folder, entry.path)
        first = places.setdefault(entry.offset, path)
        again = load_pieces(first) if first != path else read_pieces(plain, entry.offset, entry.size)
        yield entry, path, again


def load_sameness(entry, path, pieces):
    """Whether a path on the disk is what an Entry of an archive says, a file of these bytes."""
    if os.path.islink(path) or entry.kind == "link":
        return os.path.islink(path) and os.readlink(path) == entry.link
    if entry.kind == "folder":
        return os.path.isdir(path)
    return (os.path.isfile(path) and os.path.getsize(path) == entry.size
            and os.stat(path).st_mode & 0o777 == entry.mode
            and digest_pieces(pieces) == digest_pieces(load_pieces(path)))


def unpack_package(data, digest, parent, max_unpacked, relaxed=False):
    """Unpacks a verified archive to `parent`/<digest> and returns that folder.

    One that is there already stays if it still is what the archive holds.  It is made beside and renamed, so
    that half of it is never taken for the whole.  Other versions stay for who uses them.
    """
    folder = os.path.join(parent, digest.split(":")[1][:16])
    plain, entries = check_archive(data, max_unpacked, relaxed)
    work = folder + ".tmp"
    if os.path.isdir(folder):
        if all(load_sameness(*found) for found in load_entries(plain, entries, folder)):
            return folder
        log("warning", "an unpacked package is not what its archive holds: made anew", folder=folder)
        remove_folder(folder)
    remove_folder(work)
    create_folder(work)
    content = os.path.join(work, "content")
    for entry, path, pieces in load_entries(plain, entries, content):
        # containers of other users read it (C-161)
        create_folder(path if entry.kind == "folder" else os.path.dirname(path), 0o755)
        if entry.kind == "file":
            write_file(path, pieces, entry.mode, os.path.join(work, "part"))
        elif entry.kind == "link":
            os.symlink(entry.link, path)
    for path, _, _ in os.walk(content):
        sync_folder(path)
    os.rename(content, folder)
    os.rmdir(work)
    sync_folder(parent)
    return folder


# ----------------------------------------------------------------------------------------------------------
# 17. Commands
# ----------------------------------------------------------------------------------------------------------

Output = define("Output", "code stdout stderr errors",
                "How a program ended: exit code, stdout, the end of stderr as printable text, and stderr.",
                b"")

# Which setting needs a program; a missing one is named with it (contract, Shape).
NEEDED_BY = {"openssl": "`csr`, wfm.profile signed, identity.enrollment est and policy.images need it",
             "git": "wfm.profile git needs it",
             "gpg": "the keyLocation of a package, or git.allowed_signers, needs it",
             "podman": "see runtime.engine", "docker": "see runtime.engine", "helm": "see runtime.helm"}


# Where programs of administration lie, which cron's PATH lacks (contract, On the engine), and what is between
# systemd and this process alone.
SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
SYSTEMD_NAMES = ("NOTIFY_SOCKET WATCHDOG_USEC WATCHDOG_PID LISTEN_FDS LISTEN_PID"
                 " LISTEN_FDNAMES").split()


def parse_answer(data, program, read):
    """What `read` makes of the JSON that a program printed; CommandError where that is of another form."""
    try:
        return read(parse_json(data, program, len(data)))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        words = f"{type(error).__name__}: {error}"
        raise CommandError(f"{program} answered in an unknown form ({words})") from None


HURRY = []                          # holds something once no program is waited for, because this one ends


def list_folders(environ):
    """The folders in which helper programs are looked for: those on PATH, then the system's own."""
    folders = (environ.get("PATH") or os.defpath).split(os.pathsep)
    return folders + [folder for folder in SYSTEM_FOLDERS if folder not in folders]


def get_command_environment(environ):
    """The environment of a helper program.

    It has a whole PATH, nothing that systemd tells this process alone, and no TMPDIR that is no folder.
    """
    found = {key: value for key, value in environ.items() if key not in SYSTEMD_NAMES}
    if not os.path.isdir(found.get("TMPDIR", "/")):
        found.pop("TMPDIR", None)
    return dict(found, PATH=os.pathsep.join(list_folders(environ)))


def get_temporary(state_dir, environ):
    """{TMPDIR: the folder for temporary files below the state directory}.

    {} where podman, rootless, would keep its own state there.
    """
    runtime = environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return {"TMPDIR": os.path.join(state_dir, "tmp")} if os.geteuid() == 0 or os.path.isdir(runtime) else {}


def make_limiter(limits):
    """A function that bounds the process which calls it, by {a name of `resource`: the most}."""
    import resource

    def limit():
        for name, most in limits.items():
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            most = most if hard < 0 else min(most, hard)
            resource.setrlimit(kind, (most, most))
    return limit


def run_command(argv, timeout, env=None, cwd=None, limit=MAX_OUTPUT, data=b"", files=(), ends=False,
                watch=None, limits=None):
    """The one door to other programs: Output(exit code, stdout bytes, the end of stderr as printable text).

    argv: list, never a shell.  The program runs in a process group of its own, which is killed whole after
    `timeout` seconds or when it prints more than `limit` bytes; ends: of more, the end of each stream is
    kept instead.  `data` is all that it reads, `files` are descriptors that it gets, too.  watch: a function
    that is called time and again meanwhile.  limits: what it and each that it starts may take; see
    make_limiter.  A non-zero exit code is an answer.  Raises CommandTimeout, CommandError, ConfigError where
    a tool is missing that a setting needs (a missing engine is a CommandError), and Interrupted where ctrl-C
    ended it: that meets also what is just being started, which is no failed attempt.
    """
    import errno
    import signal
    import subprocess
    try:
        process = subprocess.Popen(argv, stdin=subprocess.PIPE if data else subprocess.DEVNULL,
                                   stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE,
                                   env=get_command_environment(os.environ if env is None else env), cwd=cwd,
                                   start_new_session=True, pass_fds=files,
                                   preexec_fn=limits and make_limiter(limits))
    except FileNotFoundError:
        if os.path.isfile(argv[0]):
            raise CommandError(f"{argv[0]} cannot be started: what its first line (#!) names is not there, or"
                               " that line ends as on Windows") from None
        name = os.path.basename(argv[0])
        fault = ConfigError if name in ("openssl", "git", "gpg") else CommandError
        needed = NEEDED_BY.get(name, "or correct the setting that names it")
        raise fault(f"{argv[0]} is not installed, or not on PATH; install it: {needed}") from None
    except OSError as error:
        mend = "is it executable?" if error.errno in (errno.EACCES, errno.ENOEXEC) else make_mend(error)
        raise CommandError(f"{argv[0]} cannot be started ({error.strerror}); {mend}") from None
    try:
        stdout, stderr = serve_pipes(process, memoryview(data), timeout, limit, ends, watch)
    except subprocess.TimeoutExpired:
        raise CommandTimeout(f"{' '.join(argv[:2])} did not end within {timeout:.0f} s") from None
    finally:
        kill_group(process)
    if process.returncode == -signal.SIGINT:
        raise Interrupted(f"{argv[0]} was ended by ctrl-C; the next run goes on from here")
    return Output(process.returncode, stdout,
                  make_printable(stderr[-8192:].decode("utf-8", "replace").strip(), 8192), stderr)


def serve_pipes(process, data, timeout, limit, ends, watch):
    """Writes `data` to stdin and reads until the process has ended: (stdout, stderr).

    A helper may leave something behind that keeps the pipes open, so their end is not waited for once the
    process itself has ended.  Raises subprocess.TimeoutExpired, CommandError.
    """
    import select
    import subprocess
    heard = {pipe.fileno(): bytearray() for pipe in (process.stdout, process.stderr)}
    stdin = [process.stdin.fileno()] if data else []
    deadline = time.monotonic() + timeout
    open_pipes = set(heard)
    for pipe in [*heard, *stdin]:
        os.set_blocking(pipe, False)
    while open_pipes or stdin:
        # asked before looking: what it wrote last is then in the pipes
        ended = process.poll() is not None
        pause = 0 if ended else max(0.0, min(0.2, deadline - time.monotonic()))
        ready, writable, _ = select.select(list(open_pipes), stdin, [], pause)
        if writable:
            try:
                data = data[os.write(stdin[0], data):]
            except BrokenPipeError:
                data = b""                          # it has read as much as it cares for
            if not data:
                stdin = process.stdin.close() or []
        for pipe in ready:
            piece = os.read(pipe, 65536)
            heard[pipe] += piece
            if not piece:
                open_pipes.discard(pipe)
            if ends:
                del heard[pipe][:-limit // 2]
        if sum(map(len, heard.values())) > limit:
            raise CommandError(f"{process.args[0]} printed more than {limit} bytes", "TOO_MUCH")
        if ended and not ready:
            break
        if watch:
            watch()
        if HURRY or time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(process.args, 0)
    process.wait(max(0.0, deadline - time.monotonic()))
    return tuple(map(bytes, heard.values()))        # stdout was the first


def kill_group(process):
    """Ends what still runs of a process group and closes its pipes.

    A process that hangs in the kernel, at a dead disk say, cannot be ended: it is left behind, and whoever
    waited goes on.
    """
    import signal
    import subprocess
    if process.returncode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass                                    # it ended by itself just now
        try:
            process.wait(CORPSE_GRACE)
        except subprocess.TimeoutExpired:
            log("warning", "a program cannot be ended, and is left behind", program=process.args[0],
                pid=process.pid)
    for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
        pipe.close()


# ----------------------------------------------------------------------------------------------------------
# 18. Transport
# ----------------------------------------------------------------------------------------------------------

Response = define("Response", "status headers body", "An HTTP answer: int, email.message.Message, bytes.")


# What TLS 1.2 may use, and with any TLS no short keys and no SHA-1; Python's own words from 3.10 on.
CIPHERS = "@SECLEVEL=2:ECDH+AESGCM:ECDH+CHACHA20:ECDH+AES:DHE+AES:!aNULL:!eNULL:!aDSS:!SHA1:!AESCCM"
Problem = define("Problem", "type title detail retryable retry_after strategy errors",
    "RFC 9457 as Margo uses it; `type` is cut to its last part for Margo's own types (protocol 3.7).",
    "", "", "", None, None, "", ())


def make_tls_context(anchors=(), ca_file=None, min_tls="1.3", direct=False):
    """An SSLContext that trusts the anchors (DER), or those of a PEM file, or without both the system's.

    direct: what is asked by it goes through no proxy.
    Python's default loaders are not used: they would let any web certificate through where a trust bundle
    decides (C-006).
    """
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.direct = direct
    context.hostname_checks_common_name = False     # a name stands in subjectAltName (RFC 9525)
    context.set_ciphers(CIPHERS)
    try:
        context.minimum_version = ssl.TLSVersion.TLSv1_2 if min_tls == "1.2" else ssl.TLSVersion.TLSv1_3
        if anchors:
            context.check_hostname = False          # an SVID is recognised by its SPIFFE ID alone (C-014)
            # X509_V_FLAG_PARTIAL_CHAIN: an anchor need not be self-signed
            context.verify_flags |= 0x80000
            context.load_verify_locations(cadata=make_pem(anchors))     # 3.7 with OpenSSL 3 takes no DER
        elif ca_file:
            context.load_verify_locations(cafile=ca_file)
        else:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        context.trust = ca_file or ("the trust bundle" if anchors else "the system's CA certificates")
    except (OSError, ValueError) as error:
        words = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise Untrusted(
            f"trust anchors {ca_file or 'of the trust bundle'} cannot be used ({words})") from None
    return context


def request(method, url, headers, body, context, timeout, limit, check_peer=None):
    """The one door to HTTP: one request, one connection, one Response, whatever its status.

    No redirect is followed (C-058), environment proxies are used.  `timeout` (seconds) bounds connecting, the
    TLS handshake and each wait for data; `limit` bounds the body; `check_peer` gets the peer's chain (see
    get_chain) before anything is sent (C-013).  Raises Unreachable, Untrusted, Refused (body over the limit),
    or what check_peer raises.
    """
    import http.client
    import urllib.error
    import urllib.request
    where = f"{method} {url}"
    headers = {"User-Agent": f"margo-agent/{__version__}", **headers}
    message = urllib.request.Request(url, data=body, headers=headers, method=method)
    proxy = ""
    try:
        proxy = "" if getattr(context, "direct", False) else ask_proxy(url)
        with make_opener(context, check_peer, proxy).open(message, timeout=timeout) as response:
            found = http.client.HTTPMessage()
            for name, value in response.headers.items():            # folded lines are one (RFC 9112, 5.2)
                found[name] = re.sub(r"\s*[\r\n]\s*", " ", value)
            return Response(response.status, found, read_body(response, limit, timeout, where))
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise make_network_error(where, reason, timeout, context, proxy) from None


class Paced(io.RawIOBase):
    """What a socket reads, with an end to its patience.

    The head has four time-outs to come, and so has each piece of the body with all that stands before it: a
    server may be slow, but it may neither drip nor go on for ever.
    """

    def __init__(self, connection):
        self.connection = connection
        self.timeout = connection.gettimeout()
        self.raw = connection.makefile("rb", 0)
        self.count = 0                              # bytes so far, those of frames and heads too
        self.renew()

    def renew(self):
        """Gives the next piece its time."""
        self.due = time.monotonic() + 4 * self.timeout

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.due - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.connection.settimeout(min(self.timeout, left))
        count = self.raw.readinto(buffer)
        self.count += count or 0
        return count

    def makefile(self, mode):
        """http.client takes this for the socket."""
        return io.BufferedReader(self)

    def close(self):
        self.raw.close()
        super().close()


MUTE = set()                        # addresses that take connections, and do not shake hands


def open_connection(address, timeout, source=None):
    """A socket to the first address of a (host, port) that answers; raises OSError.

    Each next address is tried 250 ms after the one before, so that a dead one holds nobody up (RFC 8305).
    MUTE ones are left out until there is no other.
    """
    import errno
    import select
    import socket
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    places = [item for item in found if item[4] not in MUTE]
    trying, code = {}, errno.ETIMEDOUT
    end = time.monotonic() + timeout
    try:
        while places or trying:
            if places:
                family, kind, protocol, _, place = places.pop(0)
                try:
                    peer = socket.socket(family, kind, protocol)
                except OSError as error:            # a kernel without IPv6
                    code = error.errno
                    continue
                trying[peer] = place
                peer.setblocking(False)
                peer.connect_ex(place)
            pause = 0.25 if places else max(0.0, end - time.monotonic())
            for peer in select.select([], list(trying), [], pause)[1]:
                code = peer.connect_ex(trying.pop(peer))            # asked again, it says how it went
                if code in (0, errno.EISCONN):
                    peer.settimeout(timeout)
                    return peer
                peer.close()
            if time.monotonic() >= end:
                code = errno.ETIMEDOUT
                break
        MUTE.clear()
        raise OSError(code, os.strerror(code))
    finally:
        for peer in trying:
            peer.close()


def make_opener(context, check_peer, proxy):
    """The agent's own opener: it follows no redirect, keeps no cookie, and takes any status as an answer.

    proxy: whether the environment's proxies are asked.
    """
    import http.client
    import socket
    import urllib.request

    class Answer(http.client.HTTPResponse):
        """An answer that is paced; interim ones before it (such as 103) are passed over."""

        def __init__(self, connection, *arguments, **options):
            self.paced = Paced(connection)
            super().__init__(self.paced, *arguments, **options)

        def begin(self):
            super().begin()
            while 102 <= self.status < 200:
                self.headers = None
                super().begin()

    class Connection(http.client.HTTPConnection):
        """A connection whose peer is checked before the first byte of a request."""

        response_class = Answer
        default_port = 443 if context else 80

        def connect(self):
            self._create_connection = open_connection
            place = None
            try:
                super().connect()
                place = self.sock.getpeername()
                # an end that TLS does not tell of is none: the answer was cut
                if context:
                    host = self._tunnel_host or self.host
                    self.sock = context.wrap_socket(self.sock, server_hostname=host,
                                                    suppress_ragged_eofs=False)
                if check_peer:
                    check_peer(get_chain(self.sock, context))
            except (OSError, MargoError) as error:
                if place and isinstance(error, (socket.timeout, TimeoutError)):
                    MUTE.add(place)
                    return self.connect()           # to another one
                self.close()
                raise

    scheme = "https" if context else "http"
    handler = urllib.request.AbstractHTTPHandler()
    setattr(handler, f"{scheme}_open", lambda message: handler.do_open(Connection, message))
    setattr(handler, f"{scheme}_request", handler.do_request_)
    opener = urllib.request.OpenerDirector()
    if proxy:
        opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(handler)
    return opener


def get_chain(connection, context):
    """The peer's certificates (DER), leaf first: as verified, or as presented where nothing is.

    Before Python 3.10 the leaf alone.
    """
    import ssl
    kind = "get_unverified_chain" if context.verify_mode == ssl.CERT_NONE else "get_verified_chain"
    inner = getattr(connection, "_sslobj", None)
    get = getattr(connection, kind, None) or getattr(inner, kind, None) or tuple        # public since 3.13
    chain = [item if isinstance(item, bytes) else item.public_bytes(2) for item in get() or ()]       # 2: DER
    return chain or [connection.getpeercert(binary_form=True)]


def read_body(response, limit, timeout, where):
    """The body of a response.

    Refused over `limit`, also where eight times that is used up by frames; Unreachable when cut short or
    slower than 1 KiB/s over four time-outs.
    """
    if response.headers.get("Transfer-Encoding") and not response.chunked:
        raise Unreachable(f"{where}: its Transfer-Encoding is not chunked, which alone is known here")
    body = io.BytesIO()
    size = 0
    start = time.monotonic()
    while True:
        response.paced.renew()
        piece = response.read1(65536)
        if not piece:
            break
        size += body.write(piece)
        if size > limit or response.paced.count > 8 * limit + MIB:
            raise Refused(f"{where}: the answer is longer than {limit} bytes")
        elapsed = time.monotonic() - start
        if elapsed > 4 * timeout and size < KIB * elapsed:
            raise Unreachable(f"{where}: given up at {size} bytes after {elapsed:.0f} s")
    unframed = response.length is None and not response.chunked
    if unframed and not size and where.startswith("GET") and response.status == 200:
        # http.client takes a broken head for a whole one
        raise Unreachable(f"{where}: the answer broke off in its head")
    if response.length:
        raise Unreachable(f"{where}: the answer was cut short, {response.length} bytes are missing")
    return body.getvalue()


def ask_proxy(url):
    """The proxy that the environment names for a URL, without a login in it; "" where there is none."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass
    parts = urlsplit(url)
    proxy = "" if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme, "")
    return proxy.rpartition("@")[2].rpartition("//")[2].rstrip("/")


# What OpenSSL calls a peer's answer to a handshake, and what that means.
TLS_FAULTS = (
    ("WRONG_VERSION_NUMBER|HTTP_REQUEST|UNKNOWN_PROTOCOL|RECORD|PACKET_LENGTH",
     "the peer does not speak TLS: is this a port for http?"),
    ("PROTOCOL_VERSION|UNSUPPORTED_PROTOCOL",
     "the peer offers no TLS version that is accepted here; ask its operator, or set wfm.min_tls: \"1.2\""),
    ("CERTIFICATE|UNKNOWN_CA", "the peer does not accept this device's certificate ({})"),
    ("", "{}"))


def make_network_error(where, error, timeout, context, proxy):
    """What went wrong on the wire, in words: Untrusted (a verdict of TLS) or Unreachable (everything else).

    error: what Python raised.  proxy: through which one the peer was asked, or "".
    """
    import socket
    import ssl
    text = make_printable(getattr(error, "strerror", None) or str(error) or type(error).__name__)
    way = f"through the proxy {proxy} ($https_proxy): " if proxy else ""
    if isinstance(error, ssl.SSLCertVerificationError):
        words = error.verify_message
        if error.verify_code in (9, 10):            # not yet valid, expired
            words += "; is the clock of this device right?"
        elif error.verify_code in (2, 18, 19, 20, 21):
            words = (f"it leads to nothing in {getattr(context, 'trust', 'what is trusted')} ({words}); does"
                     " somebody else answer there, such as a proxy? `doctor` shows who")
        return Untrusted(f"{where}: {way}the peer's certificate is refused: {words}", stranger=True)
    # for which Python 3.7 with OpenSSL 3 has no class of its own
    torn = re.search("unexpected eof|bad record mac", str(error))
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)) or torn:
        return Unreachable(f"{where}: {way}the connection was cut (unexpected eof), or damaged on its way")
    if "timed out" in text:
        return Unreachable(f"{where}: {way}timed out: no answer within {timeout:g} s (wfm.timeout);"
                           " is the address right, or a firewall between?")
    if isinstance(error, ssl.SSLError):
        reason = error.reason or text
        words = next(words for pattern, words in TLS_FAULTS if re.search(pattern, reason))
        return Untrusted(f"{where}: {way}TLS failed: {words.format(reason.lower().replace('_', ' '))}")
    if text.startswith("Tunnel connection failed"):     # so http.client tells of what a proxy answers
        return Unreachable(f"{where}: {way}{text}; a login for it belongs into $https_proxy")
    hint = {socket.gaierror: "; there is no such name (DNS), or no network",
            ConnectionRefusedError: "; nothing listens there"}.get(type(error), "")
    check = "unset $https_proxy, or set $no_proxy" if proxy else "is the address right?"
    return Unreachable(f"{where}: {way}{text}{hint}{hint and '; ' + check}")


def make_authorization(secret, user=None):
    """The value of an Authorization header for a secret (bytes): Basic with a user's name, else Bearer."""
    return "Bearer " + secret.decode() if user is None else "Basic " + make_base64(user + b":" + secret)


def load_secret(key, path, fault):
    """The bytes in a file that a setting names, without the line's end; raises `fault` of some words."""
    try:
        data = read_file(path, MAX_ANSWER)
    except StorageError as error:
        raise fault(f"{key}: {error.message}") from None
    if data is None:
        raise fault(f"{key} {path}: no such file; put it there, mode 0600")
    return data.rstrip(b"\r\n")


def ask_looseness(key, path):
    """What to say of a secret's file that others can read, "" where they cannot."""
    mode = os.stat(path).st_mode & 0o777 if os.path.isfile(path) else 0
    return f"{key} {path} has mode {mode:04o}; chmod 0600 it" if mode & 0o077 else ""


def parse_problem(body):
    """A Problem, also of the plain `error` object of older servers; None where the body is neither."""
    from collections import defaultdict
    try:
        value = parse_json(body, "problem")
        check_shape(value, dict, "")
    except ValueError:
        return None
    texts = defaultdict(str, {key: make_printable(item) for key, item in value.items()
                              if isinstance(item, str)})
    kind = texts["type"]
    if kind.startswith(PROBLEM_ROOT):
        kind = re.split("[#/]", kind)[-1]           # the URI is a name, never fetched (C-055)
    wait = value.get("retryAfterSeconds")
    wait = float(wait) if is_number(wait) and 0 <= wait < 1e20 else None
    errors = value.get("errors")
    errors = [make_printable(f"{item.get('field')}: {item.get('message')}")
              for item in (errors if isinstance(errors, list) else ()) if isinstance(item, dict)]
    title = texts["title"] or texts["error"] or texts["Error"]
    detail = texts["detail"] or texts["message"]
    return Problem(kind, title, detail, value.get("retryable"), wait, texts["backoffStrategy"], errors)


def find_verdict(status):
    """The kind of fault that an HTTP status means."""
    if status in (401, 403):
        return Untrusted
    return Unreachable if status in (408, 429) or status >= 500 else Refused


def check_response(response, where, now, denial="it is not for this device: ask whoever runs that server",
                   accepted=(200,)):
    """Returns the response if its status is one of `accepted`, else raises what it means (protocol 10).

    denial: what that means, in words.  The problem's type decides where it is one of Margo's (C-053), the
    status where it is not (C-054).  What says of itself whether it can be retried is believed (C-057).  The
    code of Refused is the type, or `HTTP <status>`.
    """
    if response.status in accepted:
        return response
    problem = parse_problem(response.body) or Problem()
    known = problem.type in REFUSALS
    denied = problem.type in DENIALS
    verdict = find_verdict(response.status)
    name = "" if known or denied or problem.type == "about:blank" else problem.type
    words = "; ".join(filter(None, [name, problem.title, problem.detail, *problem.errors[:5]]))
    message = f"{where}: HTTP {response.status}" + (f" ({words})" if words else "")
    wait = parse_retry_after(response.headers.get("Retry-After"), now)
    facts = {"status": response.status, "strategy": problem.strategy,
             "retry_after": limit_wait(problem.retry_after, now) if wait is None else wait}
    if facts["retry_after"]:
        message += f"; it wants to be left alone until {make_time(now + facts['retry_after'])}"
    if denied or verdict is Untrusted and not known:
        raise Untrusted(f"{message}; {denial}", **facts)
    retryable = problem.retryable
    if not isinstance(retryable, bool):
        retryable = verdict is Unreachable and problem.strategy != "none"
    if retryable:
        if response.status >= 500:
            message += "; that is the server's own trouble, see its operator"
        raise Unreachable(message, **facts)
    if response.status in (301, 302, 303, 307, 308):
        message += ("; redirects are not followed: set wfm.url, or the setting this address came from,"
                    " to the final one")
    if response.status == 404 and not known:
        message += "; nothing is served there: is the address right?"
    raise Refused(message, problem.type if known else f"HTTP {response.status}", **facts)


# ----------------------------------------------------------------------------------------------------------
# 19. Store
# ----------------------------------------------------------------------------------------------------------

class Log:
    """One line an event on stderr.

    Like stderr itself there is one for the process; `main` sets its level and form.
    """

    LEVELS = ("debug", "info", "warning", "error")
    level, form = "info", "text"
    callback = None                                 # set by whoever embeds the agent

    def __call__(self, level, message, **fields):
        """Writes one event; `fields` are facts for machines and never hold a secret or a parameter's value.

        """
        if self.LEVELS.index(level) < self.LEVELS.index(self.level):
            return
        if self.callback:
            self.callback(level, message, fields)
            return
        if self.form == "json":
            import json
            line = json.dumps(dict(fields, time=make_time(time.time()), level=level, message=message),
                              sort_keys=True, separators=(",", ":"))
        else:
            facts = "".join(f" {key}={make_fact(str(value))}" for key, value in fields.items())
            line = f"{make_time(time.time())} {level:7} {make_printable(message, 4000)}{facts}"
        self.write(line)

    def write(self, line):
        """Writes a line to stderr, as far as somebody takes it."""
        try:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            # nobody listens any more; that is no reason to leave workloads alone
            pass


def make_fact(text):
    """A value in a line of the log, in quotes where it needs them (logfmt)."""
    text = make_printable(text, MAX_MESSAGE)
    if text and not re.search(r'[\s"=]', text):
        return text
    return make_quoted(text)


log = Log()


def log_wait(words):
    """Says why nothing is asked now, to a person at a terminal: a log would have it at each poll."""
    log("info" if sys.stderr.isatty() else "debug", words)


def write_file(path, data, mode=0o600, temporary=None):
    """The one door for writing: the file holds its old bytes or all new ones, whatever happens (D-34).

    data: bytes, or pieces of them one by one.  Temporary file (by default beside it), fsync, rename, fsync of
    the folder.  Raises StorageError.
    """
    folder = os.path.dirname(path)
    temporary = temporary or path + ".tmp"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, mode)
        try:
            os.fchmod(descriptor, mode)
            for piece in [data] if isinstance(data, bytes) else data:
                view = memoryview(piece)
                while view:
                    view = view[os.write(descriptor, view):]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        sync_folder(folder)
    except OSError as error:
        remove_file(temporary)                      # on a full disk half a file is what keeps it full
        mend = make_mend(error)
        if not os.path.exists(folder):
            mend = f"the folder {folder} does not exist, make it: mkdir -p {folder}"
        raise StorageError(f"{path} cannot be written ({error.strerror}); {mend}") from None


def remove_file(path):
    """Removes a file, as far as that goes; whether it went."""
    try:
        os.remove(path)
    except OSError:
        return False
    return True


def get_uptime():
    """(id of this boot, seconds since it): a clock that nobody sets and every process shares."""
    boot = read_file("/proc/sys/kernel/random/boot_id", KIB) or b""
    return boot.decode().strip(), time.clock_gettime(time.CLOCK_BOOTTIME)


def get_clock():
    """The Clock now."""
    return Clock(time.time(), *get_uptime())


def sync_folder(folder):
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path, limit):
    """The bytes of a file, None where there is none.

    Raises StorageError, also where it is longer than `limit`.
    """
    try:
        # asked for is what there is: memory for the limit may not be there
        with open(path, "rb") as file:
            size = min(limit, max(os.fstat(file.fileno()).st_size, 64 * KIB))
            data = file.read(size + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}); {make_mend(error)}") from None
    if len(data) > size:
        raise StorageError(f"{path} is longer than {size} bytes")
    return data


def load_pieces(path):
    """The bytes of a file piece by piece; may raise OSError."""
    with open(path, "rb") as file:
        yield from read_pieces(file, 0, os.fstat(file.fileno()).st_size)


def create_folder(path, mode=0o700):
    """Makes a folder, and those above it that are missing, each with just this mode, whatever the umask.

    Raises StorageError.
    """
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    if parent:
        create_folder(parent, mode)
    try:
        os.mkdir(path, mode)
        os.chmod(path, mode)
    except OSError as error:
        if not (isinstance(error, FileExistsError) and os.path.isdir(path)):    # another was faster
            raise to_fault(error) from None


def empty_folder(path):
    """Removes what lies in a folder of ours; what cannot be removed stays, and the log says so.

    Where somebody has put a link in its place, what that leads to is not ours.
    """
    try:
        for name in () if os.path.islink(path) else os.listdir(path):
            remove_folder(os.path.join(path, name))
    except OSError as error:
        log("warning", "temporary files cannot be removed", path=path, reason=str(error))


def get_space(folder, most=FREE_SPACE):
    """(bytes that are free on a disk, how many of them are to stay so): at most `most`, and one part of a
    small disk.
    """
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize, min(most, disk.f_blocks * disk.f_frsize // SHARE)


def remove_folder(path):
    """Removes a folder of ours and all below it, or what lies in its place, for good; links are removed,
    never followed.

    It first gets a name that nobody uses: what was removed by half is never taken for the whole.
    """
    import shutil
    gone = path if path.endswith(".tmp") else path + ".tmp"
    for name in (gone, path):                       # what an earlier attempt left, then this one
        if os.path.lexists(name):
            if name != gone:
                os.replace(name, gone)
                sync_folder(os.path.dirname(path))
            solid = os.path.isdir(gone) and not os.path.islink(gone)
            (shutil.rmtree if solid else os.remove)(gone)
            sync_folder(os.path.dirname(path))


def make_state():
    """The state of an agent that knows nothing yet.

    enrollment  {id, devices: {device id: digest of the capabilities that were sent}} since the first exchange
    client      {id, key: digest of the public key}: what onboarding gave (profile signed)
    accepted    {version, etag, digest, acceptedAt, deployments: [{deploymentId, digest}]}: the last verified
                desired state
    deployments {id in lower case: record}: what this device does, or did, about each one (see make_record)
    outbox      {id in lower case: body}: the newest status of each deployment that the WFM has not yet
                acknowledged, oldest first
    dropped     {id in lower case: {state, at, reason}}: the last statuses that the WFM refused for good
    reported    {id in lower case: digest of the last acknowledged status}
    trust       {source, sequence, refreshedAt, trustDomain}: of trust-bundle.json; {est, crls}: what
                discovery named; {quiet}: until when the identity service wants not to be asked;
                {strays}: digest of an own leaf that does not lead to it any more
    identity    digests of the own leaf that was last found to lead to a trust bundle, and of that
    est         what is under way, and the back-off: see Enrollment
    crls        {URL: {digest, number, key, thisUpdate, validity, etag, modified; back-off}}: of the lists of
                revocations in crls/
    drafts      the drafts in use, as the log was told
    patience    {failures, at, delay, boot, uptime}: no request before `delay` seconds have passed
    waits       {id in lower case, or `capabilities` and a device id: back-off}: of reports that the WFM has
                not taken, see make_hold
    waiting     digest of a manifest that removes more than policy.max_removals and is not confirmed yet
    owners      [text]: what this agent has called itself on the engine, newest last (see make_owner)
    pulled      [image, after a child device's id and a space where it is there]: what it pulled and may prune
    history     the last accepted desired states, newest last: {version, at, added, changed, removed, outcome;
                refused: what came after it}
    lastPoll    {at, result, detail} of the last cycle that had something to store
    """
    parts = {name: None if isinstance(form, tuple) else type(form)() for name, form in STATE.items()}
    return dict(parts, schema=2)


# The forms of its parts, see check_shape.
VERSION = (float, "[0-9a-f]{40,64}")                 # a commit's hash, with profile git
WAIT = {"failures+": float, "at+": float, "delay+": float, "boot+": str, "uptime+": float, "since?": float}
PACKAGE = {"reference": str, "digest": DIGEST_PATTERN}
SERVICES = {"*": {"finished": bool, "hash": str, "image": str, "id?": str, "started+": float,
                  "ports+": [[str, (float, str), str]], "volumes+": {"*": str}}}
FAULT = {"code": str, "source": str, "message": str}
PART = {"name": str, "state": str, "error?": FAULT}
RUNNING = {"digest": str, "packages": {"*": PACKAGE}, "images": [str], "type+": str, "mark+": str,
           "services+": {"*": SERVICES}}
RECORD = {
    "deploymentId": UUID_PATTERN, "name": str, "deviceId": str, "type": str, "state": "|".join(STATES),
    "error": (None, FAULT),
    "adopted": {"digest": str, "version": VERSION}, "running": (None, RUNNING), "previous": (None, RUNNING),
    "refused": bool, "fallback": bool, "found": bool, "fetched": [str], "retry": WAIT, "repair": WAIT,
    "components": [dict(PART, services=SERVICES, **{"error": (None, FAULT), "package": (None, PACKAGE)})]}
ACCEPTED = {"version": VERSION, "etag": (None, str), "digest": str, "acceptedAt": str,
            "deployments": [{"deploymentId": UUID_PATTERN, "digest": DIGEST_PATTERN}]}
POLL = {"at": str, "result": str, "detail": str}
STATE = {
    "enrollment": (None, {"id": str, "devices+": {"*": (None, str)}}),
    "client": (None, {"id": str, "key": str}), "accepted": (None, ACCEPTED), "deployments": {"*": RECORD},
    "outbox": {"*": {"deploymentId": r"[\w-]{1,99}", "deviceId": str, "adoptedManifestVersion": VERSION,
                     "status": {"state": str, "error?": FAULT}, "components": [PART]}},
    "dropped": {"*": {"state": str, "at": str, "reason": str}}, "reported": {"*": (None, str)},
    "trust": {"source?": str, "quiet+": float, "sequence?": float, "refreshedAt?": float, "trustDomain?": str,
              "strays+": str, "est?": str, "crls?": [str]},
    "identity": (None, str), "est": {}, "crls": {}, "drafts": [str], "patience": WAIT, "waits": {"*": WAIT},
    "waiting": (None, str), "owners": [str], "pulled": [str],
    "history": [{"version": VERSION, "at": str, "outcome": str, "refused+": str, "added": [str],
                 "changed": [str], "removed": [str], "names+": {"*": str}}],
    "lastPoll": (None, POLL)}
MEMO = {"lastPoll?": POLL, "etags+": {"*": (None, str)}, "warnedAt+": float,
        "others?": [{"owner": str, "name": str, "type": str, "deploymentId": str}], "trust?": float,
        "boot?": str, "start+": float, "mute+": [([str, float], [str, float, float, float])]}


def make_accepted(desired, at=""):
    """What the state keeps of a Desired; at: when it was accepted."""
    deployments = [{"deploymentId": entry.deployment_id, "digest": entry.digest} for entry in desired.entries]
    return {"version": desired.version, "etag": desired.etag, "digest": desired.digest, "acceptedAt": at,
            "deployments": deployments}


def make_history(state, desired, at):
    """The history with one more accepted desired state: what it adds, changes and removes against the one
    before.
    """
    before = (state["accepted"] or {}).get("deployments", ())
    old = {item["deploymentId"].lower(): item["digest"] for item in before}
    new = {entry.key: entry.digest for entry in desired.entries}
    changed = sorted(key for key in new if key in old and new[key] != old[key])
    names = {key: record["name"] for key, record in state["deployments"].items() if key not in new}
    return state["history"][1 - HISTORY:] + [{
        "version": desired.version, "at": at, "added": sorted(set(new) - set(old)),
        "removed": sorted(set(old) - set(new)), "changed": changed, "outcome": "pending",
        "names": names}]


def note_outcome(state, fault):
    """Notes in the history how the newest accepted desired state stands, and the Refused that came after it.

    fault: the worst of the cycle, or None.
    """
    if not state["history"] or not state["accepted"]:
        return
    newest = state["history"][-1]
    newest["outcome"] = make_outcome(state)
    if isinstance(fault, Refused):
        newest["refused"] = fault.message
    elif not fault:
        newest.pop("refused", None)


def make_outcome(state):
    """How the newest accepted desired state stands: applied, pending, or which deployments failed and why."""
    records = state["deployments"].values()
    failed = [f"{record['deploymentId']} failed ({record['error']['code']})" for record in records
              if record["state"] == "failed"]
    installed = [record for record in records if record["state"] == "installed"]
    done = len(installed) == len(records) == len(state["accepted"]["deployments"])
    return "; ".join(failed) or ("applied" if done else "pending")


def make_state_data(state):
    """The bytes of state.json: JSON that ends with the digest of the rest.

    The outbox is a list there, because its order counts.
    """
    data = make_json(dict(state, outbox=list(state["outbox"].values())))
    return b'%s%s%s"}' % (memoryview(data)[:-1], SUM, sha256_digest(data).encode())


SUM = b',"sum":"'                   # what stands before the digest
MAX_WORDS = 2 * MIB                 # characters that are kept of the messages of all faults together
OLD_FIELDS = "left failures retryAt repairs repairedAt".split()            # of records of schema 1


def parse_state(data, path):
    """The state in the bytes of state.json.

    Raises ValueError for what is damaged or foreign, StorageError for a newer agent's.

    One without a digest was written by an older agent, or by hand.
    """
    end = data.rfind(SUM)
    if end >= 0 and data[end + len(SUM):] != digest_pieces([memoryview(data)[:end], b"}"]).encode() + b'"}':
        raise ValueError(f"{path} is damaged: its bytes do not have the digest at its end")
    state = parse_json(data, path, len(data))
    blank = make_state()
    if not isinstance(state, dict) or type(state.get("schema")) is not int or state["schema"] < 1:
        raise ValueError(f"{path} is not a state of this agent")
    if state["schema"] > blank["schema"]:
        raise StorageError(f"{path} has schema {state['schema']}, this agent knows {blank['schema']}; use the"
                           " newer agent")
    state = dict(blank, **dict(state, schema=blank["schema"]))
    state.pop("sum", None)
    outbox = state["outbox"].values() if isinstance(state["outbox"], dict) else state["outbox"]
    try:
        state["outbox"] = {status["deploymentId"].lower(): status for status in outbox}
        records = [migrate_record(record) for record in state["deployments"].values()]
        state["deployments"] = {record["deploymentId"].lower(): record for record in records}
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} is not a state of this agent (outbox or deployments)") from None
    check_shape(state, STATE, path)
    for key, record in state["deployments"].items():
        needed = ["error"] * (record["refused"] or record["state"] == "failed")
        needed += ["running"] * (record["state"] == "installed")
        check_shape(record, dict.fromkeys(needed, dict), f"{path}.deployments.{key}")
    return state


def migrate_record(record):
    """A deployment's record as schema 2 has it; that of schema 1 knew moments where that has waits, which are
    over then (see make_wait).
    """
    record = dict({"refused": False, "found": False, "fetched": []}, **record)
    if "repairs" in record:
        record = {key: value for key, value in record.items() if key not in OLD_FIELDS}
        record.update(retry={}, repair={})
    if "services" not in (record.get("running") or ()):
        record["fallback"] = False                  # no version before is known that could run
    return record


def shorten_errors(state):
    """Cuts what is told of faults where many deployments have some, so that the state stays small."""
    holders = list(state["deployments"].values())
    for item in [*holders, *state["outbox"].values()]:
        holders += [item.get("status", {}), *item.get("components", ())]
    errors = [holder["error"] for holder in holders if holder.get("error")]
    most = max(100, MAX_WORDS // max(1, len(errors)))
    for error in errors:
        error["message"] = error["message"][:most]


def make_core(state):
    """What must never become older, as bytes: whose device this is, what it accepted, whom it trusts,
    which token went with which key.
    """
    return make_json([state[name] for name in ("enrollment", "client", "accepted", "trust", "est", "crls")])


def get_random():
    """A number in [0, 1) for jitter."""
    import random
    return random.random()


def ask_holder(path):
    """Who holds the lock of a file, in words, as far as the kernel tells: process and since when."""
    facts = os.stat(path)
    place = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
    for line in (read_file("/proc/locks", MIB) or b"").decode().splitlines():
        match = re.search(rf"FLOCK +\S+ +WRITE (\d+) {place} ", line)
        holder = f"/proc/{match.group(1)}" if match else ""
        if os.path.exists(holder):
            return f" (process {match.group(1)}, since {make_time(os.stat(holder).st_mtime)})"
    return ""


FOLDERS_KEPT = ("artifacts", "deployments", "tmp")


class Store:
    """The state directory: state.json, artifacts by digest, one folder a deployment, the lock, the trust
    bundle.
    """

    def __init__(self, folder):
        self.folder = folder
        # bytes of state.json as they lie on the disk, and of what its copy is kept for
        self.saved = self.core = None
        self.locked = None
        self.memo = None                            # what load_memo has read, and save_memo will write
        self.noted = b""                            # the bytes of that as they lie there

    def path(self, *names):
        """A path below the state directory."""
        return os.path.join(self.folder, *names)

    def create(self):
        """Makes the directory (mode 0700) and its folders; raises StorageError."""
        try:
            create_folder(os.path.dirname(self.folder), 0o755)
            for name in FOLDERS_KEPT:
                create_folder(self.path(name))
            if os.stat(self.folder).st_mode & 0o077:
                os.chmod(self.folder, 0o700)
            reserve = get_space(self.folder, RESERVE)[1]
        except FAULTS as error:
            raise StorageError(f"state_dir {self.folder} cannot be made: {to_fault(error)}, or name a folder"
                               " that this user may write, on a disk that keeps data") from None
        try:
            if not os.path.exists(self.path("reserve")):
                write_file(self.path("reserve"), bytes(reserve))
        except StorageError as error:
            log("warning", "no space can be kept in reserve", reason=error.message)

    def lock(self):
        """Takes the lock or raises Locked; the kernel gives it back when this process ends, however it ends.

        """
        import fcntl
        try:
            self.locked = os.open(self.path("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.fchmod(self.locked, 0o600)
            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.memo = None
        except BlockingIOError:
            self.unlock()
            path = self.path("lock")
            raise Locked(f"another instance{ask_holder(path)} holds {path}; wait until it is done, or stop"
                         " it. Never run a second one beside it with the same identity: both would fight"
                         " over the same containers") from None
        except OSError as error:
            words = f"{self.path('lock')} cannot be taken ({error.strerror}); {make_mend(error)}"
            raise StorageError(words) from None

    def unlock(self):
        """Gives the lock back."""
        if self.locked is not None:
            os.close(self.locked)
            self.locked = None

    def load_state(self):
        """The state; a fresh one only where there is none.

        Raises StorageError for one that is not ours to read.

        An unreadable state is never started afresh: that would forget the accepted version and open the
        door to a rollback.  Its copy may be older, but never in what was accepted (see save_state); what
        it does not know of workloads the engine tells (P-13).
        """
        fault = None
        path = self.path("state.json")
        for name in (path, path + ".old"):
            try:
                data = read_file(name, 256 * MIB)
            except StorageError as error:           # the disk does not give it
                fault = fault or error
                continue
            if data is None:
                continue
            try:
                state = parse_state(data, name)
            except ValueError as error:
                fault = fault or error.with_traceback(None)     # that holds all that was read
                data = None
                continue
            self.saved = data if name == path else None
            self.core = make_core(state)
            if self.saved is None:
                log("error", "the state is taken from its copy", reason=str(fault or f"{path} is missing"))
            return state
        if isinstance(fault, StorageError):
            raise fault
        if fault:
            raise StorageError(f"{fault}; restore it, or move it and its copy {path}.old away to start afresh"
                               " (the WFM's next manifest is then accepted whatever its version)")
        return make_state()

    def save_state(self, state):
        """Writes the state if it differs from what lies on the disk: a poll that finds nothing new writes
        nothing (P-16).

        First its copy, where that would otherwise be older in what no damage may bring back.  A full disk
        is given the reserve (P-4).
        """
        shorten_errors(state)
        data = make_state_data(state)
        core = make_core(state)
        if data == self.saved:
            return
        for path in [self.path("state.json.old")] * (core != self.core) + [self.path("state.json")]:
            try:
                write_file(path, data)
            except StorageError:
                if not remove_file(self.path("reserve")):
                    raise
                write_file(path, data)
        self.saved, self.core = data, core

    def find_time(self):
        """The last time that is known to have been: Unix seconds of the last write of the state, 0 where
        there is none.
        """
        try:
            return os.stat(self.path("state.json")).st_mtime
        except OSError:
            return 0

    def load_artifact(self, digest):
        """Verified content by digest, None where there is none; what the disk has spoilt counts as none."""
        try:
            data = read_file(self.path("artifacts", digest.replace(":", "-")), 1024 * MIB)
        except StorageError as error:
            log("warning", "it is fetched again", reason=error.message)
            return None
        return data if data is not None and sha256_digest(data) == digest else None

    def save_artifact(self, digest, data):
        """Keeps verified content under its digest."""
        write_file(self.path("artifacts", digest.replace(":", "-")), data)

    def prune_artifacts(self, digests):
        """Removes every artifact, and every unpacked package, whose digest is not among `digests`."""
        keep = {digest.replace(":", "-") for digest in digests}
        for name in os.listdir(self.path("artifacts")):
            if name not in keep and re.match("sha256-[0-9a-f]{64}", name):
                os.remove(self.path("artifacts", name))
        short = {digest[7:23] for digest in digests}
        form = re.compile(r"[0-9a-f]{16}(\.content)?|content-[0-9a-f]{32}(\.new)?")
        top = self.path("deployments")
        for folder, folders, files in os.walk(top):
            # of a component; what is below is the applications'
            inside = os.path.dirname(os.path.dirname(folder)) == top
            needed = self.load_needed(folder, files, short) if inside else ()
            for name in folders + files:
                if name.endswith(".tmp") or inside and form.fullmatch(name) and name not in needed:
                    remove_folder(os.path.join(folder, name))
            folders[:] = [] if inside else [name for name in folders if not name.endswith(".tmp")]

    def load_needed(self, folder, files, short):
        """The names in a component's folder that stay: these packages, the notes of what their containers
        mount, and that itself (see Folder.keep).
        """
        notes = [name for name in files if name[:16] in short and name[16:] == ".content"]
        texts = [read_file(os.path.join(folder, name), MIB) or b"" for name in notes]
        return short.union(notes, b" ".join(texts).decode("utf-8", "replace").split())

    def memo_path(self):
        """Where the last contact with the WFM is kept: in memory, so that an unchanged poll writes
        nothing to the disk.
        """
        folder = os.environ.get("RUNTIME_DIRECTORY", "/run/margo-agent").split(":")[0]
        return os.path.join(folder, sha256_digest(os.path.abspath(self.folder).encode())[7:23] + ".json")

    def load_memo(self):
        """What was noted in memory last, or {}: a dictionary to be changed, see save_memo.

        It is read once, and anew where the lock is taken.
        """
        if self.memo is None:
            try:
                self.noted = read_file(self.memo_path(), MAX_ANSWER) or b"{}"
                self.memo = parse_json(self.noted, self.memo_path())
                check_shape(self.memo, MEMO, "")
            except (StorageError, ValueError):
                self.memo = {}                      # it is a note, not a state
        return self.memo

    def save_memo(self):
        """Notes what was changed of it; whether that could be written."""
        data = make_json(self.load_memo())
        if data == self.noted:
            return True
        path = self.memo_path()
        try:
            create_folder(os.path.dirname(path), 0o755)
            write_file(path, data)
        except StorageError as error:
            log("debug", "the last contact cannot be noted", path=path, reason=str(error))
            return False
        self.noted = data
        return True


ENGINE_SOCKETS = "docker.sock podman.sock containerd.sock crio.sock".split()


class Folder:
    """An unpacked package, and the one way by which its compose file is looked up on the disk."""

    def __init__(self, path, environ=None):
        self.path, self.environ, self.digests = path, environ, {}

    def resolve(self, name):
        """A path, relative to the package, with all links followed.

        Raises ComponentError where one of them may not be read, such as /proc/1/root.
        """
        try:
            return os.path.realpath(os.path.join(self.path, name))
        except OSError as error:
            words = f"{make_printable(name, 200)} cannot be looked up ({error.strerror})"
            raise ComponentError("POLICY_DENIED", f"compose.yaml: {words}") from None

    def read(self, name):
        """The bytes of a file of the package of at most 1 MiB; None where it is none."""
        path = self.resolve(name)
        try:
            inside = path.startswith(self.resolve("") + "/")
            return read_file(path, MIB) if inside and os.path.isfile(path) else None
        except StorageError:
            return None

    def look(self, name):
        """The Source that a path is.

        What is the package's own is mounted by its content, from a place that stays; see keep.
        """
        real = self.resolve(name)
        root = self.resolve("")
        own = real == root or real.startswith(root + "/")
        if os.path.isdir(real):
            kind = "folder"
        elif os.path.isfile(real):
            kind = "file"
        else:
            kind = "other" if os.path.exists(real) else ""
        path = real
        if own and kind:
            if real not in self.digests:            # a file may name it a thousand times
                self.digests[real] = load_digest(real)
            path = os.path.join(os.path.dirname(root), f"content-{self.digests[real][:32]}",
                                os.path.basename(real))
        return Source(path, real, kind, own, not own and self.leads_to_engine(real))

    def leads_to_engine(self, path):
        """Whether a path is an engine's socket, by whatever name, or a folder with one in it, as far as
        10,000 entries tell."""
        import stat
        environ = os.environ if self.environ is None else self.environ
        places = [environ.get(name, "").partition("unix://")[2] for name in ("CONTAINER_HOST", "DOCKER_HOST")]
        places += ["/run/podman/podman.sock", "/run/docker.sock", "/run/containerd/containerd.sock",
                   "/run/crio/crio.sock",
                   os.path.join(environ.get("XDG_RUNTIME_DIR") or "/run", "podman/podman.sock")]
        places = [os.path.realpath(place) for place in places if os.path.exists(place)]
        inside = [place for place in places if place.startswith(path.rstrip("/") + "/")]
        if inside or os.path.basename(path) in ENGINE_SOCKETS:
            return True
        if os.path.exists(path) and not os.path.isdir(path):
            return stat.S_ISSOCK(os.stat(path).st_mode)
        inodes = {os.stat(place).st_ino for place in places}
        left = 10000
        todo = [path]
        while todo and left > 0:
            try:
                entries = list(os.scandir(todo.pop()))[:left]
            except OSError:
                continue                            # what cannot be read, or is not there
            left -= len(entries)
            # files and folders of another disk may have the number of a socket
            if any(entry.name in ENGINE_SOCKETS
                   or entry.inode() in inodes and not (entry.is_file() or entry.is_dir())
                   for entry in entries):
                return True
            todo += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        return False

    def keep(self, sources):
        """Lays what these own Sources are where they are mounted from, and notes that this package needs it,
        beside what it has needed with other parameters: what runs may be of these.  See prune_artifacts.

        A service whose files did not change keeps its container, whatever else is in the next package.
        """
        import shutil
        needed = set()
        for source in {source.path: source for source in sources}.values():
            place = os.path.dirname(source.path)
            needed.add(os.path.basename(place))
            if os.path.lexists(source.path) and load_digest(source.path)[:32] == place[-32:]:
                continue
            for folder in (place, place + ".new"):      # what was spoilt, and what was cut off
                remove_folder(folder)
            create_folder(place + ".new", 0o755)        # containers read it
            part = os.path.join(place + ".new", os.path.basename(source.path))
            if source.kind == "folder":
                shutil.copytree(source.real, part, symlinks=True, copy_function=link_file)
            else:
                link_file(source.real, part)
            for folder, _, _ in os.walk(place + ".new"):
                sync_folder(folder)
            os.rename(place + ".new", place)
        if needed:
            sync_folder(os.path.dirname(self.path))
            note = self.path + ".content"
            needed.update((read_file(note, MIB) or b"").decode("utf-8", "replace").split())
            write_file(note, "\n".join(sorted(needed)).encode())


def link_file(source, target):
    """One more name of a file, or a copy where the disk has no such thing."""
    import shutil
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def load_digest(path):
    """A digest in hex of a file or a folder with all that is in it: names, its own too, modes, contents,
    links as they are."""
    found = []
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(folders + files):
            found.append((os.path.relpath(os.path.join(folder, name), path),
                          load_part(os.path.join(folder, name))))
    found.append((os.path.basename(path), load_part(path)))
    return sha256_digest(repr(found).encode("utf-8", "surrogateescape"))[7:]


def load_part(path):
    """What load_digest takes of one file, folder or link."""
    if os.path.islink(path):
        return os.readlink(path)
    content = "" if os.path.isdir(path) else digest_pieces(load_pieces(path))
    return f"{os.stat(path).st_mode:o} {content}"


# ----------------------------------------------------------------------------------------------------------
# 20. Patience
# ----------------------------------------------------------------------------------------------------------

def grow(first, times, cap):
    """Exponential back-off: `first` (seconds) after the first of so many failures in a row, doubled by each
    further one, at most `cap`.
    """
    return min(cap, first * 2 ** min(max(times - 1, 0), 30))


def make_wait(record, delay, clock):
    """The record of one more failure in a row, before whose end nothing is tried again: {failures, at, delay,
    boot, uptime}.

    record: the one of the failures before, or {}.  delay: seconds from now.  clock: a Clock.
    """
    return {"failures": record.get("failures", 0) + 1, "at": clock.now, "delay": delay,
            "boot": clock.boot, "uptime": clock.uptime}


def find_wait(record, clock):
    """Seconds still to wait by a record of make_wait, or by {}.

    They are counted by the clock that nobody sets where this is the same boot, else by the wall clock: where
    that has jumped, no wait gets longer than it was (P-2).
    """
    same = bool(clock.boot) and record.get("boot") == clock.boot
    passed = clock.uptime - record.get("uptime", 0) if same else clock.now - record.get("at", 0)
    delay = record.get("delay", 0)
    return delay - passed if 0 <= passed < delay else 0


def make_retry(record, asked, clock, jitter):
    """The record of one more failure of a deployment; asked: seconds that somebody wants to be left alone."""
    delay = grow(RETRY_FIRST, record.get("failures", 0) + 1, RETRY_CAP) * (0.75 + 0.5 * jitter)
    return make_wait(record, max(delay, min(asked or 0, 2 * RETRY_CAP)), clock)


def make_due(record, clock):
    """When a deployment that has failed is tried again, in words."""
    left = find_wait(record["retry"], clock)
    due = f"at {make_time(clock.now + left)}" if left else "is with the next run"
    return f"next attempt {due}, `retry {record['name']}` tries at once"


def count_repair(record, clock):
    """The record as a repair of what was installed begins: some are free, then the pauses after them grow
    (P-7).
    """
    last = record["repair"]
    recent = 0 <= clock.now - last.get("at", 0) < last.get("delay", 0) + RETRY_CAP
    repairs = last.get("failures", 0) if recent else 0
    pause = grow(RETRY_FIRST, repairs + 2 - REPAIRS, RETRY_CAP) if repairs + 1 >= REPAIRS else 0
    return dict(record, repair=make_wait({"failures": repairs}, pause, clock))


def make_patience(record, error, clock, jitter):
    """The record of one more fault at the WFM: how long it is left alone."""
    if isinstance(error, Unreachable):
        return make_hold(record, error, clock, jitter)
    return make_wait(record, error.retry_after or 0, clock)


def make_hold(record, error, clock, jitter):
    """The record of one more report that was not taken; since: when the WFM first answered one by a fault."""
    delay = make_backoff(record.get("failures", 0) + 1, error.retry_after, error.strategy, jitter)
    return dict(make_wait(record, delay, clock), since=record.get("since") or error.status and clock.now)


def make_backoff(failures, asked, strategy, jitter):
    """Seconds to leave a WFM alone after some failures in a row: exponential with full jitter, starting at
    what it asked for and never less (C-056); exactly that where it says `fixed` or `none` (C-057).
    """
    asked = asked or 0
    if asked and strategy in ("fixed", "none"):
        return asked
    return asked + jitter * max(0, grow(asked or 2 * BACKOFF_FIRST, failures, BACKOFF_CAP) - asked)


def make_start(uptime, poll, known, jitter):
    """The uptime before which a device that has just started leaves its WFM alone.

    A fleet that regains power arrives spread over one interval (P-19), and a minute at most, because a device
    may be switched on for less than its interval (F-27).  One that never had a desired state asks at once.
    """
    spread = jitter * min(poll.interval, START_SPREAD)
    return uptime + spread if known and poll.jitter else 0


def load_start(store, poll, known, clock, jitter):
    """Seconds until the first contact since this boot; 0 where they cannot be noted: each run would wait.

    known: whether there is a desired state.
    """
    if not clock.boot or clock.uptime >= START_WINDOW:
        return 0
    memo = store.load_memo()
    if memo.get("boot") != clock.boot:
        memo.update(boot=clock.boot, start=make_start(clock.uptime, poll, known, jitter))
        if not store.save_memo():
            return 0
    return max(0, memo.get("start", 0) - clock.uptime)


def find_silence(patience, downtime, starting, clock):
    """The Silence for which nobody is asked now, or None.

    patience: a record of make_wait.  downtime: whether it is the operator's.  starting: seconds until the
    first contact since the device started.
    """
    if downtime:
        return Silence("downtime: no request is made", exit=0)
    left = find_wait(patience, clock)
    why = "the WFM or a back-off asks" if left else "a fleet that has just started does not arrive at once"
    left = left or starting
    words = f"waiting until {make_time(clock.now + left)}: {why}"
    return Silence(words, retry_after=left) if left else None


def make_spread(device_id, spread):
    """Seconds that a run of this device waits of the `spread` over which a fleet's runs begin.

    They are the same at each run, so that what cron starts at an interval speaks at that interval (P-19).
    """
    return int(sha256_digest(device_id.encode())[7:15], 16) / 2 ** 32 * spread


def list_waits(state, clock, *failed):
    """[{until, reason}] of what is held back: requests to the WFM, reports that it has not taken, and
    attempts at what has `failed`, as far as its records are given.
    """
    found = {"the WFM or a back-off asks to wait": state["patience"]}
    found.update((f"{record['deploymentId']} has failed and is not tried again", record["retry"])
                 for record in failed if not record["refused"])
    found.update((f"{key} is not reported again", record) for key, record in state["waits"].items())
    left = {reason: find_wait(record, clock) for reason, record in found.items()}
    return [{"until": make_time(clock.now + seconds), "reason": reason}
            for reason, seconds in left.items() if seconds]


def make_delay(config, state, fault, clock, jitter):
    """Seconds until a daemon's next cycle: the interval with its jitter, later after refusals, earlier where
    an attempt is due.
    """
    interval = config.poll.interval * (1 + config.poll.jitter * (2 * jitter - 1))
    patience = state["patience"]
    if isinstance(fault, (Refused, Untrusted)) and patience:
        slower = grow(interval, patience.get("failures", 1) + 1, BACKOFF_CAP)
        return max(interval, patience.get("delay", 0), slower)
    left = fault.retry_after if isinstance(fault, Silence) else patience.get("delay")
    if left:
        return max(1.0, min(interval, left))        # workloads are watched while the WFM is waited for
    attempts = [find_wait(record["retry"], clock) for record in state["deployments"].values()
                if record["state"] == "failed" and not record["refused"]]
    attempts += [max(CYCLE_RETRY, find_wait(record, clock)) for record in state["waits"].values()]
    return max(1.0, min([interval] + attempts))


def limit_wait(seconds, now):
    """What somebody asks to wait, None or seconds from `now` (Unix seconds): a day at most.

    A number as large as the clock's is a moment (Unix seconds, or parts of them), not a duration.
    """
    if seconds is None:
        return None
    while 1e12 <= seconds < 1e20:
        seconds /= 1000
    if seconds >= 1e9:
        seconds -= now
    return max(0.0, min(seconds, MAX_WAIT))


def parse_retry_after(text, now):
    """`Retry-After` in either form to seconds from `now` (Unix seconds), None where there is none or it is
    unreadable (C-056).
    """
    text = (text or "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        return limit_wait(float(text), now)
    moment = parse_date(text)
    return None if moment is None else limit_wait(max(0.0, moment - now), now)


def covers(windows, local):
    """Whether one of the windows holds a device-local minute (struct_time)."""
    now = 60 * local.tm_hour + local.tm_min
    stamp = time.strftime(MINUTE, local)
    for days, start, end in windows:
        if days is None:
            inside = start <= stamp < end
        elif start < end:
            inside = local.tm_wday in days and start <= now < end
        else:
            inside = local.tm_wday in days and now >= start or (local.tm_wday - 1) % 7 in days and now < end
        if inside:
            return True
    return False


def is_within(windows, local):
    """Whether a device-local moment (struct_time) lies in one of the windows.

    What a clock that is put forward leaves out of a window is made up for right after that (F-25).
    """
    if covers(windows, local):
        return True
    now = int(time.mktime(local))
    before = time.localtime(now - MAX_SHIFT).tm_gmtoff
    if before >= local.tm_gmtoff:
        return False
    change = now - now % 60
    while time.localtime(change - 60).tm_gmtoff == local.tm_gmtoff:
        change -= 60
    skipped = [time.gmtime(change + second) for second in range(before, local.tm_gmtoff, 60)]
    return sum(covers(windows, minute) for minute in skipped) > (now - change) // 60


def is_within_whole(windows, start, end):
    """Whether all the time between two moments (Unix seconds, by the minute) lies in windows."""
    moments = range(int(start), int(max(start, end)) + 1, 60)
    return all(is_within(windows, time.localtime(moment)) for moment in moments)


def make_clock_fault(now, stored):
    """What is wrong with a clock that stands before the last write of the state, in words."""
    return (f"the clock of this device says {make_time(now)}, and its state was written at"
            f" {make_time(stored)}: set the clock")


# ----------------------------------------------------------------------------------------------------------
# 21. Configuration
# ----------------------------------------------------------------------------------------------------------

def parse_duration(text):
    """`90`, `30s`, `5m`, `2h`, `1d` to seconds (float); raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]+)?)([smhd]?)", text)
    units = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
    seconds = float(match.group(1)) * units[match.group(2)] if match else -1
    if not 0 <= seconds <= MAX_DURATION:
        raise ValueError("a duration: seconds, or a number with s, m, h or d, such as 30s, and at most 3650d")
    return seconds


def parse_size(text):
    """`512`, `512Ki`, `64Mi`, `2Gi` ... to bytes; a space before the unit is read too (protocol 3.5).

    Raises ValueError.
    """
    match = re.fullmatch(r"([0-9]{1,40})(?: ?([KMGTPE]i))?", text)
    if not match:
        raise ValueError("a size: bytes, or a number with Ki, Mi, Gi, Ti, Pi or Ei, such as 64Mi")
    return int(match.group(1)) << (10 * (1 + "KMGTPE".index(match.group(2)[0])) if match.group(2) else 0)


class Settings(dict):
    """A part of the configuration: a dictionary whose keys are attributes too."""

    def __init__(self, *parts, **values):
        super().__init__(*parts, **values)
        self.__dict__ = self


# The kit of readers. A reader takes (value, base) and returns what it makes of the value, or raises
# ValueError of what is expected. The value is YAML; `base` is the folder that relative file names start from.

def scalar(expected, pattern="", make=str, words=()):
    """A reader of text of one form, or of one of some words; a plain number keeps its spelling.

    make: what is made of the text.  It may raise ValueError.
    """
    def read(value, base):
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError(expected)
        text = scalar_text(value)
        if pattern and not re.fullmatch(pattern, text) or words and text not in words:
            raise ValueError(expected)
        return make(text)
    return read


def choice(*words):
    """A reader of one of some words."""
    return scalar("one of " + ", ".join(words), words=words)


def checked(expected, test):
    """A reader that takes a value as it is, if a test holds for it."""
    def read(value, base):
        if not test(value):
            raise ValueError(expected)
        return value
    return read


def list_of(read_item, expected, least=0):
    """A reader of a list of what another reader takes, at least so many; `expected` is said where it is none.

    """
    def read(value, base):
        if not isinstance(value, list) or len(value) < least:
            raise ValueError(expected)
        return [read_item(item, base) for item in value]
    return read


def is_number(value):
    """Whether a value is a number that JSON can write; a boolean is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def get_kind(value):
    """`text`, `boolean` or `number`, None for everything else; a boolean is no number."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, str):
        return "text"
    return "number" if is_number(value) else None


def is_mapping(value):
    """Whether a value is a mapping whose keys are text."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def is_uri(key):
    """Whether identity.key is a URI and not a file name."""
    return bool(re.match(r"[a-z][a-z0-9+.-]+:", key))


HOST_PATTERN = rf"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)({PORT_PATTERN})?"
PINS = "a list of base64 SHA-256 digests of public keys, 44 characters each"

read_text = scalar("text")
read_name = checked("text", lambda value: isinstance(value, str) and value)
# what fits between quotes in an HTTP header
read_word = scalar("printable ASCII without \" and \\", r'[ !#-\[\]-~]*')
# without user or fragment
read_url = scalar("an absolute https URL", rf"(?!.*[#@])https://{HOST_PATTERN}([/?][!-~]*)?")
read_root_url = scalar("an absolute https URL without query", rf"(?!.*[#@?])https://{HOST_PATTERN}(/[!-~]*)?",
                       lambda text: text.rstrip("/"))
FOLDERS = "a list of absolute paths, such as [/srv/data]"
FILES = "a list of files below /dev, such as [/dev/ttyUSB0]"
read_folders = list_of(scalar(FOLDERS, r"(?s)/.*"), FOLDERS)
read_devices = list_of(scalar(FILES, r"/dev/[\w./:+@*-]+"), FILES)
read_pins = list_of(scalar(PINS, r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]="), PINS)
read_pause = scalar("a duration", make=parse_duration)
read_duration = scalar(
    "a duration greater than zero: seconds, or a number with s, m, h or d, such as 30s, and at most 3650d",
    r".*[1-9].*", parse_duration)
read_size = scalar("a size", make=parse_size)
read_count = scalar("a whole number", "[0-9]{1,18}", int)
read_share = scalar("a share from 0% to 100%", r"([0-9]{1,2}|100)%", lambda text: int(text[:-1]) / 100)
# C-086
read_device_id = scalar("letters, digits and . _ ~ - in segments parted by /",
                        rf"(?!(.*/)?\.\.?(/|\Z)){DEVICE_ID_PATTERN}")
read_mapping = checked("a mapping", is_mapping)


def read_flag(value, base):
    """true or false; `${NAME}` gives it as text."""
    if not isinstance(value, bool) and value not in ("true", "false"):
        raise ValueError("true or false")
    return value in (True, "true")


def read_path(value, base):
    """A file name, relative to the configuration file."""
    return os.path.join(base, scalar("a file name", r"(?s)[^\0]+")(value, base))


def read_key(value, base):
    """A file name, or a URI such as pkcs11:… by which openssl finds a key.

    It stands on a command line, so it holds no PIN.
    """
    text = read_text(value, base)
    if "pin-value=" in text:
        raise ValueError(
            "a URI without pin-value; name a file by pin-source, so that no command line shows the PIN"
        )
    return text if is_uri(text) else read_path(text, base)


def read_path_or_url(value, base):
    """A file name or an https URL."""
    return read_url(value, base) if "://" in str(value) else read_path(value, base)


def equipment_of(words):
    """A reader of a list of {type: one of some words, all else: text}."""
    kinds = words.split()
    words = f"a list with the types {words}"
    return list_of(checked(words, lambda item: is_mapping(item) and item.get("type") in kinds
                           and {"text"}.issuperset(map(get_kind, item.values()))), words)


def is_cpu(item):
    """Whether a value is {cores: number, architecture: text}."""
    return (isinstance(item, dict) and is_number(item.get("cores")) and item["cores"] > 0
            and item.get("architecture", "arm") in ("amd64", "arm64", "arm"))


# Margo's own properties, each with what a WFM may expect of it (protocol 3.5, C-083, C-091).
CPUS = "a list of {cores: number, architecture: amd64, arm64 or arm}"
PROPERTIES = {
    "vendor": read_name, "modelNumber": read_name, "serialNumber": read_name,
    "memory": scalar("a size such as 512Mi", "[0-9]{1,18}[KMG]i"),
    "storage": scalar("a size such as 512Mi", "[0-9]{1,18}[KMGTPE]i"),
    "cpus": list_of(checked(CPUS, is_cpu), CPUS, 1),
    "peripherals": equipment_of("gpu display camera microphone speaker"),
    "interfaces": equipment_of("ethernet wifi cellular bluetooth usb canbus rs232"),
    "otelCollector": checked("true, as Margo demands it where workloads run", lambda item: item is True),
    "supportedRuntimes": list_of(choice("oci", "custom"), "a list of oci, custom", 1),
    "supportedDeploymentTypes": list_of(choice("helm", "compose", "custom"),
                                        "a list of helm, compose, custom", 1),
}


def read_properties(value, base):
    """Capability properties; a name that begins with x- is an extension, and holds a mapping (C-090)."""
    for name, item in read_mapping(value, base).items():
        if name.startswith("x-") and not (re.fullmatch(EXTENSION_PATTERN, name) and isinstance(item, dict)):
            raise ValueError("a mapping in which x-NAME-extensions holds a mapping")
        try:
            if name in PROPERTIES:
                PROPERTIES[name](item, base)
        except ValueError as error:
            raise ValueError(f"a mapping in which {name} is {error}") from None
    try:
        make_json(value)
    except (TypeError, ValueError):
        raise ValueError("a mapping that JSON has words for") from None
    return value


def read_environment(value, base):
    """A mapping of environment variables to text."""
    for name, item in read_mapping(value, base).items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or get_kind(item) not in ("text", "number"):
            raise ValueError(f"a mapping of variable names to text, which {make_printable(name)} is not")
    return {name: read_text(item, base) for name, item in value.items()}


def is_label(value):
    """Whether a value is text, number or boolean, or a list of texts or of numbers (C-087)."""
    if isinstance(value, list):
        return set(map(get_kind, value)) in (set(), {"text"}, {"number"})
    return get_kind(value) is not None


read_labels = checked("a mapping of labels to text, number, boolean, or a list of texts or of numbers",
                      lambda value: is_mapping(value) and all(map(is_label, value.values())))


DAYS = "Mon Tue Wed Thu Fri Sat Sun".split()
MINUTE = "%Y-%m-%dT%H:%M"


def is_moment(text):
    """Whether a text such as 2026-12-24T00:00 is a minute that the calendar has."""
    try:
        return time.strftime(MINUTE, time.strptime(text, MINUTE)) == text
    except ValueError:
        return False


def parse_window(text):
    """A window of device-local time to (days, start, end); raises ValueError.

    `[Mon-Fri ]06:00-22:00`: (set of weekdays, minutes, minutes), over midnight where the end is not later
    than the start. `2026-12-24T00:00/2026-12-27T00:00`: (None, text, text), which compare as text.
    """
    start, slash, end = text.partition("/")
    if is_moment(start) and is_moment(end) and start < end:
        return None, start, end
    day = "(" + "|".join(DAYS) + ")"
    clock = "([0-9]{2}):([0-5][0-9])"
    match = re.fullmatch(f"(?:{day}(?:-{day})? )?{clock}-{clock}", text)
    if match:
        first, last, *numbers = match.groups()
        begin = DAYS.index(first or "Mon")
        length = (DAYS.index(last or first or "Sun") - begin) % 7
        hour, minute, end_hour, end_minute = map(int, numbers)
        start = 60 * hour + minute
        end = 60 * end_hour + end_minute
        if start < 1440 and end <= 1440:
            return {(begin + step) % 7 for step in range(length + 1)}, start, end
    raise ValueError('a window such as "Mon-Fri 06:00-22:00" or "2026-12-24T00:00/2026-12-27T00:00"')


read_windows = list_of(scalar("a window", make=parse_window), "a list of windows")


# What leads a command to an engine or a cluster elsewhere, and which command that is; a child device is
# reached by one of them.
CONNECTIONS = {"CONTAINER_HOST": "podman", "CONTAINER_CONNECTION": "podman",
               "CONTAINERS_STORAGE_CONF": "podman",
               "DOCKER_HOST": "docker", "DOCKER_CONTEXT": "docker", "KUBECONFIG": "helm"}
# what a child device has to say of itself, because only what is here can be detected
HOSTING = ("cpus", "memory", "storage")

# Each setting: (its reader, its default as the file would spell it, what it is for).
DEVICE_SCHEMA = {
    "id": (read_device_id, None, "name of the device at the WFM; without it serial number or machine id"),
    "vendor": (read_text, None, "who made the device; without it what the firmware says"),
    "modelNumber": (read_text, None, "which model it is; without it what the firmware says"),
    "serialNumber": (read_text, None, "its serial number; without it what the firmware says"),
    "properties": (read_properties, {}, "capabilities to report in place of those that were detected"),
    "labels": (read_labels, {}, "what applications can select this device by, beside its properties"),
}
CHILD_SCHEMA = dict(DEVICE_SCHEMA, connection=(read_environment, {}, "variables that lead to its engine"))
REGISTRY_SCHEMA = {
    "mirror": (scalar("a host, with or without a port", rf"(https?://)?{REGISTRY_PATTERN}/?"), None,
               "host:port that is asked in place of this registry"),
    "username": (read_text, None, "who signs in there"),
    "password_file": (read_path, None, "file of the password, mode 0600"),
    "ca": (read_path, None, "CA certificates of this registry; without it the system's"),
    "insecure": (read_flag, False, "true: HTTP without TLS is good enough"),
}
SCHEMA = {
    "state_dir": (read_path, "/var/lib/margo-agent", "folder of all that the agent keeps"),
    "wfm": {
        "profile": (lambda value, base: choice(*PROFILES)(value, base), "mtls",
                    "generation of Margo's protocol that the WFM speaks"),
        "url": (read_root_url, None, "root URL of the WFM"),
        "timeout": (read_duration, "30s", "limit of connecting, and of each wait for data"),
        "min_tls": (choice("1.2", "1.3"), "1.3", "oldest TLS version that is accepted"),
    },
    "identity": {
        "certificate": (read_path, None, "the device's SVID in PEM, the leaf first, then intermediates"),
        "key": (read_key, None, "its private key, mode 0600, or a URI such as pkcs11:..."),
        "trust_bundle": (read_path_or_url, None, "SPIFFE bundle or PEM file to trust the WFM by, or its URL"),
        "discovery": (read_url, None, "https URL of a discovery document, in place of trust_bundle"),
        "ca": (read_path, None, "CA certificates for discovery, bundle URLs, and servers without SPIFFE ID"),
        "pins": (read_pins, [], "digests of public keys by which those servers are known, too"),
        "refresh": (read_duration, "1h", "time between looks at a bundle that names none"),
    },
    "device": dict(DEVICE_SCHEMA,
                   children=(checked("a list", lambda value: isinstance(value, list)), [],
                             "devices behind this gateway, see README"),
                   hostname=(read_flag, False, "whether the host's name is told, a draft"),
                   parameter_values=(read_labels, {}, "values for parameters with `valueFrom`, a draft")),
    "poll": {
        "interval": (read_duration, "60s", "time between polls of `run`"),
        "jitter": (read_share, "10%", "by how much each interval may differ, so that fleets spread out"),
        "window": (read_windows, [], "the WFM is asked only then; empty: always"),
        "downtime": (read_windows, [], "no request is made then"),
    },
    "runtime": {
        "compose": (choice("auto", "builtin", "off"), "auto", "whether compose components are run"),
        "engine": (choice("auto", "podman", "docker"), "auto", "which engine runs containers"),
        "on_failure": (choice("rollback", "keep"), "rollback", "what follows on an update that fails"),
        "settle": (read_pause, "10s", "time without a restart that counts as health where nothing checks it"),
        "environment": (read_environment, {}, "variables that every container is given"),
        "prune": (read_flag, True, "whether images and packages that nothing needs any more are removed"),
    },
    "registries": (read_mapping, {}, "credentials, mirror and trust of registries, by host or host:port"),
    "policy": {
        "max_document": (read_size, "8Mi", "largest manifest or deployment document"),
        "max_artifact": (read_size, "64Mi", "largest package or bundle"),
        "max_unpacked": (read_size, "256Mi", "most that a package or a repository may unpack to"),
        "privileged": (choice("deny", "allow"), "deny", "whether applications may rule the device"),
        "host_network": (choice("deny", "allow"), "deny", "whether applications may use the host's network"),
        "devices": (read_devices, [], "device files that applications may use all the same"),
        "host_paths": (read_folders, [], "folders of the host that applications may mount"),
        "max_removals": (read_count, None, "more removals than this wait for a second poll; unset: no limit"),
    },
    "log": {"level": (choice("debug", "info", "warning", "error"), "info", "least level that is logged")},
}


# The configuration as a whole

def make_quote(value, secret=False):
    """What a fault shows of a value: no PIN, no login in a URL, and of a mapping, or of what holds secrets,
    only its kind.
    """
    if secret or isinstance(value, dict):
        return {dict: "a mapping", list: "a list"}.get(type(value), "text")
    return repr(make_printable(re.sub(r"(?<=pin-value=)[^;&?]*|(?<=//)[^/@\s]*(?=@)", "...", str(value)), 60))


def make_hint(word, known, where=""):
    """Which of the known words an unknown one may mean."""
    import difflib
    near = difflib.get_close_matches(word, list(known), 1)
    return f"did you mean {where}{near[0]}?" if near else f"known are {', '.join(known)}"


def make_settings(value, schema, base, where, faults):
    """Reads one mapping of the configuration by its schema.

    Each fault is appended to `faults` as (key, words).
    """
    if value is not None and not isinstance(value, dict):
        faults.append((where[:-1] or "the configuration", f"found {make_quote(value)}, expected a mapping"))
        value = None
    value = value or {}
    for key in value:
        if key not in schema:
            faults.append((f"{where}{key}", f"unknown key; {make_hint(str(key), schema, where)}"))
    settings = Settings()
    for key, entry in schema.items():
        item = value.get(key)
        if isinstance(entry, dict):
            settings[key] = make_settings(item, entry, base, f"{where}{key}.", faults)
            continue
        reader, default, _ = entry
        item = default if item is None else item
        settings[key] = None
        try:
            if item is not None:
                settings[key] = reader(item, base)
        except ValueError as error:
            faults.append((where + key,
                           f"found {make_quote(item, reader is read_environment)}, expected {error}"))
    return settings


def make_children(items, base, faults):
    """The child devices of a see-thru gateway as a list of Settings; faults as make_settings tells them."""
    children = []
    for index, item in enumerate(items or ()):
        where = f"device.children[{index}]."
        child = make_settings(item, CHILD_SCHEMA, base, where, faults)
        named = {key for key, _ in faults}
        needed = [key for key in CHILD_SCHEMA if child[key] is None]
        needed += [f"properties.{key}" for key in HOSTING if key not in (child.properties or {})]
        faults += [(where + key, "not set, and nothing else knows it") for key in needed if where
                   + key.split(".")[0] not in named]
        if child.connection is not None and not set(child.connection) & set(CONNECTIONS):
            faults.append((f"{where}connection",
                           f"names no engine; expected one of {', '.join(CONNECTIONS)}"))
        for key in ("id", "connection"):
            if child[key] and child[key] in [other[key] for other in children]:
                faults.append((where + key, "another child has the same"))
        children.append(child)
    return children


def make_config(document, base, environ):
    """The configuration as Settings from its YAML value, the folder of its file and the environment.

    Raises ConfigError that names every fault: the key, what was found, what is allowed.
    """
    faults = []
    document = expand_environment(document, environ, "", faults)
    unset = {key for key, _ in faults}
    found = []
    config = make_settings(document, SCHEMA, base, "", found)
    faults += [(key, words) for key, words in found if key not in unset]    # else it is empty for that
    registries = {}
    for host, entry in (config["registries"] or {}).items():
        registries[host] = make_settings(entry, REGISTRY_SCHEMA, base, f"registries.{host}.", faults)
        if not re.fullmatch(REGISTRY_PATTERN, host):
            faults.append((f"registries.{host}",
                           "no registry; expected its host or host:port, as oci://HOST names it"))
    config["registries"] = registries
    config.device["children"] = make_children(config.device.children, base, faults)
    named = {key for key, _ in faults}
    for check in CHECKS:
        faults += [(key, words) for wrong, key, words in check(config) if wrong and key not in named]
    if faults:
        raise ConfigError("; ".join(f"{key}: {words}" for key, words in faults))
    return config


def check_devices(config):
    """What shows only from several settings of this device and its children: [(whether it is wrong, key,
    words)].
    """
    profile = PROFILES.get(config.wfm.profile)
    children = config.device.children
    faults = [(children and profile and not profile.takes_children(config),
               "device.children", "the protocol of this wfm.profile and wfm.dialect knows no child devices")]
    places = {f"device.children[{index}].": child for index, child in enumerate(children)}
    for where, device in {"device.": config.device, **places}.items():
        properties = device.properties or {}
        kinds = [*properties.get("supportedRuntimes", ()), *properties.get("supportedDeploymentTypes", ())]
        # C-089
        faults.append(("custom" in kinds and not device.labels,
                       f"{where}labels",
                       "not set, and needed beside `custom`, for applications to select on"))
    return faults


def check_profile(config):
    """What its profile has to say of a configuration: [(whether it is wrong, key, words)]."""
    profile = PROFILES.get(config.wfm.profile)
    return profile.check_settings(config) if profile else []


CHECKS = [check_devices, check_profile]             # optional rooms add themselves


def expand_environment(value, environ, where, faults):
    """`${NAME}` in every text of the configuration; an unset name is a fault."""
    if isinstance(value, dict):
        return {key: expand_environment(item, environ, f"{where}{key}.", faults)
                for key, item in value.items()}
    if isinstance(value, list):
        return [expand_environment(item, environ, where, faults) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def expand(match):
        if match.group(1) not in environ:
            faults.append((where[:-1], f"the environment variable {match.group(1)!r} is not set; set it where"
                           " the agent is started, in its service or cron line"))
        return environ.get(match.group(1), "")

    return re.sub(r"\$\{([^}]*)\}", expand, value)


def load_document(path):
    """What the configuration file (YAML or JSON) says, as it stands; raises ConfigError."""
    try:
        with open(path, "rb") as file:
            return load_yaml(file.read())
    except OSError as error:
        hint = "name another by -c or $MARGO_CONFIG; `config --example` prints one to start from"
        hint = "run as root, or as who may read it" if isinstance(error, PermissionError) else hint
        raise ConfigError(f"configuration {path} cannot be read ({error.strerror}); {hint}") from None
    except YAMLError as error:
        raise ConfigError(f"configuration {path}: {error}") from None


def load_config(path, environ=None):
    """Reads the configuration file (YAML or JSON) to Settings; raises ConfigError."""
    document = load_document(path)
    try:
        return make_config(document, os.path.dirname(os.path.abspath(path)),
                           os.environ if environ is None else environ)
    except ConfigError as error:
        raise ConfigError(f"configuration {path}: {error.message}") from None


def check_shape(value, shape, where):
    """Raises ValueError unless a value out of a document has a shape; what does not is named by its place.

    shape: a pattern of text, `str`, `bool`, `dict`, `list`, `float` for a number that is not negative,
    `None`, (shape, shape) for any of these, [shape] for a list of such, [shape, shape] for one of two, or
    {member: shape}.  `?` after a member's name says that it may be missing or null, `+` that it may be
    missing; the name `*` stands for all.
    """
    flaw = find_flaw(value, shape)
    if flaw:
        place, found, expected = flaw
        place = (where + place).lstrip(".") or "the document"
        raise ValueError(f"{place}: found {make_printable(str(found), 80)!r}, expected {expected}")


EXPECTED = {dict: "a mapping", list: "a list", float: "a number", bool: "true or false", str: "text",
            type(None): "null"}


def find_flaw(value, shape):
    """(place, what is there, what is expected there) of the first thing that a shape forbids, or None."""
    if isinstance(shape, tuple):
        flaws = [find_flaw(value, inner) for inner in shape]
        return None if None in flaws else flaws[-1]
    kind = shape if isinstance(shape, type) else type(shape)
    fits = isinstance(value, kind)
    if kind is float:
        fits = is_number(value) and 0 <= value < MAX_NUMBER
    elif isinstance(shape, str):
        fits = fits and re.fullmatch(shape, value, re.ASCII)
    elif isinstance(shape, list) and fits:
        fits = len(shape) in (1, len(value))
    if not fits:
        expected = f"text of the form {shape}" if isinstance(shape, str) else EXPECTED[kind]
        return "", value, expected
    for key, item, inner in list_members(value, shape):
        if inner is type(item) is not float:
            continue                                # most are just text: a state has thousands of these
        flaw = find_flaw(item, inner)
        if flaw:
            place = f"[{key}]" if isinstance(value, list) else f".{make_printable(key, 80)}"
            return place + flaw[0], flaw[1], flaw[2]
    return None


def list_members(value, shape):
    """[(place, item, its shape)] of all that a shape of a list or of a mapping asks for."""
    if isinstance(shape, list):
        return zip(range(len(value)), value, shape * len(value))
    found = []
    for name, inner in shape.items() if isinstance(shape, dict) else ():
        key = name.rstrip("?+")
        if name == "*":
            found += [(key, item, inner) for key, item in value.items()]
        elif key not in value:                      # what may be null has to be there all the same
            inner = inner[-1] if isinstance(inner, tuple) else inner
            found += [(key, None, inner)] * (key == name)
        elif value[key] is not None or name[-1] != "?":
            found.append((key, value[key], inner))
    return found


# ----------------------------------------------------------------------------------------------------------
# 22. X.509
# ----------------------------------------------------------------------------------------------------------

# DER: only what a certificate or a revocation list needs.  Bounds are checked at each step, and nothing is
# used before the whole was read.

OID_BASIC_CONSTRAINTS, OID_KEY_USAGE, OID_SUBJECT_ALT_NAME = b"\x55\x1d\x13", b"\x55\x1d\x0f", b"\x55\x1d\x11"
OID_SUBJECT_KEY, OID_ISSUER_KEY = b"\x55\x1d\x0e", b"\x55\x1d\x23"
KEY_CERT_SIGN, CRL_SIGN = 5, 6                      # bits of keyUsage (RFC 5280, 4.2.1.3)
MAX_ELEMENTS = 1000                 # beside each other; only the entries of a revocation list are more


def walk_der(data):
    """Each element in DER bytes as (tag, value bytes, whole element bytes); raises ValueError."""
    position = 0
    while position < len(data):
        start = position
        tag = data[position]
        position += 2
        if tag & 0x1F == 0x1F or position > len(data):
            raise ValueError("DER: a long tag or a missing length")
        length = data[position - 1]
        if length & 0x80:
            size = length & 0x7F
            if not 1 <= size <= 4:
                raise ValueError("DER: a bad length")
            length = int.from_bytes(data[position:position + size], "big")
            position += size
        value = data[position:position + length]
        position += length
        if position > len(data):
            raise ValueError("DER: a value runs past its end")
        yield tag, value, data[start:position]


def parse_der(data):
    """The elements in DER bytes, as walk_der gives them, in a list; raises ValueError."""
    from itertools import islice
    elements = list(islice(walk_der(data), MAX_ELEMENTS + 1))
    if len(elements) > MAX_ELEMENTS:
        raise ValueError(f"DER: more than {MAX_ELEMENTS} elements beside each other")
    return elements


def make_der(tag, *parts):
    """One DER element around its parts."""
    body = b"".join(parts)
    size = len(body).to_bytes(4, "big").lstrip(b"\0") or b"\0"
    if len(body) > 127:
        size = bytes([0x80 | len(size)]) + size
    return bytes([tag]) + size + body


def parse_signed(der):
    """The fields of a certificate or revocation list (DER), without its signature.

    Raises ValueError, IndexError.
    """
    (_, content, _), = parse_der(der)
    return parse_der(parse_der(content)[0][1])


def parse_certificate(der):
    """A DER certificate to a Certificate; raises ValueError (RFC 5280, only the fields in use)."""
    try:
        fields = parse_signed(der)
        if fields[0][0] == 0xA0:                    # [0] version
            fields = fields[1:]
        serial, _, issuer, validity, subject, spki = fields[:6]
        not_before, not_after = (parse_der_time(*element[:2]) for element in parse_der(validity[1]))
        extensions = parse_extensions(fields[6:], 0xA3)
        names = parse_der(open_extension(extensions, OID_SUBJECT_ALT_NAME) or b"")
        constraints = parse_der(open_extension(extensions, OID_BASIC_CONSTRAINTS) or b"")
        uris = [name.decode("ascii") for tag, name, _ in names if tag in (0x86, 0xA6)]     # A6: of parts
        is_ca = any(tag == 0x01 and flag != b"\0" for tag, flag, _ in constraints)
        usage = open_extension(extensions, OID_KEY_USAGE)
        if usage is not None:
            usage = {bit for bit in range(8 * (len(usage) - 1)) if usage[1 + bit // 8] & (0x80 >> bit % 8)}
        return Certificate(
            der, subject[2], issuer[2], int.from_bytes(serial[1], "big", signed=True),
            not_before, not_after, spki[2], uris, is_ca, usage, open_extension(extensions, OID_SUBJECT_KEY),
            find_issuer_key(extensions), extensions.get(OID_SUBJECT_ALT_NAME, (0, 0, b""))[2])
    except (IndexError, ValueError) as error:
        raise ValueError(f"not a readable X.509 certificate ({error})") from None


def parse_extensions(fields, wanted):
    """The extensions of a certificate or revocation list, {OID: (critical, value, raw)}.

    They are in the field with the tag `wanted`.  Raises ValueError, IndexError.
    """
    found = {}
    data = next((value for tag, value, _ in fields if tag == wanted), b"\x30\0")
    for _, extension, raw in parse_der(parse_der(data)[0][1]):
        (_, oid, _), *flags, (_, value, _) = parse_der(extension)
        if oid in found:
            raise ValueError("an extension occurs twice")
        found[oid] = (any(flag != b"\0" for _, flag, _ in flags), value, raw)
    return found


def open_extension(extensions, oid):
    """What the one element in an extension's value holds, None where there is no such extension.

    Raises ValueError.
    """
    if oid not in extensions:
        return None
    (_, value, _), = parse_der(extensions[oid][1])
    return value


def find_issuer_key(extensions):
    """The identifier of the key that signed a certificate or revocation list, or None."""
    parts = parse_der(open_extension(extensions, OID_ISSUER_KEY) or b"")
    return next((value for tag, value, _ in parts if tag == 0x80), None)


def is_issued(item, name, key):
    """Whether a Certificate or Crl is issued by whoever has this name and key identifier.

    The identifiers count where both say one.
    """
    return item.issuer == name and (None in (key, item.issuer_key) or key == item.issuer_key)


def parse_der_time(tag, value):
    """UTCTime or GeneralizedTime to Unix seconds; raises ValueError."""
    import datetime                                 # http.client brings it along; strptime takes 8 ms more
    text = value.decode("ascii")
    if tag == 0x17:
        text = ("19" if text[:2] >= "50" else "20") + text
    match = re.fullmatch("([0-9]{4})" + 5 * "([0-9]{2})" + "Z", text)
    if not match:
        raise ValueError("a time in an unknown form")
    return int(datetime.datetime(*map(int, match.groups()), tzinfo=datetime.timezone.utc).timestamp())


def make_name(data):
    """The texts in a distinguished name (DER), in its order."""
    parts = [parse_der(value)[0][1] for _, value, _ in parse_der(parse_der(data)[0][1])]
    return "/".join(make_printable(parse_der(part)[1][1].decode("utf-8", "replace")) for part in parts)


def parse_pem(data, label="CERTIFICATE"):
    """Every certificate (or block of another label) in the bytes of a PEM file as DER bytes, in order.

    A block begins with a line, or right behind the last line of the one before.  Raises ValueError.
    """
    found = []
    begin = f"(?m)(?:^[ \t]*|(?<=^-----END {label}-----))-----BEGIN {label}-----"
    for block in re.split(begin, data.decode("ascii", "replace"))[1:]:
        body, end, _ = block.partition(f"-----END {label}-----")
        if not end or not body.strip():
            raise ValueError("a certificate in PEM is empty or not closed")
        found.append(parse_base64(body))
    return found


def make_pem(ders):
    """Certificates (DER) as PEM text."""
    bodies = ("\n".join(re.findall(".{1,64}", make_base64(der))) for der in ders)
    return "".join(f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n" for body in bodies)


# ----------------------------------------------------------------------------------------------------------
# 23. YAML
# ----------------------------------------------------------------------------------------------------------

# YAML 1.2, one document, core schema. Parse functions go from coarse to fine; the position moves from token
# to token. Block functions leave it at the first character of the next line that holds something, whose
# column is `column` (-1 at the end and at a marker).

MAX_DEPTH = 64                      # levels of collections
AFTER = " \t\n", " \t\n,[]{}"       # what stands behind an indicator, and what in a flow collection

INT_PATTERN = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
FLOAT_PATTERN = (
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
CONSTANTS = {"": None, "~": None, "null": None, "Null": None, "NULL": None, "true": True, "True": True,
             "TRUE": True,
             "false": False, "False": False, "FALSE": False}
# what stands behind a backslash, and what each of these means
ESCAPES = dict(zip('0abt\tnvfre "/\\N_LP', '\0\a\b\t\t\n\v\f\r\x1b "/\\\x85\xa0\u2028\u2029'))


class YAMLError(ValueError):
    """A document that is no YAML 1.2 of one document, or that load_yaml refuses.

    `line` and `column` count from 1.
    """

    def __init__(self, message, line, column):
        super().__init__(f"line {line}, column {column}: {message}")
        self.line, self.column = line, column


class PlainInt(int):
    """A whole number that keeps its spelling, such as 0x1F or 007, in `source`."""


class PlainFloat(float):
    """A number that keeps its spelling, such as 1.10, in `source`."""


# what a plain scalar may be where it has a tag; with the first two it stays text
TAGS = {"!": (), "str": (), "int": (int, PlainInt), "float": (float, PlainFloat), "bool": (bool,),
        "null": (type(None),), "map": (), "seq": ()}


def load_yaml(text):
    """Reads one YAML 1.2 document (str or UTF-8 bytes) into dict, list, str, int, float, bool, None.

    Raises YAMLError with line and column.  It never reads a document differently from a full YAML 1.2 parser
    with the core schema: what it does not support it refuses (duplicate keys, keys that are no scalars, other
    tags, directives other than %YAML 1.2, a second document).
    """
    if isinstance(text, (bytes, bytearray)):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            line = text.count(b"\n", 0, error.start) + 1
            raise YAMLError("not UTF-8; save it as UTF-8", line, 1) from None
    return YAMLReader(text).read_document()


def scalar_text(value):
    """A scalar as the text an environment variable gets: a plain number as it was spelt, true or false.

    Raises TypeError.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, (str, int, float)):
        raise TypeError(f"{type(value).__name__} has no text form")
    return value if isinstance(value, str) else getattr(value, "source", None) or repr(value)


class YAMLReader:
    """The reader of one document; see load_yaml."""

    # No pattern repeats a group: that would take some hundred bytes of memory for each time.
    SPACE = re.compile(r"[ \t]*")
    GAP = re.compile(r"[ \t\n]*")
    # what ends a line of a plain scalar in a block, and in a flow collection
    STOP = (re.compile(r":(?=[ \t\n])|[ \t]#|\n"), re.compile(r":(?=[ \t\n,\[\]{}])|[ \t]#|[\n,\[\]{}]"))
    MARKER = re.compile(r"(?:---|\.\.\.)(?=[ \t\n])")
    ALIAS = re.compile(r"\*([^\s,\[\]{}]+)")
    # What few documents have is compiled when it is met.  MERGE: a plain key; quoted, it is text.
    MERGE = r"(?:\?\s+)?(?:&\S+\s+)?<<"
    PROPERTY = r"(&[^\s,\[\]{}]+|!<[^\s<>]+>|![^\s,\[\]{}]*)(?:[ \t]+|(?=[\n,\]}]))"
    FORBIDDEN = "[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff\ufffe\uffff]"
    HEADER = r"([|>])([-+]?[1-9]?|[1-9][-+])(?:[ \t]+#[^\n]*|[ \t]*)\n"
    # what is not itself in a quoted scalar, or ends it
    QUOTED = {
        '"': re.compile(r"\"|\\(?:\n[ \t\n]*|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)"
                        r"|(?:(?<![ \t])|(?<=\\[ \t]))[ \t]*\n[ \t\n]*"),
        "'": re.compile(r"''?|(?<![ \t])[ \t]*\n[ \t\n]*"),
    }
    NUMBER = re.compile(f"(?:({INT_PATTERN})|({FLOAT_PATTERN}))\\Z")

    def __init__(self, text):
        text = text[1:] if text.startswith("\ufeff") else text
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        # the last line has no end, so a block scalar there does not get one either
        self.cut = text[text.rfind("\n") + 1:].strip(" ") != ""
        self.text = text if text.endswith("\n") else text + "\n"
        self.position, self.column, self.depth, self.nodes = 0, 0, 0, 0
        self.kind = ""                              # of the last node, see make_node
        self.anchors = {}
        # none of these is printable; to compile the pattern takes longer than to read a configuration
        plain = self.text.replace("\n", "").replace("\t", "")
        bad = None if plain.isprintable() else re.search(self.FORBIDDEN, self.text)
        if bad:
            self.fail(f"character {bad.group()!r} is not allowed", bad.start())
        self.count(self.text.count("\n"))

    def fail(self, message, position=None):
        """Raises YAMLError for a position, by default the current one."""
        position = min(self.position if position is None else position, len(self.text))
        start = self.text.rfind("\n", 0, position) + 1
        raise YAMLError(message, self.text.count("\n", 0, start) + 1, position - start + 1)

    def count(self, nodes=1):
        """Counts nodes, lines, and each 16 characters that an alias repeats: nothing small becomes huge."""
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            self.fail(f"more than {MAX_NODES} nodes and lines")

    # Documents and lines

    def read_document(self):
        """The one document's value."""
        self.skip()
        directive = re.compile(r"%YAML[ \t]+1\.2(?=[ \t\n])").match(self.text, self.position)
        if directive:
            self.position = directive.end()
            self.end_line()
        value = None
        if self.column < 0 and self.text.startswith("---", self.position):
            self.position += 3
            value = self.read_block(-1, compact=False)
        elif directive:
            self.fail("--- is missing after the directive")
        elif self.text.startswith("%", self.position):
            self.fail("a directive other than %YAML 1.2 is not supported")
        elif self.column >= 0:
            value = self.read_block(-1)
        if self.column < 0 and self.text.startswith("...", self.position):
            self.position += 3
            self.end_line()
        if self.position < len(self.text):
            self.fail("a second document" if self.column < 0
                      else "more than one value, or wrong indentation")
        return value

    def skip(self, flow=False):
        """Goes over white space, line ends and comments; whether a line has ended.

        Then `column` is where the next thing stands.  Outside of flow collections no tab may stand before it.
        """
        text, start = self.text, self.position
        end = self.GAP.match(text, start).end()
        while text.startswith("#", end) and text[end - 1:end] in " \t\n":
            end = self.GAP.match(text, text.index("\n", end)).end()
        self.position = end
        line = text.rfind("\n", start, end) + 1
        if start and not line:
            return False
        indent = text[line:end]
        self.column = len(indent) - len(indent.lstrip(" "))
        if end == len(text) or end == line and self.MARKER.match(text, end):
            self.column = -1
        elif "\t" in indent and not flow and text[end] not in "[{":
            self.fail("a tab in the indentation; use blanks", line + self.column)
        return True

    def end_line(self):
        """Makes sure that nothing more stands on this line and goes to the next one."""
        if not self.skip():
            self.fail("more on this line than belongs to the value; a text with a colon in it needs quotes")

    def is_outside(self, position, parent):
        """Whether what stands first on its line cannot go on with a scalar indented deeper than `parent`."""
        indent = self.text[self.text.rfind("\n", 0, position) + 1:position]
        column = len(indent) - len(indent.lstrip(" "))
        return column <= parent or position == len(self.text) or (
            not column and bool(self.MARKER.match(self.text, position)))

    def at_indicator(self, characters, after=AFTER[False]):
        """Whether an indicator stands here: one of these characters, then white space or what else may."""
        return self.text[self.position] in characters and self.text[self.position + 1] in after

    # Blocks

    def read_block(self, parent, dash=False, compact=True):
        """The node after an indicator (`-`, `:`, `?`, `---`), on this line or the next ones.

        It is indented deeper than `parent`; dash: a sequence may also stand in its column.  compact: a
        collection may start on this line.
        """
        text, start = self.text, self.position
        above = {}
        while True:
            column = None
            if self.skip():
                column = self.column
                if column <= parent and not (dash and column == parent and self.at_indicator("-")):
                    return self.make_node("", "plain", above)
            elif compact and "\t" not in text[start:self.position]:
                column = self.position - text.rfind("\n", 0, self.position) - 1
            start, compact = self.position, False
            own = self.read_properties()
            if not own or text[self.position] not in "#\n":
                break
            above = self.join(above, own)
        if self.at_indicator("-?"):
            if column is None or own:
                self.fail("a block collection cannot start here")
        else:
            content = self.read_content(parent, False)
            self.position = self.SPACE.match(text, self.position).end()
            if column is None or not self.at_indicator(":"):
                node = self.make_node(*content, self.join(above, own))
                self.end_line()
                return node
            self.position = start                   # it is the first key of a mapping
        if self.at_indicator("-"):
            return self.make_node(self.descend(self.read_sequence, column), "seq", above)
        return self.make_node(self.descend(self.read_mapping, column), "map", above)

    def join(self, above, own):
        """Anchor and tag of a node whose properties stand on several lines."""
        if above.keys() & own.keys():
            self.fail("a second anchor or tag for one node")
        return {**above, **own}

    def read_properties(self):
        """The anchor and tag that stand here in either order, and white space after them.

        They are {& or !: (the anchor with its &, or the tag's name; its place; how many nodes were before)}.
        """
        found = {}
        while self.text[self.position] in "&!":
            match = re.compile(self.PROPERTY).match(self.text, self.position)
            sign = self.text[self.position]
            if not match or sign in found:
                self.fail("an anchor or tag without name or white space after it, or a second one")
            name = re.sub(r"\A!<tag:yaml\.org,2002:(.*)>\Z|\A!!(\w+)\Z", r"\1\2", match.group(1))
            if sign == "&":                         # open: an alias to it from inside would be endless
                self.anchors[name] = self.position
            elif name not in TAGS:
                self.fail(f"tag {match.group(1)} is not supported")
            found[sign] = name, self.position, self.nodes
            self.position = match.end()
        return found

    def descend(self, read, *arguments):
        """What `read` returns, one level deeper."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"nested deeper than {MAX_DEPTH} levels")
        value = read(*arguments)
        self.depth -= 1
        return value

    def make_node(self, value, kind, properties):
        """A node by its kind (plain, quoted, alias, seq or map), anchor and tag; it is counted."""
        tag, place, _ = properties.get("!", (None, 0, 0))
        anchor, start, nodes = properties.get("&", (None, 0, 0))
        self.kind = kind
        if kind == "alias":
            if properties:
                self.fail("an alias has neither anchor nor tag")
            return value
        if kind in ("plain", "quoted"):
            value = self.make_scalar(value, tag, kind == "plain")
        elif tag not in (None, "!", kind):
            self.fail(f"tag !!{tag} does not fit this collection", place)
        self.count()
        if anchor and self.anchors[anchor] == start:    # else one that began later has that name now
            self.anchors[anchor] = value, self.nodes - nodes + (self.position - start) // 16
        return value

    def is_next(self, column):
        """Whether a line follows whose first thing stands in the column of a collection."""
        if self.column > column:
            self.fail("wrong indentation")
        return self.column == column

    def read_sequence(self, column):
        """A block sequence whose dashes stand in `column`."""
        items = []
        while True:
            self.position += 1
            items.append(self.read_block(column))
            if not self.is_next(column) or not self.at_indicator("-"):
                return items

    def read_mapping(self, column):
        """A block mapping whose keys stand in `column`."""
        pairs = []
        while True:
            start, value = self.position, None
            if self.at_indicator("?"):
                self.position += 1
                key = self.read_block(column, True)
                if self.column == column and self.at_indicator(":"):
                    self.position += 1
                    value = self.read_block(column, True)
            else:
                key = self.read_key(column)
                value = self.read_block(column, True, compact=False)
            pairs.append((key, value, start))
            if not self.is_next(column):
                return self.make_mapping(pairs)

    def read_key(self, column):
        """An implicit key and its colon."""
        start = self.position
        properties = self.read_properties()
        key = self.make_node(*self.read_content(column, False), properties)
        self.position = self.SPACE.match(self.text, self.position).end()
        if not self.at_indicator(":"):
            self.fail("a key is missing here, or its colon", start)
        self.check_key(start)
        self.position += 1
        return key

    def check_key(self, start):
        """Refuses an implicit key from `start` to here that no reader has to look for."""
        if self.position - start > 1024 or "\n" in self.text[start:self.position]:
            self.fail("a key lies on one line and has at most 1,024 characters", start)

    def make_mapping(self, pairs):
        """A dictionary from (key, value, position); refuses what is no scalar or occurs twice.

        Merges << last.
        """
        mapping, merged = {}, ()
        for key, value, position in pairs:
            if key == "<<" and re.compile(self.MERGE).match(self.text, position):
                if merged:
                    self.fail("the key << occurs twice", position)
                merged = value, position
            elif isinstance(key, (dict, list)):
                self.fail("a key that is no scalar is not supported", position)
            # .nan differs from itself
            elif key in mapping or key != key and any(other != other for other in mapping):
                self.fail(f"the key {str(key)[:60]!r} occurs twice; keep one of them", position)
            else:
                mapping[key] = value
        value, position = merged or ([], 0)
        for source in value if isinstance(value, list) else [value]:
            if not isinstance(source, dict):
                self.fail("<< takes a mapping or a list of mappings", position)
            self.count(len(source))
            for key, item in source.items():
                mapping.setdefault(key, item)
        return mapping

    # Scalars

    def read_block_scalar(self, parent):
        """The text of a literal or folded scalar; the position is at its indicator."""
        text = self.text
        header = re.compile(self.HEADER).match(text, self.position)
        if not header:
            self.fail("the header of a block scalar is | or >, then at most + or - and a digit")
        style, marks = header.groups()
        start = header.end()
        digit = marks.strip("+-")
        first = re.compile(r"[ \n]*").match(text, start).end()
        line = text.rfind("\n", 0, first) + 1
        indent = max(parent, 0) + int(digit) if digit else first - line
        if not digit and self.is_outside(first, parent):
            indent = first                          # it has none but empty lines, however deep
        elif not digit and "\n" + " " * (indent + 1) in text[start - 1:line]:
            self.fail("an empty line is indented deeper than the first line of the block scalar", line)
        last = re.compile(rf"\n(?:(?! {{{indent}}}| *\n)|(?=(?:---|\.\.\.)[ \t\n])|\Z)")
        end = last.search(text, start - 1).end()
        content = re.sub(rf"(?m)^ {{0,{indent}}}", "", text[start:end])
        if self.cut and end == len(text):
            content = content[:-1]
        if re.compile(" *\t").match(text, end):
            self.fail("a tab in the indentation of a block scalar", end)
        self.position = end - 1                     # the end of its last line
        body = content.rstrip("\n")
        tail = content[len(body):]
        if style == ">":                # a line end between two lines that are not indented further
            body = re.sub(r"(?m)^([^ \t\n].*)\n(\n*)(?=[^ \t\n])",
                          lambda match: match.group(1) + (match.group(2) or " "), body)
        if "+" in marks:
            return body + tail
        return body if "-" in marks or not body else body + tail[:1]

    def make_scalar(self, text, tag, plain):
        """A scalar's text to its value by tag or, for a plain one, by the core schema."""
        if tag in ("str", "!") or tag is None and not plain:
            return text
        value = self.resolve_plain(text)
        if tag == "float" and re.match(r"[-+]?[0-9]+\Z", text):
            value = float(value)
        if tag and type(value) not in TAGS[tag]:
            self.fail(f"{text[:60]!r} does not fit its tag !!{tag}")
        return value

    def resolve_plain(self, text):
        """A plain scalar by the core schema."""
        if text in CONSTANTS:
            return CONSTANTS[text]
        match = self.NUMBER.match(text) if text[0] in "+-.0123456789" else None
        if not match:
            return text
        if match.group(1):
            if len(text) > 400:
                self.fail("a number of more than 400 digits")
            number = PlainInt(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        else:
            number = PlainFloat(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if repr(number) == text:
            return +number                          # as plain as its spelling
        number.source = text
        return number

    def read_content(self, parent, flow):
        """(value, its kind) of a scalar, an alias or a flow collection; of a scalar its text."""
        character = self.text[self.position]
        if character == "*":
            return self.read_alias(), "alias"
        if character in "[{":
            value = self.descend(self.read_flow_collection, parent)
            return value, "seq" if character == "[" else "map"
        if character in "\"'":
            return self.read_quoted(character, parent), "quoted"
        if character in "|>" and not flow:
            return self.read_block_scalar(parent), "quoted"
        return self.read_plain(parent, flow), "plain"

    def read_alias(self):
        """The value of an anchor that stands before."""
        match = self.ALIAS.match(self.text, self.position)
        known = self.anchors.get("&" + match.group(1)) if match else None
        if not isinstance(known, tuple):
            self.fail("an alias to nothing before it")
        self.position = match.end()
        self.count(known[1])
        if self.depth + measure_depth(known[0]) > MAX_DEPTH:
            self.fail(f"nested deeper than {MAX_DEPTH} levels by aliases")
        return known[0]

    def read_plain(self, parent, flow):
        """A plain scalar's text, folded over its lines; empty where a block's key is."""
        text, start, pieces = self.text, self.position, []
        if not flow and self.at_indicator(":"):
            return ""
        if text[start] in ",[]{}#&*!|>'\"%@`" or self.at_indicator("-?:", AFTER[flow]):
            self.fail(f"a value cannot start with {text[start]!r} here")
        while True:
            stop = self.STOP[flow].search(text, start).start()
            if pieces and text[stop] == ":" and not flow:
                self.fail("a key on a line that continues a value; is the indentation right, and is a blank"
                          " behind the colon before it?", start)
            pieces.append(text[start:stop].rstrip(" \t"))
            self.position = start + len(pieces[-1])
            if text[stop] != "\n":
                break
            start = self.GAP.match(text, stop).end()
            if self.is_outside(start, parent) or text[start] == "#" or (
                    flow and self.STOP[flow].match(text, start)):
                break
            pieces.append("\n" * (text.count("\n", stop, start) - 1) or " ")
        return "".join(pieces)

    def read_quoted(self, quote, parent):
        """A quoted scalar's text."""
        pieces = []
        end = self.position + 1
        while True:
            match = self.QUOTED[quote].search(self.text, end)
            if not match or match.end() == len(self.text):
                self.fail("a quoted value is not closed")
            piece = match.group()
            pieces.append(self.text[end:match.start()])
            end = match.end()
            if piece == quote:
                self.position = end
                return "".join(pieces)
            if "\n" in piece:
                if self.is_outside(end, parent):
                    self.fail("a quoted value is continued with too little indentation", end)
                piece = "\n" * (piece.count("\n") - 1) or ("" if piece[0] == "\\" else " ")
            elif piece == "''":
                piece = quote
            else:
                piece = self.make_character(piece, match.start())
            pieces.append(piece)

    def make_character(self, escape, position):
        """The character of an escape in a double-quoted scalar."""
        if escape[1:] in ESCAPES:
            return ESCAPES[escape[1:]]
        number = int(escape[2:] or "-1", 16)
        if not 0 <= number <= 0x10FFFF or 0xD800 <= number <= 0xDFFF:
            # halves of a surrogate pair too: YAML takes each by itself
            self.fail(f"{escape} is no character", position)
        return chr(number)

    # Flow

    def skip_flow(self, parent, indicator=0):
        """Goes over an indicator, where there is one, white space, line ends and comments between parts."""
        self.position += indicator
        ended = self.skip(True)
        if self.position == len(self.text):
            self.fail("a flow collection is not closed")
        before, character = self.text[self.position - 1:self.position + 1]
        closes = self.column == parent and character in "]}" and before in " \n"    # as all readers take it
        if ended and self.column <= parent and not closes:
            self.fail("a flow collection is continued with too little indentation")

    def read_flow_collection(self, parent):
        """[ … ] or { … }.  A single pair in a sequence is a mapping of its own."""
        text = self.text
        closing = "]" if text[self.position] == "[" else "}"
        items = []                                  # of a mapping: (key, value, position)
        while True:
            self.skip_flow(parent, 1)
            start, value = self.position, None
            if text[start] == closing:
                break
            explicit = self.at_indicator("?")
            if explicit:
                self.skip_flow(parent, 1)
            key = self.read_flow_node(parent)
            # After a quoted key or a collection the colon may stand close to the value.
            paired = self.at_indicator(":", AFTER[True]) or (
                text[self.position] == ":" and self.kind not in ("plain", "alias"))
            if paired:
                if closing == "]" and not explicit:
                    self.check_key(start)
                self.skip_flow(parent, 1)
                value = self.read_flow_node(parent)
            elif self.position == start:
                self.fail("a value is missing before the comma")
            if closing == "}":
                items.append((key, value, start))
            else:
                items.append(self.make_mapping([(key, value, start)]) if paired or explicit else key)
            if text[self.position] == closing:
                break
            if text[self.position] != ",":
                self.fail(f"a comma or {closing} is missing")
        self.position += 1
        return items if closing == "]" else self.make_mapping(items)

    def read_flow_node(self, parent):
        """A node in a flow collection, an empty one where there is nothing before its end; blanks behind."""
        properties = self.read_properties()
        if properties:
            self.skip_flow(parent)
        empty = self.text[self.position] in ",]}" or self.at_indicator(":", AFTER[True])
        node = self.make_node(*("", "plain") if empty else self.read_content(parent, True), properties)
        self.skip_flow(parent)
        return node


def measure_depth(value):
    """How many levels of collections a YAML value has."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return 0
    return 1 + max(map(measure_depth, value), default=0)


# ----------------------------------------------------------------------------------------------------------
# 24. Small encodings
# ----------------------------------------------------------------------------------------------------------

def make_quoted(text):
    """Text in double quotes, as a line of the log (logfmt) and git's configuration have it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def sha256_digest(data):
    """The digest of bytes in Margo's spelling, `sha256:` and 64 lower-case hex digits (C-108, C-109)."""
    return digest_pieces([data])


def digest_pieces(pieces):
    """The digest, as sha256_digest spells it, of bytes that come piece by piece."""
    import hashlib
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return "sha256:" + found.hexdigest()


def make_json(value):
    """JSON as UTF-8 bytes in one stable form, so that equal values are equal bytes."""
    import json
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def parse_json(data, what, most=MAX_NODES):
    """JSON text that leaves no doubt (UTF-8, no duplicate member, no NaN, nothing endless, no half character)
    to a value.

    Raises ValueError naming `what`, also for more than `most` members.
    """
    import json

    def make_object(pairs):
        value = dict(pairs)
        if len(value) != len(pairs):
            raise ValueError("a member occurs twice")
        return value

    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    def read_int(text):
        # as newer Pythons have it
        return int(text) if len(text) <= 4300 else refuse("a number of more than 4300 digits")

    def read_float(text):
        return float(text) if abs(float(text)) < float("inf") else refuse(text[:40])

    try:
        if data.lstrip()[:1] in (b"<", b""):
            raise ValueError("it is a web page; does a portal or a proxy answer in its place?" if data.strip()
                             else "it is empty; get it again")
        if sum(map(data.count, (b",", b"[", b"{"))) > most:
            raise ValueError(f"it has more than {most} members")
        value = json.loads(data.decode("utf-8"), object_pairs_hook=make_object, parse_constant=refuse,
                           parse_int=read_int,
                           parse_float=read_float)
        if b"\\ud" in data.lower():
            make_json(value)                        # refuses a half character
        return value
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not usable JSON: it is not UTF-8; is it coded, as by gzip"
                         " (Content-Encoding), which was not asked for?") from None
    except (ValueError, RecursionError) as error:
        place = f"line {error.lineno}, column {error.colno}: " if hasattr(error, "colno") else ""
        raise ValueError(f"{what} is not usable JSON: {place}{getattr(error, 'msg', error)}") from None


def make_time(seconds):
    """Unix seconds to RFC 3339 in UTC, which ends with the year 9999."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(min(seconds, 253402300799)))


def make_printable(text, limit=500):
    """Foreign text for a log or a terminal: control characters escaped, cut at `limit` characters."""
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return clean + ("..." if len(text) > limit else "")


def make_base64(data):
    """Bytes in base64, as text without line ends."""
    import base64
    return base64.b64encode(data).decode()


def parse_base64(text):
    """Base64 text, with white space of ASCII anywhere, to bytes; raises ValueError for all else in it."""
    import base64
    return base64.b64decode(b"".join(text.encode("ascii").split()), validate=True)


def parse_date(text):
    """A date of HTTP, in any of its forms, to Unix seconds; None where there is none or it is unreadable."""
    from datetime import timezone
    from email.utils import parsedate_to_datetime
    try:
        moment = parsedate_to_datetime(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def check_gzip(data, max_unpacked):
    """Raises ValueError unless bytes are one whole gzip stream that unpacks to at most so many bytes."""
    import zlib
    stream = zlib.decompressobj(31)
    size, rest = 0, b""
    try:
        for start in range(0, len(data), 16 * KIB):     # what is left of one is copied each time
            rest = data[start:start + 16 * KIB]
            while rest and not stream.eof:
                size += len(stream.decompress(rest, MIB))
                rest = stream.unconsumed_tail
                if size > max_unpacked:
                    raise ValueError(f"it unpacks to more than {max_unpacked} bytes (policy.max_unpacked)")
    except zlib.error as error:
        raise ValueError(f"not a readable tar+gzip ({error})") from None
    if not stream.eof or stream.unused_data or rest:
        raise ValueError("it is cut short, or something follows it")


def unpack_tar(data, max_unpacked, max_entries):
    """(a file of the tar's bytes, [TarInfo], where the archive ends in it) of a tar+gzip.

    The file is unpacked as it is read, because the whole may be larger than the memory (see read_pieces).
    Raises ValueError for what is none, or is over a limit.  A file's content is what lies at its place in the
    bytes: tarfile itself would blow up a sparse one to whatever size it claims.
    """
    import gzip
    import itertools
    import tarfile

    class Headers:
        """What tarfile reads: headers, forwards and up to a limit, because it keeps all that they hold.

        To go back would unpack all anew; a negative size leads it in circles.
        """

        left = 32 * MIB

        def __init__(self, file):
            self.file, self.tell = file, file.tell

        def seek(self, offset):
            if offset < self.tell() - 512:
                raise ValueError("headers of negative size")
            return self.file.seek(offset)

        def read(self, size):
            self.left -= size
            if size < 0 or self.left < 0:
                raise ValueError("headers that are too large, or of negative size")
            data = self.file.read(size)
            # older Pythons look at each digit again and again
            if size > 512 and re.search(b"[0-9]{64}", data):
                raise ValueError("a header with endless digits")
            return data

    check_gzip(data, max_unpacked)
    plain = gzip.GzipFile(fileobj=io.BytesIO(data))
    try:
        with tarfile.open(fileobj=Headers(plain), mode="r:") as archive:
            members = list(itertools.islice(archive, max_entries + 1))
    except (tarfile.TarError, EOFError, ValueError, OSError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a readable tar+gzip ({error})") from None
    if len(members) > max_entries:
        raise ValueError(f"more than {max_entries} entries")
    return plain, members, archive.offset


def read_pieces(file, offset, size):
    """So many bytes of a file from a place on, piece by piece."""
    file.seek(offset)
    while size > 0:
        piece = file.read(min(size, MIB))
        if not piece:
            return
        size -= len(piece)
        yield piece


# ----------------------------------------------------------------------------------------------------------
# 25. Signed (optional)
# ----------------------------------------------------------------------------------------------------------

Signer = define("Signer", "leaf key algorithm label components keyid alg",
    "What signs requests: the own leaf Certificate, its key (a file, or a URI that openssl knows), algorithm,"
    " and how RFC 9421 is spoken: label, components to cover, keyid, `alg` parameter (empty: not sent).")

# openssl's arguments of each algorithm, the bytes of r and of s where it is ECDSA, and which keys sign by it,
# by the object identifiers in a public key; the first that fits a key is its default (C-065).
PSS = "-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:"
SIGNING = {
    "ecdsa-p256-sha256": ("-sha256", 32, "2a8648ce3d0201 2a8648ce3d030107"),
    "ecdsa-p384-sha384": ("-sha384", 48, "2a8648ce3d0201 2b81040022"),
    "rsa-pss-sha512": (f"-sha512 {PSS}64", 0, "2a864886f70d01010[1a]"),
    "rsa-v1_5-sha256": ("-sha256", 0, "2a864886f70d010101"),
    "rsa-pss-sha256": (f"-sha256 {PSS}32", 0, "2a864886f70d01010[1a]"),
    "ed25519": ("", 0, "2b6570"),
}
ROLES = (("helm", "Standalone Cluster"), ("compose", "Standalone Device"))

Speech = define("Speech", "flat silent certificate client_id status",
    "How servers of one wfm.dialect speak: whether they take capabilities for each device, flat, or one"
    " document with roles and resources; the members that a status of rc.3 must not have; what onboarding"
    " calls the certificate and the client id; the path of a deployment's status.",
    False, ("adoptedManifestVersion", "deviceId", "source"), "certificate", "clientId",
    "/deployments/{}/status")
SPEECHES = {
    "a": Speech(),
    "b": Speech(True, ("adoptedManifestVersion",)),
    # as the open WFM of December 2025 has a
    "a-2025": Speech(certificate="public_certificate", client_id="client_id", status="/deployment/{}/status"),
}


def read_components(value, base):
    """What a request signature covers.

    Without method, target and content digest it would do for any request (C-062, C-063).
    """
    names = list_of(read_word, "a list of components")(value, base)
    lower = [name.lower() for name in names]
    if not {"@method", "@target-uri", "content-digest"} <= set(lower) or len(set(lower)) < len(lower):
        raise ValueError("a list of components, @method, @target-uri and content-digest among them")
    return names


SCHEMA["wfm"]["dialect"] = (choice(*SPEECHES), "a", "form of capabilities: a has roles, b is flat")
SCHEMA["wfm"]["reported_id"] = (choice("device", "client"), "device", "id that capabilities carry")
SCHEMA["identity"]["algorithm"] = (choice(*SIGNING), None, "how requests are signed; unset: by the key")
SCHEMA["identity"]["signature"] = {
    "label": (read_word, "sig1", "name of the signature in its headers"),
    "components": (read_components, ["@method", "@target-uri", "@authority", "content-digest"],
                   "what of a request is signed"),
    "keyid": (read_word, None, "name by which the WFM knows the key; without it the key's digest"),
    "alg": (read_word, None, "name of the algorithm that is sent; empty: none"),
}


def choose_algorithm(spki, wanted):
    """The algorithm that the key of a public key (DER) signs by: the wanted one or its kind's default.

    Raises ValueError.
    """
    fields = parse_der(parse_der(parse_der(spki)[0][1])[0][1])
    kind = " ".join(value.hex() for tag, value, _ in fields if tag == 0x06)
    known = [name for name, (_, _, keys) in SIGNING.items() if re.fullmatch(keys, kind)]
    if not known:
        raise ValueError("its key is of no kind that signs requests: ECDSA P-256 or P-384, RSA, or Ed25519")
    if wanted and wanted not in known:
        raise ValueError(f"its key cannot sign by identity.algorithm {wanted}, only by {', '.join(known)}")
    return wanted or known[0]


def make_signer(leaf, config):
    """The Signer of the own leaf Certificate and the configuration; raises ValueError."""
    wish = config.identity.signature
    algorithm = choose_algorithm(leaf.spki, config.identity.algorithm)
    alg = wish.alg
    if alg is None:
        alg = algorithm if algorithm in ("rsa-v1_5-sha256", "rsa-pss-sha256") else ""
    keyid = wish.keyid or sha256_digest(leaf.spki)[7:]
    return Signer(leaf, config.identity.key, algorithm, wish.label, wish.components, keyid, alg)


def load_signer(config, now=None):
    """What signs requests for the own certificate; see load_own."""
    return load_own(config, lambda leaf: make_signer(leaf, config), now)


def make_signature_base(method, url, headers, signer, created):
    """(signature parameters as text, bytes to sign) of a request (protocol 2.9, C-063, C-064).

    What it lacks is not covered.
    """
    from urllib.parse import urlsplit
    parts = urlsplit(url)
    values = {name.lower(): value for name, value in headers.items()}
    values.update({"@method": method, "@target-uri": url, "@authority": parts.netloc, "@scheme": parts.scheme,
                   "@path": parts.path})
    covered = [name for name in signer.components if name.lower() in values]
    alg = f';alg="{signer.alg}"' if signer.alg else ""
    names = " ".join(f'"{name}"' for name in covered)
    parameters = f'({names});created={created};keyid="{signer.keyid}"{alg}'
    lines = [f'"{name}": {values[name.lower()]}' for name in covered] + [f'"@signature-params": {parameters}']
    return parameters, "\n".join(lines).encode("latin-1")


def parse_ecdsa(der, size):
    """An ECDSA signature of openssl to r and s side by side, as RFC 9421 has them (C-066).

    Raises ValueError, OverflowError.
    """
    (_, body, _), = parse_der(der)
    r, s = (int.from_bytes(value, "big") for _, value, _ in parse_der(body))
    return r.to_bytes(size, "big") + s.to_bytes(size, "big")


def run_signature(data, signer):
    """The signature over bytes by openssl, which alone sees the key; raises Untrusted, ConfigError."""
    arguments, size, _ = SIGNING[signer.algorithm]
    try:
        if arguments:
            found = run_openssl(f"dgst {arguments} -sign", signer.key, data=data)
        else:                                       # Ed25519 takes a file that it can measure
            with lend_file(data) as file:
                found = run_openssl("pkeyutl -sign -rawin -inkey", signer.key, "-in", file.name)
        return parse_ecdsa(found, size) if size else found
    except (ValueError, OverflowError, CommandError) as error:
        reason = make_printable(str(error), 300)
        raise Untrusted(f"identity.key {signer.key}: openssl cannot sign by it: {reason}") from None


def parse_ca(text):
    """Certificates in base64 or base64url of DER or of PEM, or plain PEM, to DER bytes; raises ValueError."""
    data = text.encode("ascii")
    if b"-----BEGIN" not in data:
        plain = data.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n").decode()
        data = parse_base64(plain + "=" * (-len(plain) % 4))
    anchors = parse_pem(data) or [data]
    for anchor in anchors:
        parse_certificate(anchor)
    return anchors


def fetch_ca(config, path):
    """`enroll --fetch-ca FILE`: the WFM's root CA into a file, and its fingerprint for a person to compare.

    The channel is one that the system's store vouches for, never trust on first use (C-069).
    """
    if config.wfm.profile != "signed":
        raise ConfigError("--fetch-ca is for profile signed; others have a trust bundle")
    where = f"{config.wfm.url}/api/v1/onboarding/certificate"
    path = os.path.abspath(path)
    context = make_tls_context(min_tls=config.wfm.min_tls)
    response = request("GET", where, {"Accept": JSON_TYPE}, None, context, config.wfm.timeout,
                       MAX_CERTIFICATES)
    check_response(response, where, time.time())
    try:
        value = parse_json(response.body, "the answer")
        check_shape(value, {"certificate": "(?s).*"}, "")
        anchors = parse_ca(value["certificate"])
    except ValueError as error:
        raise Untrusted(f"{where}: no usable certificate ({error})") from None
    pem = make_pem(anchors).encode()
    if read_file(path, MAX_CERTIFICATES) not in (None, pem):
        raise Untrusted(f"{path} holds another CA than {where} gives out; if that is meant to be, move it"
                        " away first")
    write_file(path, pem, 0o644)
    for anchor in anchors:
        print(f"{path}: compare its SHA-256 fingerprint {sha256_digest(anchor)[7:]}")


def command_enroll_signed(config, options):
    """Makes this device known to the WFM: checks its identity and reports its capabilities.

    It may be repeated at any time.  `--fetch-ca FILE` first downloads the WFM's root CA (profile signed).

    Example: margo_agent.py enroll
    """
    if "--fetch-ca" in options:
        fetch_ca(config, options["--fetch-ca"])
    command_enroll(config, options)


COMMANDS["enroll"] = (command_enroll_signed, "[--fetch-ca FILE]")


class SignedSource(HttpSource):
    """API 1.0.0 of the first preview release, in either dialect (C-060 to C-068).

    Server-side TLS, a client id, and every request signed.
    """

    def __init__(self, config, signer, state):
        super().__init__(config)
        from urllib.parse import urlsplit
        host = urlsplit(self.url).netloc
        self.url = self.url.replace(host, re.sub(":443$", "", host.lower()), 1)             # as it is signed
        self.signer, self.state, self.peer = signer, state, "the one that identity.ca vouches for"
        self.speech = SPEECHES[config.wfm.dialect]
        self.status_path = self.speech.status
        self.context = make_tls_context(ca_file=config.identity.ca, min_tls=config.wfm.min_tls)

    def adopt(self, client_id):
        """Speaks as this client from now on."""
        from urllib.parse import quote
        self.client_id = client_id
        self.root = f"/api/v1/clients/{quote(client_id, safe='')}"

    def ask(self, method, url, headers, body, limit):
        """One request with a signature of its own, also where it is repeated (C-062, C-067).

        A signature that is not accepted is explained in the log.
        """
        import hashlib
        if body is not None:
            headers["Content-Digest"] = f"sha-256=:{make_base64(hashlib.sha256(body).digest())}:"
        signer = self.signer
        parameters, base = make_signature_base(method, url, headers, signer, int(time.time()))
        headers["Signature-Input"] = f"{signer.label}={parameters}"
        headers["Signature"] = f"{signer.label}=:{make_base64(run_signature(base, signer))}:"
        response = request(method, url, headers, body, self.context, self.config.wfm.timeout, limit)
        if response.status == 401:
            theirs = parse_date(response.headers.get("Date"))
            offset = "unknown" if theirs is None else f"{time.time() - theirs:+.0f} s"
            log("error", "the WFM does not accept a signature", method=method, target=url,
                algorithm=signer.algorithm, base=base.decode("latin-1"), clockOffset=offset)
        elif response.status == 404 and url.endswith("/deployments"):
            log("error", "the WFM does not know this client any more; `unenroll`, then `enroll`, begin anew",
                client=self.client_id)
        return response

    def onboard(self):
        """The client id that the WFM gives to the own certificate.

        Raises Untrusted, Unreachable (protocol 2.7, C-068).
        """
        document = {"apiVersion": "onboarding.margo.org/v1alpha1", "kind": "OnboardingRequest",
                    self.speech.certificate: make_base64(self.signer.leaf.der)}
        try:
            answer = self.send("POST", "/onboarding", (200, 201), document=document)
            client_id = parse_client_id(parse_json(answer.body, "the answer"), self.speech.client_id)
        except (Untrusted, Refused, ValueError) as error:
            wait = "; it may wait for somebody's approval at the WFM" * bool(getattr(error, "status", 0))
            raise Untrusted(f"onboarding refused: {error}{wait}") from None
        log("info", "onboarded", client=client_id)
        return client_id

    def put_capabilities(self, device_id, document):
        """Reports what a device can do.

        By POST the first time, by PUT afterwards, by the other one where the WFM wants that.
        """
        document = load_sent(document, self.config, self.state)
        path = f"/capabilities/{document['properties']['id']}" if self.speech.flat else "/capabilities"
        methods = ["POST", "PUT"]
        if device_id in (self.state["enrollment"] or {}).get("devices", {}):
            methods.reverse()
        try:
            self.send(methods[0], path, SUCCESS, document=document)
        except Refused as error:
            if error.status not in (404, 405, 409):
                raise
            self.send(methods[1], path, SUCCESS, document=document)

    def delete_capabilities(self, device_id):
        """Deregisters a device, where the dialect has a way to."""
        if self.speech.flat:
            super().delete_capabilities(load_name(device_id, self.config, self.state))

    def post_status(self, deployment_id, document):
        """Reports a deployment's status with that generation's fields."""
        document = dict(document, deviceId=load_name(document["deviceId"], self.config, self.state))
        super().post_status(deployment_id, make_older_status(document, self.config.wfm.dialect))


def load_name(device_id, config, state):
    """What the WFM calls a device: its id, or what wfm.reported_id makes of it by the client id."""
    if config.wfm.reported_id == "device" or not state["client"]:
        return device_id
    return state["client"]["id"] + device_id[len(get_device_id(config.device)):]


def load_sent(document, config, state):
    """Capabilities of rc.3 as they are sent: in the dialect, with the WFM's name for the device."""
    sent = make_older_capabilities(document, config.wfm.dialect)
    sent["properties"]["id"] = load_name(sent["properties"]["id"], config, state)
    return sent


def parse_client_id(value, name):
    """The client id in the answer to an onboarding, one segment of a path; raises ValueError."""
    check_shape(value, {name: r"(?!\.\.?$)[^/\\]{1,200}"}, "")
    if not value[name].isprintable():
        raise ValueError(f"{name}: found {make_printable(value[name])!r}, expected printable text")
    return value[name]


def make_older_capabilities(document, dialect):
    """Capabilities of rc.3 as the first preview release has them, without labels (protocol 3.5)."""
    heading = {"apiVersion": "device.margo.org/v1alpha1", "kind": "DeviceCapabilitiesManifest"}
    properties = dict(document["properties"])
    cpus = properties.pop("cpus", None)
    if SPEECHES[dialect].flat:
        if cpus:
            properties["cpu"] = cpus
        sent = dict(document, properties=properties, **heading)
        sent.pop("labels", None)
        return sent
    names = ("memory", "storage", "peripherals", "interfaces")
    resources = {key: properties[key] for key in names if key in properties}
    if cpus:
        resources["cpu"] = max(cpus, key=lambda cpu: cpu["cores"])                  # never summed (C-203)
    if resources:
        properties["resources"] = resources
    types = properties.get("supportedDeploymentTypes", ())
    properties.setdefault("roles", [role for kind, role in ROLES if kind in types] or ["Gateway"])
    return dict(heading, properties={key: value for key, value in properties.items()
                                     if key not in HOSTING_PROPERTIES})


def make_older_status(document, dialect):
    """A status of rc.3 as the first preview release has it (protocol 3.6)."""
    import json

    def strip(value):
        return {key: item for key, item in value.items() if key not in SPEECHES[dialect].silent}

    stripped = json.loads(make_json(document), object_hook=strip)
    return dict(stripped, apiVersion="deployment.margo.org/v1alpha1", kind="DeploymentStatusManifest")


class Signed(Profile):
    """Profile signed: a certificate whose key signs every request, and a client id from onboarding."""

    settings = ("wfm.url", "identity.certificate", "identity.key", "identity.ca")

    @staticmethod
    def takes_children(config):
        return SPEECHES[config.wfm.dialect].flat

    def connect(self, keep=True):
        """See Profile.  keep: onboards where that is due, and stores the client id before anything else."""
        config = self.config
        state = self.state
        now = time.time()
        signer = load_signer(config, now)
        warn_of_own(config, signer.leaf, self.store, now)
        source = SignedSource(config, signer, state)
        key = sha256_digest(signer.leaf.spki)
        client = state["client"] or {"id": "not known to the WFM", "key": ""}
        check_enrollment(state, client["id"])
        if client["key"] != key:
            if not keep:
                raise Untrusted("this device is not onboarded with its key yet; `enroll` does that, or the"
                                " next run", "NOT_ONBOARDED")
            client = state["client"] = {"id": source.onboard(), "key": key}
            self.store.save_state(state)
            check_enrollment(state, client["id"])
        source.adopt(client["id"])
        return source

    def describe(self, now):
        return describe_own(self.config, load_signer, (self.state["client"] or {}).get("id", ""), now)

    def check(self, now):
        signer = load_signer(self.config, now)
        run_signature(b"a test of this device's own", signer)
        if load_public_key(signer.key) != signer.leaf.spki:
            raise Untrusted(f"identity.key {signer.key} is not the key of identity.certificate")
        return judge_own(signer.leaf, f"signs by {signer.algorithm}", self.config, now)

    def translate(self, document):
        return load_sent(document, self.config, self.state)

    def identify(self):
        """The own key, at this WFM."""
        return f"{self.config.wfm.url}#{sha256_digest(load_signer(self.config).leaf.spki)}"


PROFILES["signed"] = Signed


# ----------------------------------------------------------------------------------------------------------
# 26. Older documents (optional)
# ----------------------------------------------------------------------------------------------------------

PACKAGE_URL_PATTERN = r"https://[^\s/?#@]+/[^\s#@]+"
OLDER = {
    "kind?": "ApplicationDeployment(Manifest)?",
    "metadata": {"annotations?": dict},
    "spec": {"deploymentProfile": dict},
}


def convert_older(value):
    """An ApplicationDeployment of an older generation (protocol 0 and 3.3) in rc.3's form, see DIALECTS.

    Raises ValueError.  Such documents carry `apiVersion` or `kind`.  Servers put ids in different places, and
    need not say what application it is: nothing here is done by that.  A name that is not given is the
    application's or else the id, a namespace is `default`, and without `metadata.deviceId` the document is
    for the device that was given it.
    """
    if "apiVersion" not in value and "kind" not in value:
        return None
    check_shape(value, OLDER, "")
    metadata = value["metadata"]
    spec = value["spec"]
    profile = spec["deploymentProfile"]
    notes = metadata.get("annotations") or {}
    ids = [holder.get("id") for holder in (value, notes, metadata)]
    places = [item for item in ids + [metadata.get("name")] if re.fullmatch(UUID_PATTERN, str(item))]
    own_id = next(filter(None, places + ids), None)
    applications = [holder.get("applicationId") for holder in (spec, notes, metadata)]
    application = next(filter(None, applications), None)
    kind = {"helm.v3": "helm", "docker-compose": "compose"}.get(str(profile.get("type")), profile.get("type"))
    metadata = {"name": application or str(own_id).lower(), "namespace": "default", **metadata}
    spec = dict(spec, applicationId=application or "none", deploymentProfile=dict(profile, type=kind))
    return dict(value, id=own_id, metadata=metadata, spec=spec), Dialect(parse_older_package, r"ENV\.", False)


def parse_older_package(properties, where, kind):
    """parse_package of older generations: a package may be named by its URL, and a chart by its repository's.

    See protocol 6.5.
    """
    if "packageLocation" not in properties or "repository" in properties:
        return parse_package(properties, where, kind, "(oci|https)" if kind == "helm" else "oci")
    shape = {"packageLocation": PACKAGE_URL_PATTERN, "keyLocation?": f"|{PACKAGE_URL_PATTERN}"}
    check_shape(properties, shape, where)
    return properties["packageLocation"], "", properties.get("keyLocation") or None


def fetch_older(component, config, store, kind):
    """The package of a component of an older generation: (digest, bytes), kept by its digest.

    Raises ComponentError.  Nothing vouches for its content but TLS, an index's digest and, where the document
    names a key, a signature.
    """
    url = component.repository
    if config.wfm.profile == "mtls":
        words = f"{make_printable(url)}: this generation takes packages from OCI registries only"
        raise ComponentError("INVALID_DEPLOYMENT", words)
    if kind == "helm":
        data = fetch_chart(url, component.revision, config)
    else:
        data = fetch_file(url, config)
        if component.key_location:
            run_signature_check(data, url, fetch_file(component.key_location, config), config)
        if data[:2] != b"\x1f\x8b":
            data = pack_compose(data, url, config.policy.max_document)
    digest = sha256_digest(data)
    store.save_artifact(digest, data)
    return digest, data


def pack_compose(data, url, limit):
    """A bare compose file as the package that it stands for: a tar+gzip, the same bytes each time.

    Raises ComponentError for what is neither the one nor the other.
    """
    import tarfile
    import zlib
    try:
        if len(data) > limit:
            raise ValueError(f"its {len(data)} bytes are more than policy.max_document")
        check_shape(load_yaml(data), {"services": dict}, "")
    except ValueError as error:                     # a YAMLError is one
        words = f"neither a tar+gzip nor a compose file: {error}"
        raise ComponentError("ARCHIVE_INVALID", f"{make_printable(url)}: {words}") from None
    member = tarfile.TarInfo("compose.yaml")
    member.size = len(data)
    packer = zlib.compressobj(wbits=31)
    tar = member.tobuf() + data + bytes(-len(data) % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE)
    return packer.compress(tar) + packer.flush()


def fetch_chart(repository, revision, config):
    """The bytes of a chart from `https://repository/NAME` by that repository's index."""
    from urllib.parse import urljoin
    base, _, name = repository.rpartition("/")
    index = f"{base}/index.yaml"
    try:
        items = load_yaml(fetch_file(index, config))["entries"][name]
        entry = next(item for item in items if item["version"] == revision.replace("_", "+"))          # C-166
        url = urljoin(index, entry["urls"][0])
        check_shape(url, PACKAGE_URL_PATTERN, "urls[0]")
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, StopIteration) as error:
        words = f"{index} names no chart {name} {revision} with an https URL: {error}"
        raise ComponentError("PULL_FAILED", words) from None
    data = fetch_file(url, config)
    digest = sha256_digest(data)
    wanted = str(entry.get("digest") or digest)
    if wanted not in (digest, digest[7:]):
        words = f"the index names {make_printable(wanted, 80)}, the chart has {digest}"
        raise ComponentError("DIGEST_MISMATCH", f"{url}: {words}")
    return data


def fetch_file(url, config, missing=False):
    """The bytes at an https URL, by what `registries` says of its host.

    None where there is nothing, if `missing`.
    """
    host = url.split("/")[2]
    registry = Registry(host, config)
    registry.authorization = load_credentials(host, registry.settings)
    response = registry.fetch(url, "*/*", config.policy.max_artifact)
    if response.status in (403, 404) and missing:   # stores that list nothing say 403 of what is not there
        return None
    return registry.check(response, url, config.policy.max_artifact).body


def run_signature_check(data, url, key, config):
    """Raises ComponentError unless gpg finds that the key signed the package.

    No signature to be had is a warning.
    """
    import tempfile
    signature = fetch_file(f"{url}.asc", config, True) or fetch_file(f"{url}.sig", config, True)
    if not signature:
        log("warning", "the document names a key, but there is no signature of the package beside it (.asc or"
            " .sig)", package=url)
        return
    with tempfile.TemporaryDirectory(prefix="margo-gpg-") as home:
        paths = [os.path.join(home, name) for name in ("key", "signature", "package")]
        for path, content in zip(paths, (key, signature, data)):
            write_file(path, content)
        gpg = "gpg --batch --no-options --no-autostart --status-fd 1 --homedir".split() + [home]
        try:
            run_command(gpg + ["--import", paths[0]], 60)
            output = run_command(gpg + ["--trust-model", "always", "--verify"] + paths[1:], 60)
        except (CommandError, ConfigError) as error:
            words = f"{url} is signed, and that cannot be checked: {error.message}"
            raise ComponentError("PULL_FAILED", words) from None
    if output.code or b"[GNUPG:] REVKEYSIG" in output.stdout:
        words = f"the key at keyLocation did not sign this package, or is revoked: {output.stderr[-300:]}"
        raise ComponentError("DIGEST_MISMATCH", f"{url}: {words}")


DIALECTS.append(convert_older)
FETCHERS["https"] = fetch_older


# ----------------------------------------------------------------------------------------------------------
# 27. Git (optional)
# ----------------------------------------------------------------------------------------------------------

PUSH_ATTEMPTS = 5                   # how often a status is put on top of what others pushed meanwhile
MAX_PACKS = 50                      # fetches after which the copy of a repository is begun anew (P-21)
MAX_PATH = 4096                     # characters of a path, as of a file system's
MAX_LISTING = 16 * MIB              # that git may print, of a commit some 200,000 paths
GIT_MEMORY = 16 * MIB               # for each git, beside what it needs for its objects

BRANCH_PATTERN = (r"(?!.*(\.\.|\.(lock)?(/|$)))[A-Za-z0-9_][A-Za-z0-9_.+@-]*"       # as git allows it
                  r"(/[A-Za-z0-9_+@][A-Za-z0-9_.+@-]*)*")


GIT_HOST = r"([A-Za-z0-9_][A-Za-z0-9._-]*@)?(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_][A-Za-z0-9._-]*)"
# A repository's address that git never takes for an option or a helper, and that holds no password.
GIT_ADDRESS = (r"file:///[^\x00-\x1f\x7f]*|" rf"ssh://{GIT_HOST}({PORT_PATTERN})?/[!-~]+|"
               rf"{GIT_HOST}:(?!//)[A-Za-z0-9_~./][!-~]*")
read_address = scalar("an absolute https URL, or for profile git also ssh, file, or host:path", GIT_ADDRESS)


def read_url_or_address(value, base):
    """The root URL of a WFM, or a repository's address; which one is needed, the profile says."""
    if re.match("https?://[^/]*@", str(value)):
        raise ValueError("an address without a login in it; git.token_file and git.username are for that")
    return (read_root_url if str(value).startswith("https:") else read_address)(value, base)


FOLDER = r"(?!\.\.?(?:/|$))[^/\x00-\x1f]+"
read_branch = scalar("the name of a branch", BRANCH_PATTERN)
# slashes around it say nothing
read_folder = scalar("a folder inside the repository", rf"/*(?:{FOLDER}(?:/{FOLDER})*)?/*",
                     lambda text: text.strip("/"))
SCHEMA["wfm"]["url"] = (read_url_or_address, None, "root URL of the WFM, or address of the repository")
SCHEMA["wfm"]["status_url"] = (read_root_url, None, "root URL of a WFM to report to; without it a branch is")
SCHEMA["git"] = {
    "branch": (read_branch, "main", "branch of the desired state"),
    "path": (read_folder, "", "its folder of deployments; empty: the whole of it"),
    "verify_signatures": (read_flag, False, "whether each head has to be signed"),
    "allowed_signers": (read_path, None, "who may sign: a file as ssh-keygen has it, or exported gpg keys"),
    "allow_rewrite": (read_flag, False, "whether signers may rewrite history"),
    "token_file": (read_path, None, "file of the token for https, mode 0600"),
    "username": (read_text, None, "who the token belongs to; without it the token is a bearer's"),
    "ssh_key": (read_path, None, "private key for ssh, mode 0600"),
    "known_hosts": (read_path, None, "file of the host keys that ssh accepts"),
}


def check_git_settings(config):
    """What only profile git has: [(whether it is wrong, key, words)]."""
    wfm, git = config.wfm, config.git
    return [
        (wfm.profile != "git" and wfm.status_url, "wfm.status_url",
         "only profile git reports elsewhere; leave it out"),
        (git.verify_signatures and not git.allowed_signers,
         "git.allowed_signers", "not set, and needed for git.verify_signatures"),
        (git.allow_rewrite and not git.verify_signatures,
         "git.allow_rewrite",
         "a rewritten history is accepted only from signers; set git.verify_signatures, too"),
        (git.username and not git.token_file,
         "git.username", "is sent with the token of git.token_file, which is not set")]


CHECKS.append(check_git_settings)


class GitSource:
    """The desired state as a folder of documents on a branch, and a branch of one's own as the sink of
    reports.

    git is given a home of its own, so that no configuration, hook, attribute or credential of the machine has
    a say, and never a work tree.  Its repository is a cache: what was accepted lies in artifacts/, and
    whatever goes wrong in it, it is made anew (P-14, P-21).
    """

    def __init__(self, config, home, header, connect_reporter):
        self.config, self.home, self.header, self.connect_reporter = config, home, header, connect_reporter
        self.url, self.client_id, self.settings = config.wfm.url, config.wfm.url, config.git
        self.peer = f"a repository with a branch {config.git.branch}"
        self.branch = f"refs/heads/{config.git.branch}"
        self.repository = os.path.join(home, "repository")
        self.env = make_git_environment(config, home, os.environ)
        self.secret = save_secret(header) if header else None
        self.heads, self.reporter = {}, None
        self.context = self.url.startswith("https:") and make_tls_context(
            (), config.identity.ca, config.wfm.min_tls, direct=True)        # git itself asks no proxy

    def git(self, command, *arguments, timeout=60, codes=(0,), env=None, limit=MAX_LISTING, **options):
        """One git command on the repository: its Output.

        command: its fixed words as one would type them; arguments: what follows.
        It has bounds of memory and of what it writes, and raises Refused where it wants more than these or
        prints more than `limit` bytes.  Raises CommandError unless it ends with one of `codes`.
        """
        most = GIT_MEMORY + self.config.policy.max_unpacked // DOCUMENTS
        bounds = {"RLIMIT_DATA": most, "RLIMIT_FSIZE": self.config.policy.max_unpacked}
        # what is spoilt stops no poll (P-14)
        words = command.split()
        folder = os.path.join(self.home, "none") if words[0] == "ls-remote" else self.repository
        files = [self.secret.fileno()] if self.secret else []
        include = ["-c", f"include.path=/proc/self/fd/{files[0]}"] if files else []
        before = os.umask(0o077)                    # what git writes is below the state directory
        try:
            output = run_command(["git", f"--git-dir={folder}", *include, *words, *arguments], timeout,
                                 env or self.env, self.home, limit, files=files, limits=bounds, **options)
        except CommandError as error:
            if error.code == "TOO_MUCH":
                self.refuse(words[0], f"prints more than {limit} bytes")
            raise
        finally:
            os.umask(before)
        # git has no code of its own for it, nor other words in any language but this one (LC_ALL)
        if output.code and re.search("[Oo]ut of memory", output.stderr):
            self.refuse(words[0], f"takes more than {most} bytes of memory")
        if output.code not in codes:
            raise CommandError(f"git {words[0]}: {output.stderr or f'exit code {output.code}'}")
        return output

    def refuse(self, command, words):
        """Raises Refused for a git command that wants more than it may have."""
        if command == "fetch":
            remove_folder(self.repository)          # with the piece of a pack that it left
        raise Refused(f"{self.url}: git {command} {words}, all that it may; keep less in the repository, set"
                      " git.path, or see policy.max_unpacked") from None

    def fetch_head(self, ref):
        """The commit at which a ref stands at the server now, None where there is none; no object is fetched.

        Raises what `ask_reason` says.  Of an https server the certificate is looked at first, because git's
        library takes one that has its name in the subject alone, or is for clients (RFC 9525).
        """
        wait = self.config.wfm.timeout
        try:
            if self.context and not self.heads:
                fetch_chain(self.url, self.context, wait)
            output = self.git("ls-remote --", self.url, ref, timeout=4 * wait)
        except (CommandError, Untrusted, Unreachable) as error:
            raise self.ask_reason(error) from None
        found = re.search(rf"^([0-9a-f]{{40}}|[0-9a-f]{{64}})\t{re.escape(ref)}$",
                          output.stdout.decode("ascii", "replace"), re.M)
        self.heads[ref] = found.group(1) if found else None
        return self.heads[ref]

    def ask_reason(self, error, service="git-upload-pack"):
        """Why the server could not be used, as a fault: git has no words for programs, so the server itself
        is asked.

        Of an https server the status tells; an ssh server that answers is not one that cannot be reached.
        """
        wfm = self.config.wfm
        headers = {"Git-Protocol": "version=2"}
        if self.context:
            try:
                if self.header:
                    headers["Authorization"] = self.header
                where = f"{self.url}/info/refs?service={service}"
                answer = request("GET", where, headers, None, self.context, wfm.timeout, MAX_ANSWER)
                denial = "set git.token_file, or mend the token in git.token_file"
                check_response(answer, self.url, time.time(), denial)
            except MargoError as fault:
                fault.message += "; set identity.ca" if fault.stranger else ""
                return fault
        elif service == "git-upload-pack" and not self.url.startswith("file://") and ask_ssh(self.url,
                                                                                             wfm.timeout):
            return Untrusted(f"{self.url}: the ssh server is there, but not as it has to be, or gives no"
                             f" access: {error.message}")
        return Unreachable(f"{self.url}: {error.message}")

    def fetch_desired(self, accepted, load_artifact):
        """None where the branch still stands at the accepted commit, and is read as it was then, else a
        Desired; see HttpSource.
        """
        head = self.fetch_head(self.branch)
        if head is None:
            raise Refused(f"{self.url} has no branch {self.settings.branch}; mend git.branch (nothing is"
                          " removed for that)")
        if accepted and accepted["digest"] == self.make_digest(head) and not accepted.get("incomplete"):
            return None
        base = accepted["version"] if accepted else None
        head, (entries, documents) = self.work(lambda: self.fetch_files(base))
        new = {digest: data for digest, data in documents.items() if load_artifact(digest) is None}
        return Desired(head, None, self.make_digest(head), entries, new)

    def make_digest(self, head):
        """The digest of a commit and of the settings by which it is read."""
        return sha256_digest(f"{head} {self.settings.path} {self.settings.verify_signatures}".encode())

    def work(self, act):
        """What `act` returns.

        Where git fails although the server answers, once more on a repository made anew (P-14).
        """
        try:
            return act()
        except CommandError as error:
            self.fetch_head(self.branch)
            log("warning", "the copy of the repository is made anew", reason=error.message)
        try:
            remove_folder(self.repository)
            return act()
        except CommandError as error:
            raise self.ask_reason(error) from None

    def fetch_files(self, base):
        """(head commit, what read_files returns), once the head is known to follow on `base`.

        From a shallow copy that ends at the accepted commit, a plain fetch brings just the commits since and
        what is new in them, and that proves the descent; where the copy has gone, it is begun anew at the
        accepted commit, which a server gives if it still has it.  Raises Refused, Untrusted.
        """
        self.prepare()
        try:
            if base and self.has(base):
                self.git("update-ref refs/margo/base", base)
            elif base:
                self.fetch(f"{base}:refs/margo/base", "--depth=1")
        except CommandError as error:
            log("debug", "the server gives no single commits", reason=error.message)
        self.fetch(f"+{self.branch}:refs/margo/head", *([] if base else ["--depth=1"]))
        head = self.git("rev-parse --verify refs/margo/head").stdout.decode().strip()
        if self.settings.verify_signatures:
            self.ask_signature(head)
        there = base if base and self.has(base) else None
        if base and (not there or self.git("merge-base --is-ancestor", base, head, codes=(0, 1)).code):
            words = (f"commit {head} does not descend from the accepted {base}: history was rewritten, or"
                     " set back")
            if not self.settings.allow_rewrite:
                raise Refused(f"security: {words}; revert by a new commit instead, or see git.allow_rewrite")
            log("warning", f"{words}; accepted, because it is signed and git.allow_rewrite is set")
        try:
            return head, self.read_files(head, there)
        except Refused as error:
            raise Refused(f"commit {head[:12]}: {error.message}; mend that by a new commit") from None

    def prepare(self):
        """Makes the bare repository where there is none, and anew where many fetches have piled up: nothing
        tidies it.
        """
        if os.path.isdir(self.repository) and len(self.list_packs()) <= 3 * MAX_PACKS:
            return
        remove_folder(self.repository)
        known = self.heads.get(self.branch) or self.fetch_head(self.branch)
        form = ["--object-format=sha256"] if len(known or "") == 64 else []
        self.git("init --quiet --bare --template=", *form)

    def list_packs(self):
        """The paths of what was fetched."""
        packs = os.path.join(self.repository, "objects", "pack")
        return [os.path.join(folder, name) for folder, _, names in os.walk(packs) for name in names]

    def has(self, commit):
        """Whether a commit is in the repository."""
        return not self.git("cat-file -e", f"{commit}^{{commit}}", codes=(0, 1, 128)).code

    def fetch(self, refspec, *options):
        """Fetches one ref; a pack may have policy.max_unpacked bytes, and raises Refused where it has more.

        """
        limit = self.config.policy.max_unpacked
        try:
            self.git("fetch --quiet --no-tags --no-recurse-submodules", *options, "--", self.url, refspec,
                     timeout=PULL_TIMEOUT)
        except CommandError:
            if max(map(os.path.getsize, self.list_packs()), default=0) >= limit:
                self.refuse("fetch", f"has more than {limit} bytes to fetch")
            raise

    def ask_signature(self, head):
        """Raises Untrusted unless a commit is signed by one of git.allowed_signers: ssh's file of that, or
        exported gpg keys.
        """
        import tempfile
        signers = self.settings.allowed_signers
        with tempfile.TemporaryDirectory(prefix="margo-gpg-") as home:
            env = dict(self.env, GNUPGHOME=home)
            write_file(os.path.join(home, "gpg.conf"), b"batch\nno-autostart\ntrust-model always\n")
            data = read_file(signers, MAX_CERTIFICATES) or b""
            if data[:1] > b"\x7f" or b"-----BEGIN PGP" in data:
                run_command(["gpg", "--homedir", home, "--import", signers], 60, env)
            verdict = self.git("log -1 --format=%G?", head, "--", env=env).stdout.decode().strip()
        if verdict != "G":
            words = "is not signed" if verdict == "N" else "has no good signature of git.allowed_signers"
            raise Untrusted(f"commit {head} {words} (git says {verdict}); the accepted state is kept")

    def read_files(self, head, base):
        """([ManifestEntry], {digest: bytes}) of the YAML files below git.path.

        Links, submodules and all else are not looked at.

        Raises Refused, also for a path that held a deployment in the accepted commit, `base`, and holds
        something else now: only one that has gone is a removal.
        """
        policy = self.config.policy
        listing = self.list_tree(head)
        if self.settings.path and not listing:
            raise Refused(f"it has no folder {self.settings.path} (git.path); nothing is removed for that")
        blobs, links = find_blobs(listing, policy.max_document)
        total = sum(size for _, _, size in blobs)
        if total > policy.max_unpacked // DOCUMENTS:
            raise Refused(f"{len(blobs)} documents of {total} bytes are more than"
                          f" 1/{DOCUMENTS} of policy.max_unpacked")
        entries, documents, others = parse_files(self.read_blobs(blobs))
        for words, names in (("a file", links), ("an ApplicationDeployment", others)):
            for name in names[:MAX_NAMED]:
                log("info", f"ignored: not {words}", name=name)
        suspects = find_suspects(self.list_tree(base), listing, {*others}) if base else []
        passed = parse_files(self.read_blobs(suspects))[2]
        held = [name for name, _, _ in suspects if name not in passed]
        if held:
            raise Refused(f"{make_printable(held[0], 200)} held a deployment in the accepted commit, and is"
                          " none now, or lies below what is no folder; nothing is removed for that:"
                          " remove the file itself, or put it right")
        return entries, documents

    def list_tree(self, commit):
        """What `git ls-tree` prints of all that lies below git.path in a commit."""
        below = [self.settings.path + "/"] if self.settings.path else []
        return self.git("ls-tree -r -z -l --full-tree --", commit, *below).stdout

    def read_blobs(self, blobs):
        """Yields (name, bytes) of [(name, blob, size)]."""
        wanted = "".join(f"{blob}\n" for _, blob, _ in blobs).encode()
        limit = sum(size + 256 for _, _, size in blobs) + 1
        data = io.BytesIO(self.git("cat-file --batch", data=wanted, limit=limit).stdout)
        for name, blob, size in blobs:
            if data.readline() != f"{blob} blob {size}\n".encode():
                raise CommandError(f"git cat-file: blob {blob} cannot be read")
            yield name, data.read(size)
            data.readline()

    def put_capabilities(self, device_id, document):
        """Reports what this device can do: to wfm.status_url, else as capabilities.json on its branch."""
        if self.config.wfm.status_url:
            return self.connect_wfm().put_capabilities(device_id, document)
        self.push_file(device_id, "capabilities.json", document, "Capabilities")

    def delete_capabilities(self, device_id):
        """Deregisters this device; its branch stays, with its history."""
        if self.config.wfm.status_url:
            return self.connect_wfm().delete_capabilities(device_id)
        self.push_file(device_id, "capabilities.json", None, "Capabilities withdrawn")

    def post_status(self, deployment_id, document):
        """Reports a deployment's status.

        For a WFM, whose manifest versions are numbers, a commit is its first 48 bits.
        """
        report = dict(document)
        commit = report["commit"] = str(report.pop("adoptedManifestVersion"))
        if self.config.wfm.status_url:
            report["adoptedManifestVersion"] = int(commit[:12], 16) or 1
            return self.connect_wfm().post_status(deployment_id, report)
        self.push_file(document["deviceId"], f"deployments/{deployment_id}.json", report,
                       f"{deployment_id}: {document['status']['state']}")

    def connect_wfm(self):
        """The WFM at wfm.status_url, connected when there is something to report."""
        self.reporter = self.reporter or self.connect_reporter()
        return self.reporter

    def push_file(self, device_id, path, document, message):
        """Makes a document the content of a file on the device's branch by one commit on top of what is
        there, never over it.

        Who loses a race takes the other's commit as its base and tries again; None removes the file.
        """
        import json
        ref = f"refs/heads/status/{make_ref_path(device_id)}"
        content = b""
        if document:
            content = json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"
        if ref not in self.heads:
            self.fetch_head(ref)
        for _ in range(PUSH_ATTEMPTS):
            base = self.heads[ref]
            commit = self.work(lambda: self.save_commit(ref, base, path, content, message))
            if commit is None:
                return
            try:
                self.git("push --quiet --no-verify --no-follow-tags --", self.url, f"{commit}:{ref}",
                         timeout=PULL_TIMEOUT)
                self.heads[ref] = commit
                return
            except CommandError as error:
                if self.fetch_head(ref) == base:
                    raise self.ask_reason(error, "git-receive-pack") from None
        raise Unreachable(f"{ref} of {self.url} was moved {PUSH_ATTEMPTS} times while a status was written;"
                          " the next run tries again")

    def save_commit(self, ref, base, path, content, message):
        """A commit on `base` (None: the first) that changes one file, made without work tree or index.

        None where it is so.  content: b"" for no file.
        """
        self.prepare()
        old, parent = b"", ""
        if base:
            if not self.has(base):
                self.fetch(f"+{ref}:refs/margo/status", "--depth=1")
            old = self.git("cat-file blob", f"{base}:{path}", codes=(0, 128)).stdout
            parent = f"from {base}\n"
        if old == content:
            return None
        change = f"M 100644 inline {path}\ndata {len(content)}\n" if content else f"D {path}"
        head = ("commit refs/margo/next\nmark :1\n"
                f"committer margo-agent <margo-agent@localhost> {int(time.time())} +0000\n"
                f"data {len(message)}\n{message}\n{parent}{change}").encode()
        made = self.git("fast-import --quiet --force --done",
                        data=head + content + b"\nget-mark :1\ndone\n")
        return made.stdout.decode().strip()


def ask_ssh(address, timeout):
    """Whether an ssh server answers at a repository's address: then it is not the wire that is at fault."""
    from urllib.parse import urlsplit
    try:
        parts = urlsplit(address if address.startswith("ssh://") else "ssh://" + address.partition(":")[0])
        with open_connection((parts.hostname, parts.port or 22), timeout) as peer:
            return peer.recv(4) == b"SSH-"
    except (OSError, ValueError):
        return False


def make_git_environment(config, home, environ):
    """The whole environment of git: no configuration but that of `home`, no question asked, no unknown host
    (C-250).
    """
    from shlex import quote
    timeout = int(config.wfm.timeout) or 1
    ssh = (f"ssh -F /dev/null -oBatchMode=yes -oStrictHostKeyChecking=yes -oConnectTimeout={timeout}"
           f" -oServerAliveInterval={timeout}")
    if config.git.known_hosts:
        known = quote(f'-oUserKnownHostsFile="{config.git.known_hosts}"')
        ssh += f" -oGlobalKnownHostsFile=/dev/null {known}"
    if config.git.ssh_key:
        key = quote(f'-oIdentityFile="{config.git.ssh_key}"')
        ssh += f" -oIdentitiesOnly=yes {key}"
    fixed = dict(line.split("=") for line in GIT_VARIABLES.split())
    return dict(fixed, PATH=environ.get("PATH", ""), HOME=home, GIT_SSH_COMMAND=ssh,
                **get_temporary(config.state_dir, environ))


GIT_VARIABLES = """\
LC_ALL=C
GIT_CONFIG_NOSYSTEM=1
GIT_ATTR_NOSYSTEM=1
GIT_TERMINAL_PROMPT=0
GIT_SSH_VARIANT=ssh
GIT_LITERAL_PATHSPECS=1
GIT_NO_REPLACE_OBJECTS=1
"""
# All that git may do: its configuration, whatever the machine's is (C-250).
GIT_CONFIG = """\
[protocol]
	allow = never
[protocol "https"]
	allow = always
[protocol "ssh"]
	allow = always
[protocol "file"]
	allow = always
[core]
	hooksPath = /dev/null
	attributesFile = /dev/null
	bigFileThreshold = 8m
	deltaBaseCacheLimit = 4m
	packedGitLimit = 16m
	packedGitWindowSize = 1m
[pack]
	threads = 1
	windowMemory = 8m
	deltaCacheSize = 4m
[gc]
	auto = 0
[maintenance]
	auto = false
[credential]
	helper = ""
[transfer]
	bundleURI = false
[fetch]
	unpackLimit = 1
[http]
	followRedirects = false
	lowSpeedLimit = 1024
"""


def make_git_config(config, home):
    """The configuration that git finds in its home, as bytes."""
    folder = config.wfm.url.partition("file://")[2].rstrip("/")
    settings = [
        ("http", "lowSpeedTime", int(4 * config.wfm.timeout) or 1),
        ("http", "sslVersion", f"tlsv{config.wfm.min_tls}"),
        ("http", "sslCAInfo", config.identity.ca),
        ("http", "sslCAPath", config.identity.ca and os.path.join(home, "none")),
        ('gpg "ssh"', "allowedSignersFile", config.git.allowed_signers),
        # whoever owns it: the operator named it
        ("safe", "directory", folder),
        ("safe", "directory", folder and folder + "/.git")]
    return GIT_CONFIG.encode() + b"".join(f"[{section}]\n\t{key} = {make_quoted(str(value))}\n".encode()
                                          for section, key, value in settings if value)


def save_secret(header):
    """A file without a name from which git reads its credential; it goes with this process.

    So the credential is in no folder, environment or command line.
    """
    import tempfile
    file = tempfile.TemporaryFile()
    file.write(f"[http]\n\textraHeader = {make_quoted('Authorization: ' + header)}\n".encode())
    file.flush()
    return file


def load_git_header(git):
    """The Authorization of an https repository: bearer, or basic with git.username.

    None without a token (C-250, C-253).
    """
    if not git.token_file:
        return None
    token = load_secret("git.token_file", git.token_file, Untrusted).strip()
    if not re.fullmatch(rb"[!-~]+", token):
        raise Untrusted(f"git.token_file {git.token_file}: is not one line of printable characters")
    return make_authorization(token, git.username.encode() if git.username else None)


def make_ref_path(device_id):
    """A device id as a part of a ref.

    What Git allows no ref to have, such as a dot at the end, is spelt as in a URL.
    """
    return re.sub(r"~|\.(?=\.|/|$|lock(/|$))|(?<![^/])\.", lambda found: f"%{ord(found.group()):02X}",
                  device_id)


def parse_listing(listing):
    """Yields (name, whether it is a file, blob, size) of what `git ls-tree -r -z -l` prints.

    Names are as those of a file system.  Raises Refused for a name that none takes, CommandError for what git
    never prints.
    """
    pattern = r"(100[0-7]{3} blob|[0-7]{6} [a-z]+) ([0-9a-f]+) +(?:-|([0-9]{1,18}))\t(.+)"
    for line in listing.decode("utf-8", "surrogateescape").split("\0")[:-1]:
        match = re.fullmatch(pattern, line, re.S)
        if not match:
            raise CommandError(f"git ls-tree printed {make_printable(line, 200)}")
        kind, blob, size, name = match.groups()
        if len(name) > MAX_PATH:
            raise Refused(f"{make_printable(name, 200)} is a path of more than {MAX_PATH} characters")
        yield name, kind.startswith("100"), blob, int(size or 0)


def find_blobs(listing, max_document):
    """([(name, blob, size)] of the YAML files, [name] of links and submodules) in what `git ls-tree` prints.

    Raises Refused.
    """
    blobs, ignored = [], []
    for name, is_file, blob, size in parse_listing(listing):
        if not name.lower().endswith((".yaml", ".yml")):
            continue
        if not is_file:
            ignored.append(name)
        elif size > max_document:
            raise Refused(f"{make_printable(name, 200)}: {size} bytes are more than policy.max_document"
                          f" ({max_document})")
        else:
            blobs.append((name, blob, size))
        if len(blobs) + len(ignored) > MAX_DEPLOYMENTS:
            raise Refused(f"there are more than {MAX_DEPLOYMENTS} YAML files; set git.path")
    return blobs, ignored


def find_suspects(before, after, others):
    """[(name, blob, size)] of YAML files of the accepted commit whose place holds something else now.

    before, after: what `git ls-tree` prints of both commits; others: YAML files that hold no deployment now.
    Something else is one of those, a link, a submodule, a folder of that name, or any of them in place of a
    folder above.  All that meets a name is beside it where names are sorted, because no path lies in another.
    """
    from bisect import bisect_left
    good = {name + "/": is_file and name not in others for name, is_file, _, _ in parse_listing(after)}
    keys = sorted(good)
    found = []
    for blob in find_blobs(before, float("inf"))[0]:
        key = blob[0] + "/"
        place = bisect_left(keys, key)
        beside = keys[max(0, place - 1):place + 1]
        met = [other for other in beside if key.startswith(other) or other.startswith(key)]
        if met and not good.get(key):
            found.append(blob)
    return found


def parse_files(files):
    """[(name, bytes)] to ([ManifestEntry], {digest: bytes}, [name of what is no ApplicationDeployment of any
    generation]).

    Raises Refused for what nobody can have meant: it may stand for a deployment that would be removed.
    """
    entries, documents, ignored, seen = [], {}, [], {}
    for name, data in files:
        shown = make_printable(name, 200)
        try:
            value = parse_file(data)
            if value is None:
                ignored.append(name)
                continue
            deployment_id = parse_document(value)[0].get("id")
            check_shape(deployment_id, UUID_PATTERN, "id")
        except ValueError as error:                 # a YAMLError is one
            raise Refused(f"{shown}: {error}") from None
        if deployment_id.lower() in seen:
            raise Refused(f"{shown}: deployment {deployment_id} is in {seen[deployment_id.lower()]}, too")
        seen[deployment_id.lower()] = shown
        digest = sha256_digest(data)
        documents[digest] = data
        entries.append(ManifestEntry(deployment_id, digest, len(data)))
    return entries, documents, ignored


def parse_file(data):
    """The value of a YAML file that is meant as an ApplicationDeployment, None of any other.

    It says so, or is built as rc.3 has it, which does not say.  Raises ValueError where it holds something
    that stands for another file, or for nothing.
    """
    if not data.strip():
        raise ValueError("it is empty; to remove a deployment, remove its file")
    value = load_yaml(data)
    if not isinstance(value, (dict, list, type(None))):
        raise ValueError("it is bare text, as a pointer of Git LFS, a link that became a file, or an"
                         " encrypted file is")
    if not isinstance(value, dict):
        return None
    if "sops" in value:
        raise ValueError("it is encrypted by SOPS; commit what the agent can read")
    named = value.get("kind") in ("ApplicationDeployment", "ApplicationDeploymentManifest")
    built = isinstance(value.get("spec"), dict) and "deploymentProfile" in value["spec"]
    if built and not named and {"kind", "apiVersion"} & value.keys():
        raise ValueError(f"kind: found {value.get('kind')!r}, expected 'ApplicationDeployment'")
    return value if built or named else None


class Git(Profile):
    """Profile git: a repository, which knows no other identity of a device than its credentials."""

    settings = ("wfm.url",)
    https = False

    @classmethod
    def check_settings(cls, config, suffix=""):
        faults = super().check_settings(config)
        if config.wfm.status_url:
            faults += Mtls.check_settings(config, " with wfm.status_url")
        return faults

    def connect(self, keep=True):
        """See Profile.

        With a home in the state directory, or where nothing is kept, in one that goes with the source.
        """
        config, store, state = self.config, self.store, self.state
        check_enrollment(state, config.wfm.url)
        header = load_git_header(config.git)
        home = store.path("git")
        temporary = None
        if not keep:
            import tempfile
            temporary = tempfile.TemporaryDirectory(prefix="margo-git-")
            home = temporary.name
        create_folder(os.path.join(home, "none"))
        path = os.path.join(home, ".gitconfig")
        content = make_git_config(config, home)
        if read_file(path, MAX_ANSWER) != content:
            write_file(path, content)
        wfm = Settings(config, wfm=Settings(config.wfm, url=config.wfm.status_url))
        reporter = Mtls(wfm, store, state)
        source = GitSource(config, home, header, lambda: reporter.connect(keep, config.wfm.url))
        source.temporary = temporary
        return source

    def describe(self, now):
        return {"id": self.config.wfm.url, "notAfter": "", "warning": ""}

    def check(self, now):
        """Whether git and the credentials are there, and are for nobody else to read.

        Raises ConfigError, Untrusted.
        """
        version = run_command(["git", "version"], 30).stdout.decode("utf-8", "replace").strip()
        load_git_header(self.config.git)
        for key in ("token_file", "ssh_key"):
            path = self.config.git[key]
            if path:
                load_secret(f"git.{key}", path, Untrusted)
                loose = ask_looseness(f"git.{key}", path)
                if loose:
                    return "warn", loose
        return "ok", version

    def identify(self):
        """The part of the repository that it follows."""
        return f"{self.config.wfm.url}#{self.config.git.branch}:{self.config.git.path}"


PROFILES["git"] = Git
TRACES.append("git")


# ----------------------------------------------------------------------------------------------------------
# 28. Enrollment (optional)
# ----------------------------------------------------------------------------------------------------------

# Enrollment and renewal over EST (RFC 7030), by the draft "MIAF Enrollment, Renewal, and Revocation Profile".
EST_FIELD = "estBaseUri"
CSR_TYPE, CERTS_TYPE = "application/pkcs10", "application/pkcs7-mime"
RENEWAL_WINDOW = 0.40, 0.60         # share of an SVID's lifetime after which it is renewed (E-061)
EST_FIRST, EST_CAP = 60, 3600       # seconds between attempts (E-062)
MAX_ISSUED = 32                     # certificates in one EST answer
MAX_PATHS = 16                      # ways from a leaf upwards that are tried

Pending = define_fault("Pending", 3, "UNREACHABLE", "A request for an SVID waits for its decision.", Silence)
NotRenewed = define_fault("NotRenewed", 3, "NOT_RENEWED", "The own SVID, still good, could not be renewed.")


SCHEMA["identity"].update({
    "enrollment": (choice("off", "est"), "off", "est: SVIDs are obtained and renewed over EST (draft)"),
    "est": {
        "url": (read_root_url, None, "EST server; without it the one that the discovery document names"),
        "token_file": (read_path, None, "file of the token for the first SVID, mode 0600"),
        "certificate": (read_path, None, "certificate for the first SVID, in place of a token"),
        "key": (read_path, None, "private key of that certificate, mode 0600"),
    },
})


def check_est_settings(config):
    """What only enrollment by EST has: [(whether it is wrong, key, words)]."""
    settings, est = config.identity, config.identity.est
    if settings.enrollment != "est":
        return []
    files = [settings.key, settings.certificate]
    return [
        (config.wfm.profile != "mtls", "identity.enrollment",
         "est gives an SVID, which only wfm.profile mtls uses"),
        (not est.url and not settings.discovery,
         "identity.est.url", "not set, and no identity.discovery either; one of them says where to enroll"),
        ({bool(est.certificate), bool(est.key)} != {not est.token_file},
         "identity.est", "either token_file, or certificate and key; found both, neither or a half"),
        (all(files) and len(set(map(os.path.normpath, files))) == 1,
         "identity.key", "found the file of identity.certificate, expected one of its own, because a renewal"
         " replaces the certificate alone")]


CHECKS.append(check_est_settings)


def parse_est_uri(members, document_url, public):
    """Where to enroll, or None, from the members of a discovery document; raises ValueError (E-092)."""
    if EST_FIELD not in members:
        return None
    return parse_discovered(EST_FIELD, read_root_url, members, document_url, public)


STATE["est"] = dict(WAIT, **{"token?": str, "used?": str, "key+": str, "answer+": str, "refused?": str})
COMPANIONS["est"] = Companion(
    "place to enroll", lambda config: config.identity.enrollment == "est", parse_est_uri, lambda state: [],
    remark=lambda state, now: state["est"].get("refused") or "")


def make_renewal_time(leaf):
    """When a certificate is due for renewal, Unix seconds (E-061, E-065).

    It is drawn by the certificate's digest, so once and for all, whatever restarts.
    """
    first, last = RENEWAL_WINDOW
    share = first + (last - first) * int(sha256_digest(leaf.der)[7:15], 16) / 16 ** 8
    return leaf.not_before + share * (leaf.not_after - leaf.not_before)


def find_est_step(est, leaf, fault, token, clock, silent=False, asked=False, strays=False):
    """What is to be done about the own SVID now: "" nothing, "renew" or "enroll".

    est: the state's record.  leaf: the own Certificate, or None.  fault: why it cannot be used, "" where it
    can.  token: digest of the token at hand, "" for the form by certificate, None where there is neither.
    silent: downtime wants no request.  asked: `enroll` asks, which uses a fresh token although the SVID is
    good (F-35).  strays: the SVID does not lead to the trust bundle any more.  Raises Untrusted where only an
    operator can help, Silence where there is no SVID and none is asked for yet.
    """
    now = clock.now
    wait = find_wait(est, clock)
    fresh = token if token != est.get("used") else None
    issued = "answer" in est
    begun = est.get("token") and not est.get("refused") and (issued or fresh == est["token"])
    enrolling = fault or begun or asked and fresh
    if not enrolling and not issued and not strays and now < make_renewal_time(leaf):
        return ""
    if fault and leaf and now < leaf.not_before:
        raise Untrusted(fault)                      # the clock: a new SVID would not help
    if fault and fresh is None and not issued:
        raise Untrusted(f"{fault}; a fresh enrollment token in identity.est.token_file is needed, or a chain"
                        " for the request of `margo_agent.py csr`")
    if enrolling and fresh not in (None, est.get("token")):
        wait = 0
    if fault and wait and est.get("refused"):
        raise Untrusted(f"{est['refused']}; asked again within an hour, or at once with another token")
    if fault and (wait or silent):
        raise Silence("waiting for as long as the identity service, a back-off or downtime asks",
                      retry_after=wait, exit=3 if wait else 0)
    if wait or silent:
        return ""
    return "enroll" if enrolling else "renew"


class Enrollment:
    """The own SVID, obtained and renewed over EST.

    What is under way stands in the state's record `est`: the digests of `token` and `key` before they are
    used, then the `answer` as it came.  One rename activates the chain made from it.  So wherever a run ends,
    the next one goes on from there, with the same key, and never without the old SVID.
    """

    def __init__(self, config, store, state, asked):
        self.config, self.store, self.state, self.asked = config, store, state, asked
        self.settings = config.identity
        self.clock = get_clock()
        if asked and self.est.get("failures"):
            self.est["delay"] = 0  # somebody asks for it now; what the service asked for is still waited for

    @property
    def est(self):
        """The state's record."""
        return self.state["est"]

    def keep(self, **members):
        """Makes members of the record durable."""
        self.est.update(members)
        self.store.save_state(self.state)

    def tend(self):
        """Enrolls or renews where that is due.

        Raises Unreachable or Untrusted where there is no SVID to work with, else NotRenewed.
        """
        if not os.path.exists(self.settings.key):
            self.est.pop("answer", None)            # the key that it is for is lost
        leaf, fault = self.load_leaf()
        mark = self.load_mark() if fault or self.asked or "token" in self.est else None
        strays = bool(leaf) and self.state["trust"].get("strays") == sha256_digest(leaf.der)
        now, downtime = self.clock.now, self.config.poll.downtime
        end = float("inf") if fault else leaf.not_after
        # an SVID that would end in downtime is renewed all the same
        silent = is_within_whole(downtime, now, now) and (
            fault or not is_within_whole(downtime, now, leaf.not_after))
        step = find_est_step(self.est, leaf, fault, mark, self.clock, silent, self.asked, strays)
        if not step:
            return
        note_draft(self.store, self.state, "enrollment over EST")
        try:
            self.obtain(leaf, leaf if step == "renew" else None, mark)
        except (Unreachable, Untrusted, Refused, CommandError) as error:
            self.note_fault(error, end)
            if fault:
                raise
            words = f"the own SVID, good until {make_time(leaf.not_after)}, is not renewed yet: {error}"
            if not self.asked:
                raise NotRenewed(words) from None
            log("warning", words)
            return
        self.state["patience"] = {}                 # what the WFM thought of the old SVID no longer counts
        self.finish()

    def load_leaf(self):
        """(the own leaf or None, why it cannot be used or "")."""
        settings, leaf = self.settings, None
        try:
            leaf = load_identity(self.config).leaf
            load_identity(self.config, self.clock.now)
            if not os.path.exists(settings.key):
                raise Untrusted(f"identity.key {settings.key}: the key is lost")
            if "token" in self.est:                 # the key may be one for the next SVID
                load_key_pair(make_tls_context(), settings.certificate, settings.key)
        except Untrusted as error:
            return leaf, error.message
        return leaf, load_flaw(self.store, self.state, leaf)

    def load_token(self):
        """The enrollment token's bytes, None where there is none any more."""
        path = self.settings.est.token_file
        data = read_file(path, 4 * KIB) if path else None
        return data and data.rstrip(b"\r\n")

    def load_mark(self):
        """What find_est_step calls token."""
        if self.settings.est.certificate:
            return ""
        token = self.load_token()
        return token and sha256_digest(token)

    def load_authorization(self):
        """The token as HTTP Basic (E-033); raises Untrusted for what cannot be one."""
        path = self.settings.est.token_file
        loose = ask_looseness("identity.est.token_file", path)
        user, _, secret = (self.load_token() or b"").partition(b":")
        if not secret or b"\n" in user + secret:
            raise Untrusted(f"identity.est.token_file {path}: expected one line, user:secret; ask for a token"
                            " and put it there")
        if loose:
            log("warning", "others can read the enrollment token", reason=loose)
        return make_authorization(secret, user)

    def note_fault(self, error, end):
        """Keeps the back-off that follows from a fault (E-045, E-062).

        end: when the SVID in use expires; another attempt has to fit before that, whatever the service asks
        (case 4.14).
        """
        record = self.est
        refused = isinstance(error, Untrusted)
        asked = error.retry_after or 0
        delay = EST_CAP if refused else grow(EST_FIRST, record.get("failures", 0) + 1, EST_CAP)
        delay *= 1 - get_random() / 2
        if isinstance(error, Pending):
            log("info", error.message)
            record = {"failures": -1}               # it is none
            delay = 0 if asked else EST_FIRST
        left = end - self.clock.now
        wait = make_wait(record, max(min(asked, left / 2), min(delay, left / 4)), self.clock)
        self.keep(refused=error.message if refused else None, **wait)

    def finish(self):
        """Clears up after an activation: the token is erased, and never sent again (E-044)."""
        used = self.est.get("token") or self.est.get("used")
        mark = self.load_mark()
        if mark and mark == used and not remove_file(self.settings.est.token_file):
            log("warning", "the enrollment token has served and cannot be erased; remove it",
                path=self.settings.est.token_file)
        self.state["est"] = {"used": used}
        self.store.save_state(self.state)

    def obtain(self, old, renewed, mark):
        """Goes from wherever an enrollment or renewal stands to its end: request, answer, chain, activation.

        old: the own leaf, whatever its state, or None.  renewed: the same where it is renewed, else None.
        """
        domain = make_identity(old).spiffe_id.trust_domain if old else None
        # a rotation may be under way, and discovery says where to enroll
        bundle = obtain_trust_bundle(self.config, self.store, self.state, domain, self.clock.now, anew=True)
        if "answer" not in self.est:
            self.post_request(renewed, mark)
        leaf, issued = self.load_answer(renewed)
        if old and old.der == leaf.der:
            return                                  # an earlier run ended just after it had activated it
        chain = self.obtain_chain(leaf, issued, bundle)
        own = make_identity(leaf)
        if renewed:                                 # the WFM has to answer a conditional GET by it first
            with lend_file(chain.encode()) as file:
                config = Settings(self.config, identity=Settings(self.settings, certificate=file.name))
                source = Mtls(config, self.store, self.state).open_source(own, bundle, keep=False)
            source.fetch_manifest((self.state["accepted"] or {}).get("etag"))
        write_file(self.settings.certificate, chain.encode(), 0o644)
        log("info", "new SVID", id=own.spiffe_id.text, notAfter=make_time(leaf.not_after),
            renewal=make_time(make_renewal_time(leaf)))

    def find_url(self, operation):
        """The URL of an EST operation; raises Untrusted where nobody says where to enroll."""
        url = self.settings.est.url or self.state["trust"].get("est")
        if not url:
            raise Untrusted(f"identity.discovery {self.settings.discovery} names no {EST_FIELD}, and"
                            " identity.est.url is not set")
        return f"{url}/{operation}"

    def post_request(self, renewed, mark):
        """Asks for an SVID, and makes the answer durable before anything else (E-042, E-043)."""
        import base64
        settings = self.settings
        headers = {"Content-Type": CSR_TYPE, "Accept": CERTS_TYPE}
        url = self.find_url("simplereenroll" if renewed else "simpleenroll")
        # a fresh context: with the token no certificate is presented (E-034)
        context, check_peer = obtain_mis_context(self.config, url)
        if renewed:
            load_key_pair(context, settings.certificate, settings.key)
            body = run_renewal_csr(renewed, settings.key)
        else:
            if settings.est.certificate:
                load_key_pair(context, settings.est.certificate, settings.est.key, "identity.est")
            else:
                headers["Authorization"] = self.load_authorization()
            body = self.begin(mark)
        log("info", "asking for an SVID", url=url)
        response = request("POST", url, headers, base64.encodebytes(body), context, self.config.wfm.timeout,
                           MAX_CERTIFICATES, check_peer)
        self.keep(answer=make_base64(judge_est_response(response, url, time.time())))

    def begin(self, mark):
        """The first request (DER); the token and the key that go together are durable then.

        Raises Untrusted for a token that went with another key before.
        """
        path = self.settings.key
        if self.est.get("token") != mark:
            self.state["est"] = {"token": mark, "used": self.est.get("used")}
            # first: a new key beside an old certificate is then no broken pair
            self.store.save_state(self.state)
        obtain_key(path)
        key = sha256_digest(load_public_key(path))
        if self.est.get("key", key) not in (key, "none yet"):       # this word is of an older agent
            raise Untrusted("the enrollment token was used with a key that is lost; a fresh token is needed")
        self.keep(key=key)
        return run_csr(path, "DER")

    def load_answer(self, renewed):
        """(the own leaf, [every Certificate]) of what was issued; raises Untrusted.

        An answer that will never do is dropped, so that the next attempt asks anew.
        """
        try:
            issued = load_certificates(parse_base64(self.est["answer"]))
            spki = load_public_key(self.settings.key)
            leaf = find_issued(issued, spki, renewed, self.state["trust"].get("trustDomain"))
            check_validity(leaf, max(time.time(), leaf.not_before))      # one that begins later may still do
            return leaf, issued
        except ValueError as error:
            del self.est["answer"]
            raise Untrusted(f"the certificate that EST issued is refused: {error}") from None

    def obtain_chain(self, leaf, issued, bundle):
        """The chain (PEM) from an issued leaf to the trust bundle; raises Untrusted, Unreachable."""
        ahead = leaf.not_before - time.time()
        if 0 < ahead <= CLOCK_SKEW:
            raise Pending(f"the SVID issued begins at {make_time(leaf.not_before)}, by a clock that is ahead"
                          " of ours", retry_after=ahead + 1)
        response = fetch_from_mis(self.find_url("cacerts"), self.config, {"Accept": CERTS_TYPE})     # E-039
        try:
            check_validity(leaf, time.time())
            found = load_certificates(judge_est_response(response, "cacerts", time.time()))
            return run_paths(leaf, found + issued, self.settings.key, bundle.anchors)
        except ValueError as error:
            raise Untrusted(f"the SVID issued does not lead to the trust bundle: {error}") from None


def run_renewal_csr(leaf, key_file):
    """A PKCS#10 request (DER) that repeats subject and subjectAltName of the SVID byte for byte (E-063).

    `openssl req` would encode them again.
    """
    spki = load_public_key(key_file)
    algorithm = b"\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02"                 # ecdsa-with-SHA256
    if b"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01" in spki[:40]:  # an RSA key
        algorithm = b"\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0b\x05\0"
    extension_request = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x09\x0e"
    attribute = make_der(0x30, extension_request, make_der(0x31, make_der(0x30, leaf.alt_names)))
    content = make_der(0x30, b"\x02\x01\x00", leaf.subject, spki, make_der(0xA0, attribute))
    signature = run_openssl("dgst -sha256 -sign", key_file, data=content)
    return make_der(0x30, content, algorithm, make_der(0x03, b"\0", signature))


def judge_est_response(response, operation, now):
    """The body of a 200 (the draft's 3.3).

    Raises Pending for 202, Unreachable for what passes, Untrusted for a refusal.
    """
    if response.status == 202:                      # E-037
        raise Pending("the identity service has accepted the request and has not decided yet",
                      retry_after=parse_retry_after(response.headers.get("Retry-After"), now))
    try:
        denial = "ask for a fresh token, and put it into identity.est.token_file"
        return check_response(response, operation, now, denial).body
    except (Refused, Untrusted) as error:
        refusal = "" if operation.endswith("cacerts") else "enrollment authorization refused: "
        raise Untrusted(refusal + error.message, retry_after=error.retry_after) from None


def load_certificates(body):
    """The Certificates of a certs-only answer: base64 with any white space, DER, or PEM (E-038).

    openssl takes it apart, because some servers write BER.  Raises ValueError.
    """
    text = re.sub("-----(BEGIN|END) PKCS7-----", "", body.decode("ascii", "replace"))
    try:
        data = body if body[:1] == b"\x30" else parse_base64(text)
        found = parse_pem(run_openssl("pkcs7 -inform DER -print_certs", data=data))
    except (ValueError, CommandError):
        raise ValueError("EST answered 200 with something else than certificates:"
                         f" {make_printable(text, 100)!r}") from None
    if len(found) > MAX_ISSUED:
        raise ValueError(f"it holds more than {MAX_ISSUED} certificates")
    return [parse_certificate(der) for der in found]


def find_issued(certificates, spki, renewed, trust_domain):
    """The leaf among issued Certificates.

    Raises ValueError unless it is for the own public key, of a client, and no other than before.
    renewed: the leaf that it renews, or None.  trust_domain: as discovery says, or None.
    """
    leaf = next((item for item in certificates if item.spki == spki), None)
    if leaf is None:
        raise ValueError(f"none of the {len(certificates)} certificates issued is for the own key")
    own = make_identity(leaf).spiffe_id
    if trust_domain not in (None, own.trust_domain):
        raise ValueError(f"the SVID issued is of trust domain {own.trust_domain}, the discovery document says"
                         f" {trust_domain}")
    if renewed and own.text != renewed.uris[0]:                                                     # E-067
        raise ValueError(f"the SVID issued is {own.text}, the one to be renewed is {renewed.uris[0]}")
    if renewed and leaf.der != renewed.der and leaf.not_after <= renewed.not_after:
        raise ValueError("the SVID issued ends no later than the one that it renews")
    return leaf


def find_paths(chain, candidates):
    """Every way [Certificate] from a chain upwards, one after the other (E-039); roots are left out."""
    above = []
    if len(chain) < 10:
        above = [item for item in candidates if is_issued(chain[-1], item.subject, item.key)
                 and item.subject != item.issuer and item not in chain]
    for item in above:
        yield from find_paths(chain + [item], candidates)
    if not above:
        yield chain


def run_paths(leaf, certificates, key_file, anchors):
    """The first chain (PEM) that leads to one of the anchors; raises ValueError: why the first one does not.

    A CA may have several certificates, of which one has ended, or is by a CA that the bundle does not know
    (F-15).
    """
    from itertools import islice
    fault = None
    candidates = list({item.der: item for item in certificates if item.is_ca}.values())
    for path in islice(find_paths([leaf], candidates), MAX_PATHS):
        pem = make_pem(item.der for item in path)
        try:
            with lend_file(pem.encode()) as file:
                run_own_handshake(file.name, key_file, anchors)
            return pem
        except ValueError as error:
            fault = fault or error
    raise fault


def tend_identity(agent):
    """Enrolls or renews where the configuration wants that automated and it is due (E-060)."""
    if agent.config.identity.enrollment == "est":
        Enrollment(agent.config, agent.store, agent.state, agent.asked).tend()


def examine_renewal(agent):
    """When the own SVID will be renewed, and whether a token waits for `enroll`."""
    if agent.config.identity.enrollment != "est":
        return "ok", ""
    try:
        leaf = load_identity(agent.config).leaf
    except Untrusted:
        return "ok", ""                             # the check of the identity says it
    path = agent.config.identity.est.token_file
    words = f"renewed over EST (draft) after {make_time(make_renewal_time(leaf))}"
    if path and os.path.exists(path):
        return "warn", f"{words}; the token in {path} has not served, `enroll` uses it"
    return "ok", words


TRACES.extend(("issued.p7", "issued.pem", "issued.key"))        # of an older agent
STEPS.insert(0, tend_identity)
EXAMINE["renewal"] = examine_renewal


# ----------------------------------------------------------------------------------------------------------
# 29. Revocation (optional)
# ----------------------------------------------------------------------------------------------------------

# Revocation lists, by the draft "MIAF Enrollment, Renewal, and Revocation Profile": signed by the issuer
# of the SVIDs that they list, named by the discovery document alone.
CRL_FIELD = "crlUris"
OID_CRL_NUMBER, OID_CRL_SCOPE = b"\x55\x1d\x14", b"\x55\x1d\x1c"
MAX_LISTS = 32                      # that a discovery document may name
CRL_PERIOD = 43200                  # seconds after which a list is asked for again, up to twice that (E-082)
CRL_FIRST, CRL_CAP = 60, 3600       # seconds between attempts at a list that cannot be had

Crl = define("Crl", "issuer issuer_key this_update next_update serials number",
    "What is used of a revocation list: raw name, identifier of its issuer's key or None, Unix seconds, the"
    " serial numbers that it lists, its own number.")

SCHEMA["identity"]["revocation"] = (choice("off", "soft", "require"), "soft",
                                    "whether lists of revoked certificates are asked for, or needed (draft)")


def parse_crl(data):
    """A revocation list (DER or PEM) to (DER, Crl).

    Raises ValueError, also for one of a kind that is not understood (E-085).
    """
    try:
        der = parse_pem(data, "X509 CRL")[0] if data[:1] == b"-" else data
        fields = parse_signed(der)
        times = [parse_der_time(*field[:2]) for field in fields[3:5]]
        listed = fields[5][1] if fields[5][0] == 0x30 else b""
        serials = {int.from_bytes(parse_der(entry)[0][1], "big", signed=True)
                   for _, entry, _ in walk_der(listed)}
        extensions = parse_extensions(fields[5:], 0xA0)
        number = parse_der(extensions[OID_CRL_NUMBER][1])[0][1]
        if len(number) > 21:
            raise ValueError("its number has more than 20 octets")
        kinds = {tag for tag, _, _ in parse_der(open_extension(extensions, OID_CRL_SCOPE) or b"")}
        crl = Crl(fields[2][2], find_issuer_key(extensions), *times, serials, int.from_bytes(number, "big"))
    except (IndexError, ValueError, KeyError) as error:
        raise ValueError(f"no revocation list with a CRL number ({type(error).__name__}: {error})") from None
    known = (OID_ISSUER_KEY, OID_CRL_NUMBER, OID_CRL_SCOPE)
    strange = [oid.hex() for oid, (critical, _, _) in extensions.items() if critical and oid not in known]
    # a name, and only user certificates, concern every leaf
    if strange or kinds - {0xA0, 0x81}:
        raise ValueError(f"a list of a kind that is not understood (critical {strange or 'scope'})")
    return der, crl


def find_lists(leaf, crls):
    """Those of some Crls that are by the issuer of a leaf."""
    return [crl for crl in crls if is_issued(leaf, crl.issuer, crl.issuer_key)]


def is_revoked(leaf, crls):
    """Whether one of the lists by the leaf's issuer lists it, whatever the list's age (E-083)."""
    return any(leaf.serial in crl.serials for crl in find_lists(leaf, crls))


def find_list_fault(state, now):
    """Which of the revocation lists that discovery named says nothing of today, "" where all do (E-088)."""
    for url, record in state["crls"].items():
        if not record.get("digest"):
            return f"the revocation list {url} could not be had yet"
        end = record["thisUpdate"] + record["validity"]
        if now > end:
            return f"the revocation list {url} ended at {make_time(end)}"
    return ""


def load_crls(store, state):
    """{URL: Crl} of the verified lists at hand; one that the disk spoilt is a loss that the log tells of."""
    found = {}
    for url, record in state["crls"].items():
        digest = record.get("digest")
        data = read_file(store.path("crls", digest[7:]), 1024 * MIB) if digest else None
        if data and sha256_digest(data) == digest:
            found[url] = parse_crl(data)[1]
        elif digest:
            log("error", "security: a revocation list at hand is lost; an older one could now pass for the"
                " newest", url=url)
    return found


def refresh_revocation(config, store, state, source=None):
    """Fetches the revocation lists that are due (E-081, E-082); a fault of one is a line in the log.

    source: the MtlsSource, whose chain may hold the issuer of a list, or None.
    """
    records = state["crls"]
    clock = get_clock()
    listed = state["trust"].get("crls") or []
    if config.identity.revocation == "off" or not (listed or records):
        return
    create_folder(store.path("crls"))
    for url in listed:
        note_draft(store, state, "revocation lists")
        record = records.setdefault(url, {})
        if find_wait(record, clock):
            continue
        try:
            fetch_crl(config, store, state, url, source, clock.now)
            left = record["validity"] - (clock.now - record["thisUpdate"])
            delay = max(1, min(CRL_PERIOD * (1 + get_random()), left / 2))
            record.update(make_wait({"failures": -1}, delay, clock))
        except (MargoError, ValueError) as error:
            delay = (1 - get_random()) * grow(CRL_FIRST, record.get("failures", 0) + 1, CRL_CAP)
            record.update(make_wait(record, max(getattr(error, "retry_after", None) or 0, delay), clock))
            log("warning", "a revocation list cannot be had; what is at hand stays", url=url,
                reason=str(error))
    for url in set(records) - set(listed):
        if clock.now > records[url].get("thisUpdate", 0) + records[url].get("validity", 0):
            del records[url]
    store.save_state(state)                         # first what counts, then the old files go
    keep = {record.get("digest", "")[7:] for record in records.values()}
    for name in set(os.listdir(store.path("crls"))) - keep:
        remove_file(store.path("crls", name))


def fetch_crl(config, store, state, url, source, now):
    """One list from its URL to the disk, once it is verified (E-084 to E-086).

    Raises ValueError, MargoError.
    """
    records = state["crls"]
    record = records[url]
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s#]*)?", url):
        raise ValueError("the discovery document names it, and it is no http or https URL")
    held = url in load_crls(store, state)
    headers = {"Accept": "*/*"}
    if held and record.get("etag"):
        headers["If-None-Match"] = record["etag"]
    response = fetch_from_mis(url, config, headers, config.policy.max_document)
    if response.status == 304 and held:
        return
    check_response(response, url, now)
    der, crl = parse_crl(response.body)
    if crl.this_update > now + CLOCK_SKEW:
        raise ValueError(f"it begins at {make_time(crl.this_update)}; is the clock of this device right?")
    key = sha256_digest(ask_signer(der, crl, load_issuers(config, store, source)).spki)
    # of that issuer, wherever it came from
    newest = max((item["number"] for item in records.values() if item.get("key") == key), default=0)
    if crl.number < newest:
        raise ValueError(f"security: its number went back from {newest} to {crl.number}")
    # a list of another issuer takes nothing from what is held of this one
    if record.get("key") not in (None, key):
        records[f"{url}#{record['key'][7:23]}"] = dict(record)
    if not held or record["key"] != key or crl.number > record["number"]:
        digest = sha256_digest(der)
        write_file(store.path("crls", digest[7:]), der)         # it counts once the state names it
        record.update(digest=digest, number=crl.number, key=key, thisUpdate=crl.this_update,
                      validity=crl.next_update - crl.this_update)
    record["etag"] = response.headers.get("ETag")


def load_issuers(config, store, source):
    """The Certificates that may have signed a list: anchors, the own chain and the WFM's (E-084).

    Where what is above the WFM's leaf was not seen yet, it is looked at.  Only what signed the leaf counts,
    because a chain may not have been verified.
    """
    held = load_trust_bundle(config, store)
    own = read_file(config.identity.certificate, MAX_CERTIFICATES) or b""
    ders = (held.anchors if held else []) + parse_pem(own)
    if source:
        chain = source.chain
        if len(chain) < 2:
            chain = ask_chain(source.url, source.context, config.wfm.timeout)
        leaf = make_pem(chain[:1]).encode()
        command = "verify -partial_chain -trusted /dev/stdin"
        ders += [der for der in chain[1:] if ask_signed(command, leaf, der)]
    return [parse_certificate(der) for der in ders]


def ask_signed(command, data, issuer):
    """Whether a command of openssl, with a file of `data` at its end, finds that signed by an issuer's key.

    issuer: its certificate (DER).
    """
    with lend_file(data) as file:
        try:
            # the exit code says it in no old version
            run_openssl(command, file.name, data=make_pem([issuer]).encode(), expected=b"OK")
        except CommandError:
            return False
    return True


def ask_signer(der, crl, issuers):
    """The one among issuers that may sign lists and has signed this one; openssl says it.

    Raises ValueError where there is none.
    """
    command = "crl -inform DER -noout -verify -CAfile /dev/stdin -in"
    for item in issuers:
        may = item.key_usage is None or CRL_SIGN in item.key_usage
        if may and is_issued(crl, item.subject, item.key) and ask_signed(command, der, item.der):
            return item
    raise ValueError("no issuer that is known, and may sign lists, has signed it")


def load_judge(config, store, state, source, keep):
    """A function (leaf, now) that raises Untrusted for a WFM's leaf by the lists at hand (E-083, E-087).

    By `require` they are fetched before anything is said.
    """
    mode = config.identity.revocation
    if mode == "require" and keep:
        refresh_revocation(config, store, state, source)
    crls = list(load_crls(store, state).values()) if mode != "off" else []
    if is_revoked(source.identity.leaf, crls):
        log("error", "the own SVID is revoked; the WFM will refuse it, have a new one issued",
            id=source.client_id)

    def judge(leaf, now):
        if is_revoked(leaf, crls):
            raise Untrusted("the peer's certificate is revoked by who issued it; whoever runs that server has"
                            " to have a new one")
        ends = [crl.next_update for crl in find_lists(leaf, crls)]
        if mode == "off" or ends and now <= max(ends):
            return
        fault = (f"the revocation list ended at {make_time(max(ends))}" if ends else
                 find_list_fault(state, now) or "the trust domain names no revocation list by its issuer")
        if mode == "require":
            raise Untrusted("the WFM's revocation status is not known, and identity.revocation is require:"
                            f" {fault}")
        if crls or state["trust"].get("crls"):
            log("warning", "the WFM's revocation status is not known", reason=fault)
    return judge


def parse_crl_uris(members, *_):
    """[URL of a list] from a discovery document; what is none fails where it is asked for (E-080)."""
    listed = members.get(CRL_FIELD) or []
    listed = listed if isinstance(listed, list) else [repr(listed)]
    return [str(uri)[:2000] for uri in listed[:MAX_LISTS]]


def load_own_flaw(store, state, leaf):
    """Why the own leaf is of no use to the WFM, "" where it is."""
    revoked = is_revoked(leaf, load_crls(store, state).values())
    return "the own SVID is revoked; have a new one issued" if revoked else ""


def examine_lists(agent):
    """Whether the revocation lists say something of today."""
    fault = find_list_fault(agent.state, time.time())
    if fault:
        return "warn", fault
    count = len(agent.state["crls"])
    return "ok", f"{count} revocation lists (draft)" if count else ""


def refresh_after_poll(agent):
    """Fetches revocation lists where there are some and it is time."""
    if not agent.is_downtime():
        heard = isinstance(agent.source, MtlsSource) and not agent.silent
        refresh_revocation(agent.config, agent.store, agent.state, agent.source if heard else None)


STATE["crls"] = {"*": (dict(WAIT, **{"digest?": None}), dict(
    WAIT, digest=DIGEST_PATTERN, number=float, key=str, thisUpdate=float, validity=float, **{"etag?": str}))}
COMPANIONS["crls"] = Companion(
    "revocation lists", lambda config: config.identity.revocation != "off", parse_crl_uris,
    # E-090
    lambda state: [item["validity"] for item in state["crls"].values() if item.get("validity")],
    load_own_flaw, load_judge, find_list_fault)
STEPS.insert(STEPS.index(Agent.exchange) + 1, refresh_after_poll)
EXAMINE["lists"] = examine_lists


# ----------------------------------------------------------------------------------------------------------
# 30. Helm (optional)
# ----------------------------------------------------------------------------------------------------------

def read_helm(value, base):
    """auto, off, or the path of the helm command."""
    return value if value in ("auto", "off") else read_path(value, base)


Release = define("Release",
    "deployment_id component name namespace chart secrets values_file wait content",
    "A Helm release to be made: the chart's file, what may be secret among the values, their file, and a"
    " digest of all that makes it what it is.")
RELEASE_STATES = ("deployed", "failed", "pending", "uninstalling")
UNOWNED = f"{LABEL_DEPLOYMENT},!{LABEL_OWNER}"      # the selector of releases older than owners' labels


def make_owner_value(owner):
    """An owner as the value of a Kubernetes label, which has room for 63 letters and digits."""
    return sha256_digest(owner.encode())[7:47]


def parse_releases(data, records, owner=""):
    """The list of releases to [Container]; a release's revision is the hash by which drift is seen.

    Raises CommandError.
    """
    names = list_release_names(records)

    def read(items):
        found = []
        for item in items or ():
            name = item["name"]
            match = re.fullmatch(rf"(.+)-({UUID_PATTERN})", name)
            if match:                               # others are somebody else's, whatever their labels say
                component, deployment_id = names.get(name, match.groups())
                state = "running" if item["status"] == "deployed" else item["status"]
                found.append(Container(f"{item['namespace']}/{name}", name, deployment_id, component,
                                       "release", str(item["revision"]), state, "helm", owner=owner))
        return found

    return parse_answer(data, "helm list", read)


def list_release_names(records):
    """{name of a release: (component, deployment id)} of all components that records tell of."""
    return {make_release_name(component["name"], record["deploymentId"]):
            (component["name"], record["deploymentId"])
            for record in records for component in record["components"]}


def make_helm_driver(config, child=None, _=()):
    """The HelmDriver of the configuration; None where there is no helm, or no cluster to use it with.

    Nothing is started to tell.  child: (device id, connection) of a child device, whose connection may name
    its cluster.
    """
    environ = os.environ
    setting = config.runtime.helm
    path = config.runtime.kubeconfig or environ.get("KUBECONFIG")
    if child:
        environ = make_child_environment(environ, child[1])
        setting = "auto" if setting == "off" else setting
        path = child[1].get("KUBECONFIG")
        if not path:
            return None
    own = os.path.join(environ.get("HOME") or "/root", ".kube/config")
    path = path or next(filter(os.path.exists, ("/etc/rancher/k3s/k3s.yaml", own)), None)
    if setting == "off" or setting == "auto" and not (path and find_program("helm", environ)):
        return None
    # they would steer it behind our back
    environ = {key: item for key, item in environ.items() if not key.startswith("HELM_")}
    environ.update(get_temporary(config.state_dir, environ), **({"KUBECONFIG": path} if path else {}))
    return HelmDriver("helm" if setting == "auto" else setting, config, environ)


def make_values(deployment, component):
    """The parameters of one Helm component as a values file holds them, types kept (C-181 to C-183).

    A later parameter for the same place wins.  Raises ComponentError PARAMETER_INVALID.
    """
    values = {}
    for parameter, pointer in find_parameters(deployment, component):
        try:
            make_json(parameter.value)              # which has no infinite numbers
            set_value(values, parse_value_path(pointer), parameter.value)
        except ValueError as error:
            raise ComponentError("PARAMETER_INVALID", f"parameter {make_printable(parameter.name)}: pointer "
                                 f"{make_printable(pointer, 120)!r}: {error}") from None
    return values


def parse_value_path(pointer):
    """A dotted pointer to names and indices, as `helm --set` reads it: `a.b[0].c` and `a\\.b`.

    Raises ValueError.
    """
    part = r"((?:[^.\[\]\\]|\\.)+)((?:\[[0-9]{1,3}\])*)"
    if not re.fullmatch(rf"{part}(\.{part})*", pointer, re.S):
        raise ValueError("expected names parted by dots, each with [index] where it is a list")
    path = []
    for name, indices in re.findall(part, pointer, re.S):
        path.append(re.sub(r"\\(.)", r"\1", name, flags=re.S))
        path += map(int, re.findall("[0-9]+", indices))
    if len(path) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    return path


def set_value(held, path, value):
    """What is `held`, or None, with a value put at a path of names and indices below it.

    Raises ValueError where another one is in the way.
    """
    if path:
        kind = dict if isinstance(path[0], str) else list
        fits = isinstance(held, (kind, type(None)))
    else:
        fits = not isinstance(held, dict)
    if not fits:
        raise ValueError("another parameter puts something of another kind there")
    if not path:
        return value
    step, *rest = path
    held = kind() if held is None else held
    if kind is list:
        held.extend([None] * (step + 1 - len(held)))
    held[step] = set_value(held[step] if kind is list else held.get(step), rest, value)
    return held


def make_release_name(component, deployment_id):
    """`<component>-<deploymentId>` as Helm takes names: at most 53 characters.

    A long component is cut, with a hash of the whole.  The id always stands at the end, because a list of
    releases shows nothing else by which one could tell whose it is.
    """
    whole = f"{component}-{deployment_id}".lower()
    if len(whole) <= 53:
        return whole
    return f"{component[:5]}-{sha256_digest(whole.encode())[7:17]}-{deployment_id.lower()}"


class HelmDriver:
    """Runs Helm components by the helm command, version 3 or 4.

    Releases are ours by the label org.margo.owner; all of them are seen by one `helm list`, which is
    asked only where a deployment needs Helm.  Charts are fetched and verified here, like Compose
    Archives, so helm needs no access to registries.
    """

    def __init__(self, helm, config, environ):
        self.helm, self.config, self.environ = helm, config, environ
        self.claim = NOBODY                         # by what a release is ours, as of the last look

    def run(self, arguments, timeout):
        """The Output of one helm command."""
        return run_command([self.helm] + arguments, timeout, env=self.environ)

    def carry_out(self, arguments, deadline):
        """The Output of one helm command that is to be done by then."""
        seconds = max(1, int(deadline - time.monotonic()))
        return self.run(arguments + [f"--timeout={seconds}s"], seconds + 30)

    def observe(self, records=(), claim=None):
        """Every release of ours in any state; raises CommandError.

        records: those of deployments that need Helm.  claim: as for the ComposeDriver.
        """
        found = []
        claim = self.claim = claim or self.claim
        missing = set(list_release_names(records))
        for owner in dict.fromkeys([claim.owner, *sorted(claim.owners), ""]):
            selector = f"{LABEL_OWNER}={make_owner_value(owner)}" if owner else UNOWNED
            found += part_containers(parse_releases(self.list(selector), records, owner), claim)[0]
            missing.difference_update(release.name for release in found)
            if not missing:
                break                               # under an earlier owner is only what is missing
        return found

    def list(self, selector, *options):
        """What `helm list` says of releases in any state; raises CommandError."""
        arguments = ["list", "--max=0", "--output=json", f"--selector={selector}"]
        arguments += options or ["--all-namespaces"]
        output = self.run(arguments + [f"--{state}" for state in RELEASE_STATES], 60)
        if output.code:
            raise CommandError(f"the cluster does not answer (helm list: {output.stderr[-500:]})")
        return output.stdout

    def make_foreign(self):
        """The selector of releases that carry no owner of this agent's, or none at all."""
        claim = self.claim
        owners = sorted(map(make_owner_value, {claim.owner, *claim.owners}))
        return f"{LABEL_OWNER} notin ({','.join(owners)})"

    def ask_strangers(self):
        """[Container] of releases of other owners, whose names do not fit into a label; asks the cluster."""
        data = self.list(f"{LABEL_DEPLOYMENT},{LABEL_OWNER},{self.make_foreign()}")
        return parse_releases(data, [], "another agent")

    def ask_name(self, name, namespace):
        """Raises ComponentError where a release of this name was made by somebody else."""
        options = f"--namespace={namespace}", f"--filter=^{re.escape(name)}$"
        if parse_json(self.list(self.make_foreign(), *options), "helm list") and not parse_json(
                self.list(UNOWNED, *options), "helm list"):
            raise ComponentError("NAME_TAKEN", f"release {name} in namespace {namespace} was not made by this"
                                 " agent: remove it there")

    def check(self, claim):
        """What `doctor` says of this driver; raises CommandError."""
        output = self.run(["version", "--short"], 60).stdout.decode("utf-8", "replace")
        version = make_printable(output.strip(), 60)
        return f"helm {version} answers, {len(self.observe((), claim))} releases of ours"

    def prepare(self, deployment, component, known, store, fetched):
        """Fetches and verifies the chart and makes the values, and touches nothing that runs.

        Returns (a Release, facts of the package).
        """
        values = make_values(deployment, component.name)
        _, package = obtain_package(component, known, self.config, store, "helm")
        fetched.append(package["digest"])
        content = sha256_digest(make_json([package["digest"], values, deployment.namespace]))[7:39]
        name = make_release_name(component.name, deployment.deployment_id)
        self.ask_name(name, deployment.namespace)
        folder = store.path("deployments", deployment.deployment_id.lower(), component.name)
        create_folder(folder)
        values_file = os.path.join(folder, "values.json")
        write_file(values_file, make_json(values))
        chart = store.path("artifacts", package["digest"].replace(":", "-"))
        parts = [parameter.value for parameter, _ in find_parameters(deployment, component.name)]
        secrets = [str(item) for part in parts for item in (part if isinstance(part, list) else [part])]
        return Release(deployment.deployment_id, component.name, name, deployment.namespace, chart, secrets,
                       values_file, component.wait, content), package

    def apply(self, release, containers, known, deadline):
        """Makes the release as prepared; {"release": facts} once it is deployed, or ComponentError.

        Safe to repeat.  `upgrade --install` asks the cluster itself what is there, so that trouble on the way
        is never taken for "not installed" (D-16).
        """
        present = find_containers(release.deployment_id, containers, release.component, "helm")
        facts = known.get("release")
        if (facts and facts.get("content") == release.content
                and [(c.hash, c.state) for c in present] == [(facts["hash"], "running")]):
            return {"release": facts}
        for container in present:
            self.repair(container, release.namespace, facts, deadline)
        owner = self.claim.owner
        labels = f"{LABEL_DEPLOYMENT}={release.deployment_id}"
        if owner:
            labels += f",{LABEL_OWNER}={make_owner_value(owner)}"
        arguments = [
            "upgrade", "--install", release.name, release.chart, f"--namespace={release.namespace}",
            "--create-namespace", f"--values={release.values_file}", f"--labels={labels}", "--reset-values",
            "--history-max=5", "--output=json"]
        output = self.carry_out(arguments + ["--wait"] * bool(release.wait), deadline)
        if output.code:
            code = "INSTALL_TIMEOUT" if time.monotonic() >= deadline - 0.5 else "INSTALL_FAILED"
            words = mask(output.stderr, release.secrets)
            raise ComponentError(code, f"helm upgrade failed: {words[-1500:]}")
        revision = parse_answer(output.stdout, "helm upgrade", lambda answer: answer["version"])
        return {"release": {"hash": str(revision), "finished": False, "image": "",
                            "content": release.content}}

    def repair(self, container, namespace, facts, deadline):
        """Takes away what would stop an upgrade, or what it would not see.

        That is a release in another namespace, one that a power cut left half done, and what a failed upgrade
        left in the cluster: helm compares with the version that was deployed, not with that one.  facts: of
        the revision that was made here last; to that one it goes back, for the one before the newest may be
        what has failed.
        """
        there = container.id.partition("/")[0]
        if there != namespace or container.state in ("pending-install", "uninstalling"):
            self.uninstall(container, deadline)
        elif container.state != "running":
            revision = [facts["hash"]] if facts else []
            self.carry_out(["rollback", container.name, *revision, f"--namespace={there}"], deadline)

    def uninstall(self, container, deadline):
        """Uninstalls a release; whether it worked is told by the list alone."""
        namespace = container.id.partition("/")[0]
        return self.carry_out(["uninstall", container.name, f"--namespace={namespace}", "--wait"], deadline)

    def bring_back(self, before, deadline):
        """Leaves the releases as they are: the cluster keeps the pods of the revision before."""
        return "the releases are left as they are"

    def remove(self, deployment_id, component, containers, deadline):
        """Removes a component's releases.

        Raises ComponentError REMOVE_FAILED unless the cluster says that nothing is left (D-21).
        """
        ours = find_containers(deployment_id, containers, component, "helm")
        words = [self.uninstall(container, deadline).stderr for container in ours]
        record = {"deploymentId": deployment_id, "components": [{"name": component}]}
        if ours and find_containers(deployment_id, self.observe([record]), component):
            raise ComponentError(
                "REMOVE_FAILED", f"release {ours[0].name} is still there: {words[0][-1000:]}")

    def leave(self, *_):
        """Nothing: logs, health checks and images are the cluster's, and ports none of this host."""
        return ""

    list_ports = tail_log = tend = remove_image = stop = leave
    beside = ()


DRIVERS["helm"] = make_helm_driver
SCHEMA["runtime"].update(helm=(read_helm, "auto", "path of helm; auto: by PATH, off: no helm components"),
                         kubeconfig=(read_path, None, "file that leads helm to its cluster"))


# ----------------------------------------------------------------------------------------------------------
# 31. Gateway (optional)
# ----------------------------------------------------------------------------------------------------------

def load_child_devices(config, own_id):
    """[Device] of each child of a see-thru gateway (protocol 9)."""
    devices = []
    ids = [f"{own_id}/{child.id}" for child in config.device.children]
    for device_id, child in zip(ids, config.device.children):
        others = [other for other in ids if other != device_id]
        silence = ComponentError("102", f"child device {device_id} does not answer", source=own_id)
        drivers = make_drivers(config, (device_id, child.connection), others)
        devices.append(Device(device_id, child, drivers, silence))
    return devices


def find_place(deployment, held, own_id, children, reasons, others):
    """The id of the device that a deployment is for.

    Raises ComponentError WRONG_DEVICE, 101, 102 or 103 (protocol 9).

    held: the device it is at now, or None.  children: {device id: whether it answers}.  reasons: {device id:
    why it cannot run there, or None}.  others: the devices where all other deployments are.  A free choice
    falls on the least loaded child that answers, and stays; a document that names no device is for this one.
    """
    wanted = deployment.device_id or own_id
    if wanted == own_id or wanted in children:
        return wanted
    if not wanted.startswith(own_id + "/") or not (children or wanted == f"{own_id}/*"):
        return find_own_place(deployment, held, own_id)
    if wanted != f"{own_id}/*":
        parent = wanted[:-2] if wanted.endswith("/*") else None
        if parent in children:
            raise ComponentError("103", f"child device {parent} is no gateway to others", source=own_id)
        words = f"child device {parent or wanted} is not known; known are {', '.join(children)}"
        raise ComponentError("101", words, source=own_id)
    fit = [child for child in children if not reasons[child]]
    if held in fit:
        return held
    if not fit:
        words = "; ".join(f"{child}: {reasons[child]}" for child in children)
        words = f"no child device can take it: {words or 'this device is no gateway'}"
        raise ComponentError("103", words, source=own_id)
    there = [child for child in fit if children[child]]
    if not there:
        words = f"none of the child devices that could take it answers: {', '.join(fit)}"
        raise ComponentError("102", words, source=own_id)
    return min(there, key=others.count)


def examine_children(agent):
    """Whether every child device answers."""
    children = agent.devices[1:]
    seen = observe_devices(children, [], obtain_claim(agent.profile, agent.device_id))
    words = [f"{device_id} does not answer ({fault.message}); see its connection in device.children"
             for device_id, sight in seen.items() for fault in list(sight.silent.values())[:1]]
    if words:
        raise CommandError("; ".join(words))
    return "ok", f"{len(children)} answer" if children else ""


EXAMINE.update(children=examine_children)
DEVICES.append(load_child_devices)
PLACES.append(find_place)


# ----------------------------------------------------------------------------------------------------------
# 32. Hooks (optional)
# ----------------------------------------------------------------------------------------------------------

def run_hooks(moment, change, step, error):
    """Runs the operator's hooks `before` or `after` a change of one component: the event as argument, the
    facts as JSON on stdin.

    Raises ComponentError HOOK_FAILED where one of `before` does not end with 0; after a change, and on the
    way back to the version before, that is only logged.  Values of parameters are not among the facts: no
    process but the application gets them.
    """
    facts = {}
    event = f"{moment}-{change.event}"
    for path in step.config.hooks.run:
        facts = facts or make_facts(change, event, error)
        environ = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TZ") if key in os.environ}
        try:
            output = run_command([path, event], step.config.hooks.timeout, env=environ,
                                 data=make_json(facts))
            words = f"ended with {output.code}: {output.stderr[-1500:]}" if output.code else ""
        except CommandError as fault:
            words = fault.message
        if words and moment == "before" and not change.rollback:
            raise ComponentError("HOOK_FAILED", f"hook {path} {event}: {words}")
        if words:
            log("error", "a hook failed; the change stands", hook=path, hookEvent=event,
                deployment=facts["deploymentId"], reason=words)


def make_facts(change, event, error):
    """What a hook is told of the change of a component."""
    record, deployment = change.record, change.deployment
    blank = Component(change.name, "", "", True, 0)
    component = next((item for item in deployment.components if item.name == change.name), blank)
    outcome = {"state": "removed" if change.event == "removal" else "installed", "code": "", "message": ""}
    if error:
        outcome = {"state": "failed", "code": error.code, "message": error.message}
    extensions = dict({"spec": {}, "deploymentProfile": {}}, **deployment.extensions,
                      component=component.extensions)
    return {"event": event, "rollback": change.rollback, "deploymentId": record["deploymentId"],
            "name": record["name"], "namespace": deployment.namespace, "deviceId": record["deviceId"],
            "type": deployment.type, "component": change.name, "repository": component.repository,
            "revision": component.revision, "extensions": extensions,
            "outcome": None if event.startswith("before") else outcome}


def examine_hooks(agent):
    """Whether every hook can be run."""
    hooks = agent.config.hooks.run
    broken = [path for path in hooks if not os.path.isfile(path) or not os.access(path, os.X_OK)]
    if broken:
        return "warn", (f"hooks.run: {', '.join(broken)} cannot be run, and no change is made without it;"
                        " install it and make it executable")
    loose = [path for path in hooks if os.stat(path).st_mode & 0o022]
    if loose:
        return "warn", f"hooks.run: {', '.join(loose)} can be changed by other users; chmod go-w it"
    return "ok", f"{len(hooks)} to be run around changes" if hooks else ""


SCHEMA.update(hooks={
    "run": (list_of(read_path, "a list of file names"), [], "programs that are run around each change"),
    "timeout": (read_duration, "60s", "limit of one such program"),
})
LISTENERS.append(run_hooks)
EXAMINE.update(hooks=examine_hooks)


# ----------------------------------------------------------------------------------------------------------
# 33. Image policy (optional)
# ----------------------------------------------------------------------------------------------------------

IMAGE_TYPES = ", ".join((OCI_INDEX, OCI_MANIFEST, "application/vnd.docker.distribution.manifest.list.v2+json",
                         "application/vnd.docker.distribution.manifest.v2+json"))
SIGNATURE = "dev.cosignproject.cosign/signature"
SIGNATURES = {"layers": [{"digest": DIGEST_PATTERN, "annotations": {SIGNATURE: ".*"}}]}
MAX_SIGNATURES = 20                 # of one image that are looked at


def judge_image(image, config):
    """The name by which an image may be pulled, as policy.images says: a signed one by its digest.

    Raises ComponentError: POLICY_DENIED, or why its registry cannot be asked.
    """
    policy = config.policy.images
    host, path, tag, digest = re.fullmatch("([^/]+)/([^:@]+)(?::([^@]+))?(?:@(.+))?", image).groups()
    allowed = [f"{host}/{path}/".startswith(entry.rstrip("/") + "/") for entry in policy.registries]
    if allowed and not any(allowed):
        raise ComponentError("POLICY_DENIED", "it is not from one of policy.images.registries")
    if policy.pinned and not digest:
        raise ComponentError("POLICY_DENIED", "it is not named by its digest (policy.images.pinned)")
    if not policy.cosign_key:
        return image
    return ask_registries(host, config, lambda registry: f"{host}/{path}@" + ask_signature(
        registry, path, tag or "latest", digest, config))


def ask_signature(registry, path, tag, digest, config):
    """The digest of an image, once a signature of it by policy.images.cosign_key was found in its registry.

    The signature object is cosign's: an image manifest under the tag sha256-DIGEST.sig, each layer a payload
    that names the digest, with an annotation that signs the payload.  Raises ComponentError, CommandError.
    """
    limit = config.policy.max_document
    if digest is None:
        digest = sha256_digest(registry.get(path, f"manifests/{tag}", IMAGE_TYPES, limit).body)
    try:
        answer = registry.get(path, f"manifests/{digest.replace(':', '-')}.sig", IMAGE_TYPES, limit)
        for layer in parse_shaped(answer.body, SIGNATURES).get("layers", ())[:MAX_SIGNATURES]:
            payload = registry.get(path, f"blobs/{layer['digest']}", "*/*", MAX_ANSWER).body
            signature = layer["annotations"][SIGNATURE]
            if (run_verification(config.policy.images.cosign_key, payload, signature)
                    and parse_shaped(payload, make_payload_shape(digest))):
                return digest
    except ComponentError as error:
        if error.status != 404:
            raise
    raise ComponentError("POLICY_DENIED", f"{digest} is not signed by policy.images.cosign_key")


def make_payload_shape(digest):
    """The shape of a signed payload that is about the image of a digest."""
    return {"critical": {"type": "cosign container image signature",
                         "image": {"docker-manifest-digest": digest}}}


def parse_shaped(data, shape):
    """What a JSON document of a shape says, see check_shape; {} for one of another shape."""
    try:
        value = parse_json(data, "")
        check_shape(value, shape, "")
    except ValueError:
        return {}
    return value


def run_verification(key, payload, signature):
    """Whether openssl finds that a payload is signed by a public key; ConfigError without openssl."""
    try:
        with lend_file(parse_base64(signature)) as file:
            run_openssl("dgst -sha256 -verify", key, "-signature", file.name, data=payload,
                        expected=b"Verified OK")
    except (ValueError, CommandError):
        return False
    return True


def examine_images(agent):
    """Whether the key by which images have to be signed can be used."""
    key = agent.config.policy.images.cosign_key
    if not key:
        return "ok", ""
    try:
        run_openssl("pkey -noout -pubin -in", key)
    except CommandError as error:
        raise ConfigError(f"policy.images.cosign_key: {key} is no public key ({error.message})") from None
    return "ok", f"images have to be signed by {key}"


SCHEMA["policy"]["images"] = {
    "pinned": (read_flag, False, "whether images have to be named by their digest"),
    "registries": (list_of(read_text, "a list of registries"), [],
                   "HOST[:PORT][/PATH] from which images may be; empty: from everywhere"),
    "cosign_key": (read_path, None, "public key by which images have to be signed, as cosign does"),
}
JUDGES.append(judge_image)
EXAMINE.update(images=examine_images)


# ----------------------------------------------------------------------------------------------------------
# 34. Doctor (optional)
# ----------------------------------------------------------------------------------------------------------

def command_doctor(config, options):
    """Checks everything that a run needs, and changes nothing.

    Each check is a line: ok, warn, or FAIL, with what to do about it.  FAIL is what a run would fail by now;
    then the exit code is that run's.

    Example: margo_agent.py doctor --json
    """
    log.level = log.level if "-v" in options else "error"       # what it finds, it says itself
    agent = Agent(config)
    first = {"state": examine_storage, "lock": examine_lock, "wait": examine_wait, "clock": examine_clock,
             "device": examine_device, "engine": examine_engine}
    last = {"others": examine_others, "registry": examine_registries, "labels": examine_labels,
            "identity": examine_identity, "wfm": examine_connection, "outbox": examine_outbox,
            "failed": examine_failed}
    found, code = [], 0
    checks = {**first, **EXAMINE, **last}
    moot = ()                                       # what a run does not come to
    for name, examine in checks.items():
        try:
            level, words = examine(agent)
        except FAULTS as error:
            fault = to_fault(error)
            words = fault.message
            level = "FAIL" if fault.exit and name not in moot else "warn"
            code = max(code, fault.exit if level == "FAIL" else 0)
            if name in ("state", "lock"):           # a run comes no further
                moot = checks
            elif isinstance(fault, Silence):        # it asks nobody
                moot = moot or ("identity", "wfm")
            elif name == "identity":                # nor has it anything to ask with
                moot = moot or ("wfm",)
        if words and words not in [row["message"] for row in found]:        # each cause once
            found.append({"name": name, "level": level.lower(), "message": words})
            if "--json" not in options:
                say(f"{level:5}{name:9} {words}")
    if "--json" in options:
        print_json({"code": code, "checks": found})
    return code


def examine_lock(agent):
    """Whether no other instance works on the state just now."""
    if os.path.lexists(agent.store.path("lock")):   # else nobody has ever taken it
        agent.store.lock()
        agent.store.unlock()
    return "ok", ""


def examine_wait(agent):
    """Whether a wait keeps the next run from asking, or from reporting: it ends with 3 then."""
    clock = get_clock()
    silence = find_silence(agent.state["patience"], agent.is_downtime(), 0, clock)
    waits = [f"until {item['until']} {item['reason']}" for item in list_waits(agent.state, clock)]
    if silence and not silence.exit:
        raise silence
    if waits:
        raise (Silence if silence else Unreachable)(f"{'; '.join(waits)}; `retry` ends that")
    return "ok", ""


def examine_device(agent):
    """Whether the device's id tells it from others, where the hardware gives it."""
    doubtful = not agent.config.device.id and is_placeholder(agent.device_id)
    return "warn", doubtful and (f"this hardware calls itself {agent.device_id}, as many may do; give it a"
                                 " name of its own by device.id")


def examine_identity(agent):
    """Whether the own identity can be used; what an enrollment under way lacks, the last run has said."""
    try:
        return agent.profile.check(time.time())
    except Untrusted as error:
        if agent.config.identity.get("enrollment") != "est":
            raise
        recall(agent)
        token = agent.config.identity.est.token_file or agent.config.identity.est.certificate
        if not os.path.exists(token or ""):
            raise
        return "warn", f"{error.message}, or the next run does"


def recall(agent):
    """Raises what the last run has failed by, where nothing but a run can try it."""
    last = agent.store.load_memo().get("lastPoll") or agent.state["lastPoll"] or {}
    kinds = {"unreachable": Unreachable, "refused": Refused, "untrusted": Untrusted}
    if last.get("detail") and last["result"] in kinds:
        raise kinds[last["result"]](last["detail"])


def examine_outbox(agent):
    """Whether the WFM has all reports, and has taken them."""
    dropped = "; ".join(f"the report that {key} is {item['state']} was refused: {item['reason']}"
                        for key, item in agent.state["dropped"].items())
    waiting = len(agent.state["outbox"])
    return "warn", f"reports that wait for the WFM: {waiting}" if waiting else dropped


def examine_failed(agent):
    """Whether every deployment is as it should be."""
    words = [f"{record['name']} ({record['error']['code']}): {make_failure_words(record)};"
             f" {make_due(record, get_clock())}"
             for record in agent.state["deployments"].values() if record["state"] == "failed"]
    if words:
        raise CommandError("; ".join(words))
    newest = (agent.state["history"] or [{}])[-1]
    refused = newest.get("refused")
    return "warn", refused and f"what came after version {newest['version']} was refused: {refused}"


def examine_storage(agent):
    """Whether the state can be read and written, and has room to grow."""
    agent.hold(agent.store.load_state())
    for name in FOLDERS_KEPT:
        folder = agent.store.path(name)
        while not os.path.lexists(folder):          # what is not there can be made
            folder = os.path.dirname(folder) or "/"
        if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
            raise StorageError(f"state_dir: {folder} is no folder that this user may write; run as its owner,"
                               " mount its disk writable, or move it away where it is no folder")
    free, _ = get_space(folder)
    if free < SHARE * KIB and not os.path.exists(agent.store.path("reserve")):
        raise StorageError(f"state_dir: no space is left at {folder}; free some")
    need = agent.config.policy.max_unpacked + agent.config.policy.max_artifact
    words = f"{agent.config.state_dir}, {free // MIB} MiB free"
    lack = f"; one package may take {need // MIB} (policy.max_unpacked): free some"
    return ("ok", words) if free > need else ("warn", words + lack)


def examine_labels(agent):
    """Whether every label has a name that nobody else uses: with a domain before it (C-088)."""
    names = {name for device in agent.devices for name in device.settings.labels}
    bare = sorted(name for name in names if not re.match(r"[^/.]+(\.[^/.]+)+/.", name))
    words = f"device.labels {', '.join(bare)}: put a domain of yours before it, as in example.com/zone"
    return "warn", bare and words


def examine_clock(agent):
    """Whether the clock can be right, by which certificates are judged."""
    now = time.time()
    stored = agent.store.find_time()
    if now < stored:
        return "warn", make_clock_fault(now, stored)
    return "ok", make_time(now)


def examine_engine(agent):
    """Whether something runs workloads here, and answers."""
    drivers = agent.devices[0].drivers
    if not drivers and agent.devices[1:]:
        return "ok", "nothing here runs workloads; they run on child devices"
    if not drivers:
        wanted = agent.config.runtime.engine.replace("auto", "podman or docker")
        return "warn", (f"nothing here runs Compose applications; install {wanted}, or see runtime.compose"
                        " and runtime.engine")
    claim = obtain_claim(agent.profile, agent.device_id)
    words = [driver.check(claim) for driver in drivers.values()]
    lacks, notes = drivers["compose"].list_lacks() if "compose" in drivers else ([], [])
    return "warn" if lacks else "ok", "; ".join(words + lacks + notes)


def examine_others(agent):
    """Whether workloads of another owner run here: they are left alone, but may hold a port or a name."""
    devices = {device.device_id: device for device in agent.devices}
    words = "; ".join(make_others_words(ask_others(devices)))
    return "warn", words and f"workloads of others are left alone: {words}"


def examine_registries(agent):
    """Whether the registries answer, and what `registries` names for them can be read.

    A run needs them only where it has something to fetch.
    """
    faults = []
    for host, entry in agent.config.registries.items():
        registry = Registry(host, agent.config)
        try:
            load_credentials(host, entry)
            if not agent.is_downtime():
                registry.request(f"{registry.scheme}://{registry.address}/v2/", {}, MAX_ANSWER)
        except MargoError as error:
            known = error.stranger and ask_peer(f"https://{registry.address}/", registry.timeout)
            faults += [f"{host}: {error.message}"] + [f"there answers {known}"] * bool(known)
    return "warn", "; ".join(faults)


def examine_connection(agent):
    """Whether the WFM answers, is the one it should be, and wants what can be run here."""
    url = agent.config.wfm.url
    proxy = ask_proxy(url) and f" through the proxy {ask_proxy(url)}"
    if agent.is_downtime():
        return "ok", ""
    try:
        agent.connect(keep=False)
        window = agent.config.poll.window
        if window and not is_within(window, time.localtime()):
            return "ok", f"outside poll.window: {url} is not asked for anything new"
        desired = agent.fetch_desired()
    except Untrusted as error:
        if error.code == "NOT_ONBOARDED":
            recall(agent)
            return "warn", error.message
        if error.stranger:
            error.message += f"; there answers {ask_peer(url, agent.config.wfm.timeout)}"
        raise
    news = "nothing new"
    if desired:
        news = f"version {desired.version} is there to be accepted"
        agent.check_removals(make_accepted(desired), agent.state["deployments"])
        folder = agent.store.folder
        need = sum(map(len, desired.documents.values()))
        if os.path.isdir(folder) and get_space(folder)[0] < need:
            raise StorageError(f"{news}, and there is no space for it at {folder}; free some")
    failed = [key for key, record in agent.state["deployments"].items() if record["state"] == "failed"]
    refused = [f"{action.deployment_id}: {action.reason}" for action in plan_desired(agent, desired)
               if PRINTED.get(action.verb, action.verb) == "refuse"
               and action.key not in failed]        # of those another check tells
    if refused:
        raise CommandError(f"{news}; {'; '.join(refused)}")
    return "ok", f"{url} is {agent.source.peer}{proxy}; {news}"


def ask_peer(url, timeout):
    """Whose certificate is shown at a URL, in words: nothing is sent there, and nothing is trusted."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        leaf = parse_certificate(fetch_chain(url, context, timeout)[0])
    except (MargoError, ValueError) as error:
        return f"nobody ({error})"
    return f"{make_name(leaf.subject)}, certified by {make_name(leaf.issuer)}"


COMMANDS["doctor"] = (command_doctor, "[--json]")


# ----------------------------------------------------------------------------------------------------------
# 35. Commands for people (optional)
# ----------------------------------------------------------------------------------------------------------

def look_at(config, word):
    """(Agent, record, Seen): a deployment that somebody names, and what its device shows of it now.

    Raises ConfigError, StorageError.
    """
    agent = load_agent(config)
    record = find_record(agent.state, word)
    home = record["deviceId"]
    devices = [device for device in agent.devices if device.device_id == home]
    claim = obtain_claim(agent.profile, agent.device_id)
    seen = observe_devices(devices, [record], claim).get(home, NOTHING)
    return agent, record, seen._replace(containers=find_containers(record["deploymentId"], seen.containers))


def command_describe(config, options):
    """Prints what the device knows, without network; of one deployment everything there is to know.

    NAME is the name of a deployment, its id, or the beginning of its id.

    Example: margo_agent.py status hello
    """
    if not options["operands"]:
        return command_status(config, options)
    agent, record, seen = look_at(config, options["operands"][0])
    clock = get_clock()
    report = make_details(record, load_deployment(agent, record), seen.containers, clock)
    if "--json" in options:
        return print_json(report)
    print_deployment(report)
    print_row("document", f"{report['digest']}, of manifest version {report['version']}")
    for item in report["containers"]:
        since = f" since {item['since']}" if item["since"] else ""
        ports = f"  ports {', '.join(item['ports'])}" if item["ports"] else ""
        print_row(item["state"], f"{item['name']}{since}  {item['image']}{ports}")
    for fault in seen.silent.values():
        print_row("containers", fault.message)
    if report["attempts"]:
        print_row("attempts", f"{report['attempts']} failed; {make_due(record, clock)}")
    if report["before"]:
        runs = "runs in its place" if record["fallback"] else "is kept to go back to"
        print_row("before", f"the version of document {report['before']} {runs}")


def make_details(record, deployment, containers, clock):
    """What `status NAME` tells: what `status` does, and revisions, containers, attempts, the way back.

    deployment: the Deployment that is worked on, or None.  containers: as its engine shows them.
    """
    report = make_deployment_report(record)
    components = deployment.components if deployment else ()
    known = {item.name: f"{item.repository} {item.revision}" for item in components}
    for part in report["components"]:
        part["revision"] = known.get(part["name"], "")
    services = list_parts(record, "services")
    shown = []
    for container in containers:
        facts = services.get(container.component, {}).get(container.service, {})
        ports = [f"{address}:{port}/{kind}".lstrip(":") for address, port, kind in facts.get("ports", ())]
        since = make_time(container.started) if container.started else None
        shown.append({"name": container.name, "component": container.component, "ports": ports,
                      "service": container.service, "state": container.state, "since": since,
                      "image": facts.get("image", "")})
    left = find_wait(record["retry"], clock)
    before = record["running"] if record["fallback"] else record["previous"]
    return dict(report, version=record["adopted"]["version"], containers=shown,
                attempts=record["retry"].get("failures", 0), before=(before or {}).get("digest"),
                nextAttempt=make_time(clock.now + left) if left else None)


def command_logs(config, options):
    """Shows what the containers of a deployment, or of one service of it, have written.

    NAME is the name of a deployment, its id, or the beginning of its id.  `--tail N` shows the last N lines
    of each container, `-f` goes on with what comes.

    Example: margo_agent.py logs hello --tail 50
    """
    name, *services = options["operands"]
    _, record, seen = look_at(config, name)
    for fault in seen.silent.values():
        raise fault
    found = [item for item in seen.containers
             if item.type == "compose" and item.service in (services or [item.service])]
    if not found:
        where = f"service {services[0]} of {name}" if services else name
        raise ConfigError(f"{where} has no container here; `status {record['name']}` shows what there is")
    driver = seen.drivers["compose"]
    if found[1:] and driver.engine == "docker":
        names = ", ".join(sorted(container.service for container in found))
        raise ConfigError(f"docker shows one container at a time; name one of the services {names}")
    tail = options.get("--tail", "")
    if not re.fullmatch("[0-9]*", tail):
        raise ConfigError(f"--tail: found {tail!r}, expected a number of lines")
    flags = [f"--tail={tail}"] * bool(tail) + ["--follow"] * ("-f" in options) + ["--names"] * bool(found[1:])
    argv = [driver.engine, "logs", *flags, *(container.id for container in found)]
    if sys.stdout.isatty():
        reader, writer = os.pipe()
        if os.fork():
            os.close(writer)
            return show_lines(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
    os.execvpe(argv[0], argv, get_command_environment(driver.environ))


def show_lines(reader):
    """Prints what comes through a pipe, without what would steer the terminal; returns the exit code."""
    with open(reader, "rb") as lines:
        for line in iter(lambda: lines.readline(64 * KIB), b""):
            words = line.decode("utf-8", "replace").rstrip("\r\n").split("\t")
            print("\t".join(make_printable(word, 64 * KIB) for word in words), flush=True)
    return os.wait()[1] >> 8


def command_config(config, options):
    """Prints the configuration that is in force: what the file says, and the default of all else.

    What may be a secret is masked.  `--check` only says whether the file can be used.  `--example` prints a
    file to start from, with every setting and what it is for.

    Example: margo_agent.py config --example > agent.yaml
    """
    if "--example" in options:
        print("\n".join(make_settings_lines(SCHEMA, EXAMPLE, True)))
    elif "--check" in options:
        print(f"{options['-c']} can be used")       # else it has been said why not
    else:
        document = expand_environment(load_document(options["-c"]), os.environ, "", [])
        print("\n".join(make_settings_lines(SCHEMA, document or {}, False)))


# What an example of a configuration sets, by names of examples/pki.sh; all else is commented out.
EXAMPLE = {"wfm": {"url": "https://localhost:8443"},
           "identity": {"certificate": "client.pem", "key": "client.key", "trust_bundle": "bundle.json"}}
# What stands below a key, which is here behind its indentation.
PARTS = {"registries": ("registry.example:5000:", REGISTRY_SCHEMA), "  children": ("-", CHILD_SCHEMA)}


def make_settings_lines(schema, document, example, indent=""):
    """The lines of a configuration that leaves nothing out, each setting with what it is for.

    What the document does not say has its default: marked so or, in an example, commented out.
    """
    lines = []
    for key, entry in schema.items():
        value = document.get(key)
        if isinstance(entry, dict):
            part = make_settings_lines(entry, value or {}, example, indent + "  ")
            lines += ["", f"{indent}{key}:", *part]
            continue
        reader, default, meaning = entry
        try:
            reader(object(), "")
        except ValueError as error:                 # of what it would take
            meaning += f" ({str(error).partition(':')[0]})"
        if key in ("environment", "parameter_values") and value:    # it may hold what nobody should see
            value = dict.fromkeys(value, "...")
        line = f"{key}: {make_yaml(default if value is None else value)}"
        if value is None:
            line = f"# {line}" if example else f"{line}  # default"
        lines += [f"{indent}# {meaning}", f"{indent}{line}".rstrip()]
        if example and indent + key in PARTS:
            name, parts = PARTS[indent + key]
            part = [f"  {name}", *make_settings_lines(parts, {}, example, "    ")]
            lines += [f"{indent}# {line}" for line in part]
    return lines


def make_yaml(value):
    """A value as YAML on one line; None is nothing."""
    if value is None:
        return ""
    try:
        text = scalar_text(value)
        if load_yaml(text) == value:
            return text
    except (TypeError, YAMLError):
        pass                                        # it takes brackets, or quotes
    return make_json(value).decode()


COMMANDS.update(status=(command_describe, "[NAME] [--json]"),
                logs=(command_logs, "NAME [SERVICE] [--tail N] [-f]"),
                config=(command_config, "[--check] [--example]"))


# ----------------------------------------------------------------------------------------------------------
# 36. Command line
# ----------------------------------------------------------------------------------------------------------

def command_run(config, options):
    """Polls the WFM and makes the device match what it wants, for ever or (`--once`) a single time.

    `--spread TIME` begins at the device's own moment within that time, for fleets that cron starts.

    Example: margo_agent.py run --once --spread 50s
    """
    try:
        spread = read_duration(options["--spread"], "") if "--spread" in options else 0
    except ValueError as error:
        raise ConfigError(f"--spread: found {options['--spread']!r}, expected {error}") from None
    if "--once" not in options:
        for name in {"--spread", "--json"}.intersection(options):
            raise Misuse(f"{name}: belongs to run --once")
        return start_watch(config, options["arguments"])
    import signal
    asked = []

    def stop(number, _):
        # The current step takes too long: what it has started is ended, and the next run goes on.
        if number == signal.SIGALRM:
            raise Interrupted(f"ended in the middle of a step, {STOP_GRACE} s after it was asked to")
        asked.append(True)
        signal.setitimer(signal.ITIMER_REAL, STOP_GRACE, STOP_GRACE)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, stop)
    descriptor = os.environ.pop("MARGO_DELAY_FD", None)
    agent = Agent(config, lambda: bool(asked))

    def wait(seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end and not asked:
            time.sleep(0.2)

    if spread:
        seconds = make_spread(agent.device_id, spread)
        log_wait(f"waiting {seconds:.0f} s: --spread has a fleet's runs begin one after the other")
        wait(seconds)
    outcome = agent.cycle()
    if agent.starting and not descriptor:           # workloads are up; nobody else waits for this run's turn
        wait(agent.starting)
        outcome = agent.cycle()
    log("debug", "cycle done", result=outcome.result, code=outcome.code)
    for record in agent.state["deployments"].values():
        if record["state"] == "failed":
            words = make_due(record, get_clock())
            log_wait(f"{record['name']} has failed ({record['error']['code']}); {words}")
    if "--json" in options:
        print_json(outcome._asdict())
    if descriptor:
        words = make_life_sign(agent.state, outcome)
        os.write(int(descriptor), f"{outcome.delay:.3f} {words}".encode("utf-8", "replace"))
    return outcome.code


def make_life_sign(state, outcome):
    """How a cycle went, for `systemctl status`."""
    states = [record["state"] for record in state["deployments"].values()]
    words = f"{outcome.result}, {states.count('installed')} of {len(states)} deployments installed"
    detail = outcome.detail and f"; {make_printable(outcome.detail, 200)}"
    return f"{words}{detail}; next cycle in {outcome.delay:.0f} s"


def start_watch(config, arguments):
    """Turns this process into the parent of the daemon: a bare interpreter that runs `watch`.

    The program is read from a pipe, in compiled form.  So neither this file nor a compiler stays in memory,
    and it works where only the compiled file is installed.
    """
    import marshal
    import signal
    parts = notify, write_line, start_cycle, count_wakes, reap, end_cycle, watch
    codes = marshal.dumps([part.__code__ for part in parts])
    # A cycle is run as a module where this file's name allows that: Python then keeps its compiled form.
    start = [os.path.abspath(__file__)]
    folder, name = os.path.split(start[0])
    stem, _, suffix = name.partition(".")
    if suffix in ("py", "pyc"):
        start = ["-c", f"import sys; sys.path.insert(0, {folder!r}); sys.exit(__import__({stem!r}).main())"]
    child = [sys.executable, "-I", "-S", *start, *arguments, "--once"]
    last = "the daemon has ended" if log.level in ("debug", "info") else ""
    words = child, CYCLE_RETRY, HUNG, STOP_LIMIT, last
    program = (f"import marshal, os, time\nLINE = {LINES[log.form]!r}\n"
               f"for code in marshal.loads({codes!r}):\n"
               "    globals()[code.co_name] = type(lambda: None)(code, globals())\n"
               f"raise SystemExit(watch(*{words!r}))\n")
    log("info", "the daemon has started", version=__version__, profile=config.wfm.profile,
        wfm=config.wfm.url, interval=f"{config.poll.interval:.0f} s")
    # These wait until `watch` asks for them.
    signals = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    reader, writer = os.pipe()
    os.write(writer, program.encode())              # a pipe holds 64 KiB, this is far smaller
    os.close(writer)
    os.dup2(reader, 0)
    os.execv(sys.executable, [sys.executable, "-I", "-S", "-", "margo-agent"])


# The daemon's parent: these functions run in an interpreter that has nothing else of this file but `os`,
# `time` and LINE.  What more they need they import.

# How a line of the log is written, by its form.
LINES = {"text": "%s %-7s %s\n", "json": '{"time":"%s","level":"%s","message":"%s"}\n'}
LINE = LINES["text"]


def notify(address, text):
    """Sends systemd a message, where it listens."""
    if not address:
        return
    import socket
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            peer.setblocking(False)                 # nobody may read
            peer.connect("\0" + address[1:] if address.startswith("@") else address)
            peer.send(text.encode())
    except OSError:
        pass                                        # nobody listens any more


def write_line(level, text):
    """Writes one line as the log does."""
    line = LINE % (time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), level, text)
    try:
        os.write(2, line.encode())
    except OSError:
        pass                                        # nobody listens any more


def start_cycle(child, signals):
    """Starts a cycle: (its process id, the pipe by which it says how long to wait after it).

    Raises OSError.
    """
    import signal
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            for number in (signal.SIGHUP, signal.SIGINT):   # a terminal sends them to both of us
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            os.set_inheritable(writer, True)
            os.execve(child[0], child, dict(os.environ, MARGO_DELAY_FD=str(writer)))
        except OSError as error:
            words = f"{child[0]} cannot be started ({error.strerror}); is Python still where it was?"
            write_line("error", words)
        finally:
            os._exit(127)
    os.close(writer)
    return pid, reader


def count_wakes(pid):
    """How often a process has woken from a wait, as the kernel counts it.

    Where there is no process (0), or the kernel does not tell, the number is another one each time.
    """
    try:
        with open(f"/proc/{pid}/status") as file:
            return int(file.read().partition("voluntary_ctxt_switches:")[2].split()[0])
    except (OSError, IndexError):
        return time.monotonic()


def reap(pid):
    """How a child has ended, as waitpid tells it; None while it runs, or where there is none (0).

    As process 1 of a container the daemon inherits what engine commands leave behind: that is reaped, too.
    """
    found = None
    try:
        ended = True
        while ended:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if 0 < ended == pid:
                found = status
    except ChildProcessError:
        pass                                        # there is none any more
    return found


def end_cycle(pid, limit):
    """Asks a cycle to end after its current step, and kills it after `limit` seconds.

    Returns the daemon's exit code.
    """
    import signal
    end = time.monotonic() + limit
    os.kill(pid, signal.SIGTERM)
    while reap(pid) is None:
        if time.monotonic() > end:
            write_line("error", f"the cycle did not end within {limit} s, and is killed")
            os.kill(pid, signal.SIGKILL)
            return 1
        signal.sigtimedwait({signal.SIGCHLD}, 0.5)
    return 0


def watch(child, fallback, hung, limit, last):
    """Runs cycles one after the other, for ever; returns the daemon's exit code.

    child: the command line of a cycle.  It says in a pipe how many seconds to wait after it (else `fallback`)
    and how it went.  SIGTERM and SIGINT end the daemon after the current step; `last` ends its log.  SIGHUP
    starts a cycle at once.  One that has not woken from a wait for `hung` seconds hangs, and is killed.
    systemd's watchdog is fed while cycles can be started and move; if five in a row cannot be, it ends.
    """
    import signal
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
    address = os.environ.get("NOTIFY_SOCKET", "")
    beat = int(os.environ.get("WATCHDOG_USEC") or 0) / 2e6 or 3600.0
    notify(address, "READY=1")
    pid = due = moved = seen = proven = failures = 0
    while True:
        now = time.monotonic()
        if not pid and now >= due:
            try:
                pid, reader = start_cycle(child, signals)
                due = None
            except OSError as error:
                write_line("error", f"no cycle can be started ({error.strerror})")
                failures += 1
                due = now + fallback
        wait = hung / 4 if pid else max(0.0, due - now)
        number = getattr(signal.sigtimedwait(signals, min(beat, wait)), "si_signo", 0)
        now = time.monotonic()
        if number in (signal.SIGTERM, signal.SIGINT):
            notify(address, "STOPPING=1")
            code = end_cycle(pid, limit) if pid else 0
            if last:
                write_line("info", last)
            return code
        if number == signal.SIGHUP:
            due = 0
        status = reap(pid)
        if status is not None:
            answer, _, words = os.read(reader, 1024).partition(b" ")
            os.close(reader)
            if words:
                notify(address, "STATUS=" + words.decode("utf-8", "replace"))
            if status == 2 << 8 and not proven:     # the configuration has never worked
                return 2
            # Python itself failed, or has gone.
            failures = failures + 1 if not answer and status in (1 << 8, 127 << 8) else 0
            pid, proven = 0, True
            due = now + float(answer or fallback) if due is None else due
        if failures >= 5:
            write_line("error", "five cycles in a row could not be started; this process ends, so that its"
                       " supervisor learns of it")
            return 1
        wakes = count_wakes(pid)
        if wakes != seen:
            seen, moved = wakes, now
        if now - moved > hung:
            write_line("error", f"the cycle has not moved for {hung} s, and is killed")
            os.kill(pid, signal.SIGKILL)
        elif not failures:
            notify(address, "WATCHDOG=1")


def command_enroll(config, options):
    """Makes this device known to the WFM: checks its identity and reports its capabilities.

    It may be repeated at any time.

    Example: margo_agent.py enroll
    """
    with Agent(config) as agent:
        agent.store.load_memo().clear()             # the trust bundle is asked for whatever its age
        agent.state["trust"].pop("refreshedAt", None)
        agent.asked = True
        try:
            for step in STEPS[:STEPS.index(Agent.reconcile)]:
                if step is Agent.exchange:
                    source = agent.connect()
                    agent.report_capabilities(always=True)
                else:
                    step(agent)
        finally:
            agent.store.save_state(agent.state)     # also what was learnt of the trust bundle
        print(f"enrolled: {source.client_id} with {config.wfm.url} as device {agent.device_id}")


def command_unenroll(config, options):
    """Deregisters this device at the WFM and forgets what was agreed.

    Workloads are left running.  `--purge` removes them first, but never their volumes.

    Example: margo_agent.py unenroll --purge
    """
    with Agent(config) as agent:
        state = agent.state
        if not any(state[part] for part in ("enrollment", "client", "deployments", "trust")):
            print("not enrolled")
            return
        if "--purge" in options:
            purge(agent)
        kept = {key: record for key, record in state["deployments"].items() if record["state"] != "removed"}
        if kept and "--purge" in options:
            raise StorageError("not everything could be removed; nothing was forgotten, run unenroll --purge"
                               " again")
        if state["enrollment"]:
            try:
                devices = state["enrollment"].get("devices") or [agent.device_id]
                for device_id in sorted(devices, reverse=True):
                    agent.connect().delete_capabilities(device_id)
            except Unreachable as error:
                error.message += (f"; nothing is forgotten until the WFM knows it; where it is gone for good,"
                                  f" remove {agent.store.folder} instead")
                raise
            except Untrusted as error:
                log("warning",
                    "the WFM does not know this client any more; the relationship is forgotten here",
                    reason=error.message)
        agent.state = dict(make_state(), deployments=kept, owners=state["owners"])
        agent.store.save_state(agent.state)
        for name in TRACES:
            remove_folder(agent.store.path(name))
        agent.store.load_memo().clear()
        print("unenrolled" + (f"; deployments that were left running: {len(kept)}" if kept else ""))
        log("warning", "the next run enrolls again: stop cron or the service where that is not wanted")


def purge(agent):
    """Removes every workload, as far as that goes, and reports it; names the volumes that are left behind."""
    if agent.state["enrollment"]:
        agent.connect()
    for record in agent.state["deployments"].values():
        record["retry"] = {}                        # a person asks: nothing waits
    version = (agent.state["accepted"] or {}).get("version", 0)
    agent.reconcile({"version": version, "deployments": []})
    agent.flush_outbox()                            # also what an earlier purge could not report
    for sight in agent.seen.values():
        driver = sight.drivers.get("compose")
        names = driver.list_volumes() if driver else ()
        if names:
            print(f"volumes are kept; `{driver.engine} volume rm {' '.join(names)}` removes them")


def command_plan(config, options):
    """Shows what `run --once` would do, and changes nothing: neither here nor at the WFM.

    Example: margo_agent.py plan --json
    """
    agent = load_agent(config)
    desired = fetch_news(agent)
    actions = plan_desired(agent, desired)
    others = ask_others(agent.seen)
    items = [{"deploymentId": action.deployment_id, "action": PRINTED.get(action.verb, action.verb),
              "reason": action.reason, "deviceId": action.device_id, "changes": load_changes(agent, action)}
             for action in actions]
    version = desired.version if desired else (agent.state["accepted"] or {}).get("version")
    if options.pop("--json", False):                # what fails after that is told on stderr alone
        print_json({"version": version, "actions": items, "others": others})
    else:
        print(f"desired state: version {version or 'none'}")
        for item in items:
            where = f"on {item['deviceId']}: " if len(agent.devices) > 1 else ""
            what = ": " + ", ".join(item["changes"]) if item["changes"] else ""
            say(f"{item['action']:8}{item['deploymentId']}  {where}{item['reason']}{what}")
        for words in make_others_words(others):
            say(f"other   {words}; it is left alone")
    silent = agent.list_silent()
    if silent:
        raise CommandError("; ".join(silent))


def load_agent(config):
    """An Agent that only looks: it has read the state, and leaves its lock alone."""
    agent = Agent(config)
    agent.hold(agent.store.load_state())
    return agent


def load_changes(agent, action):
    """What an update changes, in words that show no value: parameters, components' revisions, all else."""
    record = agent.state["deployments"].get(action.key)
    if action.verb != "update" or record["adopted"]["digest"] == action.target.digest:
        return []
    old = load_deployment(agent, record)
    return make_changes(old, action.target.deployment) if old else []


def load_deployment(agent, record):
    """The Deployment that is worked on, from a record; None where its document cannot be read."""
    target = Target(record["deploymentId"], record["adopted"]["digest"])
    return read_target(target, agent.store.load_artifact, agent.config).deployment


def make_changes(old, new):
    """What differs between two Deployments, in words."""
    parts = []
    for word in ("parameter", "component"):
        before, after = (getattr(one, word + "s") for one in (old, new))
        changed = {item.name for item in before + after if item not in before or item not in after}
        parts += [f"{word} {name}" for name in sorted(changed)]
    return parts or ["something else than parameters and components"]


def fetch_news(agent):
    """The Desired that the next run would accept, None where it goes on with what was accepted before."""
    if agent.is_downtime():
        log("warning", "downtime: the WFM is not asked; this follows from what was accepted before")
        return None
    agent.check_patience(spread=False)
    agent.connect(keep=False)
    desired = agent.fetch_desired()
    if desired:
        try:
            agent.check_removals(make_accepted(desired), agent.state["deployments"])
        except Waiting as error:
            log("warning", error.message)
    return desired


def plan_desired(agent, desired):
    """[Action] by which the next run carries out a Desired, or (None) what was accepted before."""
    stored = agent.store.load_artifact
    accepted = make_accepted(desired) if desired else agent.state["accepted"]
    new = desired.documents if desired else {}
    return agent.decide(accepted, lambda digest: new.get(digest) or stored(digest)) if accepted else []


def command_status(config, options):
    """Prints what the device knows, without asking anybody.

    Example: margo_agent.py status --json
    """
    document = status(config)
    if "--json" in options:
        return print_json(document)
    identity, desired, last = (document[name] for name in ("identity", "desiredState", "lastPoll"))
    until = f", valid until {identity['notAfter']}" if identity["notAfter"] else ""
    warning = identity["warning"] and f"  ! {identity['warning']}"
    print_row("profile", f"{document['profile']}, {'' if document['enrolled'] else 'not '}enrolled")
    print_row("device", f"{get_device_id(config.device)}, with {config.wfm.url}")
    print_row("identity", (identity["id"] or "none yet") + until + warning)
    version = f"version {desired['version']}, accepted {desired['acceptedAt']}"
    print_row("desired", version if desired["version"] else "none accepted yet")
    print_row("last poll", f"{last['at']} {last['result']} {last['detail']}" if last["at"] else "never")
    print_row("outbox", str(document["outbox"]))
    for item in document["dropped"]:
        print_row("dropped", f"{item['deploymentId']} {item['state']} at {item['at']}: {item['reason']}")
    for deployment in document["deployments"]:
        print_deployment(deployment)
    for item in document["waits"]:
        print_row("waits", f"until {item['until']} {item['reason']}")
    for words in make_others_words(document["others"]):
        print_row("other", f"{words}; it is left alone")


def print_deployment(item):
    """Prints what make_deployment_report tells, and of a component its revision, where that is known, too."""
    print_row(item["state"], f"{item['deploymentId']}  {item['name']}  on {item['deviceId']}")
    # Only a document that cannot be read leaves a deployment without components.
    for part in item["components"] or [dict(item, name="")]:
        error = part["error"]
        told = f"{error['code']}: {error['message']}" if error["code"] else ""
        print_row(f"  {part['state']}", "  ".join(filter(None, (part["name"], part.get("revision"), told))))


def say(words):
    """Prints a line for a person; nothing in it steers the terminal."""
    print(make_printable(words, MAX_MESSAGE))


def print_row(name, words):
    """Prints a line of a table of two columns."""
    say(f"{name:10} {words.strip()}")


def make_deployment_report(record):
    """What `status` tells of a deployment."""
    def tell(item, *keys):
        error = item["error"] or {"code": "", "source": "", "message": ""}
        return dict({key: item[key] for key in keys}, error=error)

    return dict(tell(record, "deploymentId", "name", "state", "deviceId"), digest=record["adopted"]["digest"],
                components=[tell(item, "name", "state") for item in record["components"]])


def status(config):
    """What the device knows, as the object that `status --json` prints (contract); raises StorageError.

    config: what load_config returns.  Nobody is asked, neither the WFM nor the engine.
    """
    store = Store(config.state_dir)
    state = store.load_state()
    memo = store.load_memo()
    clock = get_clock()
    accepted = state["accepted"] or {}
    return {
        "version": __version__,
        "profile": config.wfm.profile,
        "enrolled": bool(state["enrollment"]),
        "identity": PROFILES[config.wfm.profile](config, store, state).describe(clock.now),
        "desiredState": {key: accepted.get(key) for key in ("version", "etag", "acceptedAt")},
        "lastPoll": memo.get("lastPoll") or state["lastPoll"] or {"at": None, "result": None, "detail": ""},
        "outbox": len(state["outbox"]),
        "deployments": [make_deployment_report(record) for _, record in sorted(state["deployments"].items())],
        "dropped": [dict(refused, deploymentId=key) for key, refused in state["dropped"].items()],
        "others": memo.get("others", []),
        "waits": list_waits(state, clock, *state["deployments"].values()),
    }


def command_history(config, options):
    """Prints the last accepted desired states, newest first: when, version, what changed, what came of it.

    Example: margo_agent.py history --json
    """
    state = Store(config.state_dir).load_state()
    history = state["history"][::-1]
    if "--json" in options:
        return print_json({"history": history})
    if not history:
        print("no desired state was accepted yet")
    names = {key: record["name"] for key, record in state["deployments"].items()}
    for item in history:
        names.update(item.get("names", {}))
        changes = [f"{word} {', '.join(item[word])}" for word in ("added", "changed", "removed")
                   if item[word]]
        words = f"{'; '.join(changes) or 'nothing changed'}  {item['outcome']}"
        words = re.sub(UUID_PATTERN, lambda found: names.get(found.group().lower(), found.group()), words)
        say(f"{item['at']}  version {item['version']}  {words}")
        if item.get("refused"):
            say(f"  what came after it is refused: {item['refused']}")


def command_capabilities(config, options):
    """Prints the capabilities document that would be reported.

    Example: margo_agent.py capabilities > capabilities.json
    """
    agent = load_agent(config)
    documents = list(map(agent.profile.translate, load_capabilities(agent.devices, config).values()))
    print_json(documents if documents[1:] else documents[0])


def command_csr(config, options):
    """Makes a private key if there is none, and prints a certificate signing request for it.

    Example: margo_agent.py csr --out device.csr
    """
    if not config.identity.key:
        raise ConfigError("identity.key: not set; it says where the key is kept")
    if config.identity.get("enrollment") == "est":
        # An enrollment under way makes the key itself.  The lock goes with this process.
        store = Store(config.state_dir)
        store.create()
        store.lock()
    try:
        obtain_key(config.identity.key, config.identity.get("algorithm"))
        request_pem = run_csr(config.identity.key)
    except CommandError as error:
        raise Untrusted(f"identity.key {config.identity.key}: {error.message}") from None
    if "--out" in options:
        write_file(os.path.abspath(options["--out"]), request_pem, 0o644)
    else:
        sys.stdout.write(request_pem.decode())


def command_retry(config, options):
    """Lets the next run try failed deployments at once.

    Without a name it tries all of them, and no longer waits as the WFM or an identity service has asked.

    Example: margo_agent.py retry hello
    """
    with Agent(config) as agent:
        state = agent.state
        names = options["operands"]
        records = [find_record(state, name) for name in names] or state["deployments"].values()
        failed = [record for record in records if record["state"] == "failed"]
        if names and not failed:
            raise ConfigError(f"{names[0]} is no failed deployment; `status` lists them")
        for record in failed:
            record.update(retry={}, repair={})
        if not names:
            state.update(patience={}, waits={})
            state["est"].update(delay=0)
            state["trust"].pop("quiet", None)
        agent.store.save_state(state)
        if "--json" in options:
            return print_json({"retried": [record["deploymentId"] for record in failed]})
        print(f"{len(failed)} failed deployment{'s'[:len(failed) != 1]} will be tried again by the next run")


def find_record(state, word):
    """The record of a deployment by its id, the beginning of its id, or its name; raises ConfigError."""
    records = state["deployments"]
    found = [key for key in records if key.startswith(word.lower()) or records[key]["name"] == word]
    if len(found) != 1:
        fault = "may be several deployments" if found else "is no deployment of this device"
        raise ConfigError(f"{word} {fault}; `status` lists their ids and names")
    return records[found[0]]


def command_version(config, options):
    """Prints the version and the supported profiles.

    Example: margo_agent.py version --json
    """
    if "--json" in options:
        return print_json({"version": __version__, "profiles": list(PROFILES)})
    print(f"margo_agent {__version__} (profiles: {', '.join(PROFILES)})")


def print_json(value):
    """Prints one JSON document, for people and programs alike: nothing in it steers a terminal.

    It is escaped where that would, or where the locale lacks a character.
    """
    import json
    text = json.dumps(value, indent=2, ensure_ascii=False)
    encoding = sys.stdout.encoding or "ascii"
    shown = text.replace("\n", "").isprintable() and text == text.encode(encoding, "replace").decode(encoding)
    print(text if shown else json.dumps(value, indent=2))


COMMANDS.update({
    "enroll": (command_enroll, ""),
    "run": (command_run, "[--once] [--spread TIME] [--json]"),
    "plan": (command_plan, "[--json]"),
    "status": (command_status, "[--json]"),
    "history": (command_history, "[--json]"),
    "capabilities": (command_capabilities, "[--json]"),
    "csr": (command_csr, "[--out FILE]"),
    "retry": (command_retry, "[NAME] [--json]"),
    "unenroll": (command_unenroll, "[--purge]"),
    "version": (command_version, "[--json]"),
    **COMMANDS,                                     # an optional room may know more of a command
})
USAGE = "[-c FILE] [-v] [-q] [--log-format text|json] [--help]"     # before or behind any command
SPELLINGS = {"--config": "-c", "--verbose": "-v", "--quiet": "-q", "-h": "--help", "help": "--help",
             "--version": "version"}


Misuse = define_fault("Misuse", 2, "CONFIGURATION", "The command line is wrong.", ConfigError)


def parse_usage(usage):
    """A usage such as `NAME [SERVICE] [--tail N] [-f]` to [operand] and {option: what follows it, or ""}."""
    return usage.partition("[-")[0].split(), dict(re.findall(r"\[(-[^] ]+) ?([^]]*)\]", usage))


def parse_arguments(arguments):
    """The command line as a dictionary: `command`, `operands`, `arguments` as given, and each option.

    Raises ConfigError.
    """
    options = {"command": "", "operands": [], "arguments": list(arguments)}
    rest = list(arguments)
    usage = USAGE
    while rest:
        word = rest.pop(0)
        command = options["command"]
        word = word if command else SPELLINGS.get(word, word)
        if word.startswith("-"):
            parse_option(word, rest, parse_usage(usage)[1], options)
        elif not command:
            options["command"] = check_word(word, "command", COMMANDS)
            usage += COMMANDS[word][1]
        elif word:
            options["operands"].append(word)
        else:
            raise Misuse(f"{command}: an empty word names nothing")
    if options.get("--log-format", "text") not in ("text", "json"):
        raise Misuse("--log-format: text or json")
    if "-v" in options and "-q" in options:
        raise Misuse("-v and -q: only one of them")
    return options


def parse_option(word, rest, known, options):
    """Adds an option of {option: what follows it} to `options`; its value may be the first word of the rest.

    A short one may be followed by its value (-cFILE), or by other short ones (-fv).
    """
    name, given, value = re.fullmatch(r"(--[^=]*|-.?)(=?)(.*)", word, re.S).groups()
    name = check_word(SPELLINGS.get(name, name), "option", known)
    if known[name]:
        if not given and not value and rest:
            value = rest.pop(0)
        if not value:
            raise Misuse(f"{name}: needs a value: write {name} {known[name]}")
    elif given:
        raise Misuse(f"{word}: takes no value")
    elif value:
        rest.insert(0, f"-{value}")
    options[name] = value or True


def check_word(word, kind, known):
    """The word, where it is known; else raises ConfigError that names the nearest one."""
    if word in known:
        return word
    raise Misuse(f"{word}: unknown {kind}; {make_hint(word, known)}")


def print_help(command=None):
    """Prints the usage of all commands, with the first sentence on each, or everything on one."""
    import textwrap
    if not command:                                 # Python's option -OO keeps no docstrings
        print((__doc__ or "\n\n\n\n").split("\n\n")[2] + "\n")
    for name in [command] if command else COMMANDS:
        function, usage = COMMANDS[name]
        words = f" {name} {usage}"
        first, _, more = (function.__doc__ or "").partition("\n\n")
        print(textwrap.fill(f"{words:27} {first}", 79, subsequent_indent=" " * 28))
        if command:
            print("\n" + textwrap.dedent(more))


def run_main(arguments):
    """Reads command line and configuration and runs the command; returns its exit code or raises."""
    options = parse_arguments(arguments)
    command = options["command"]
    log.form = options.get("--log-format", "text")
    if not arguments or "--help" in options:
        print_help(command)
        return 0 if arguments else 2
    if not command:
        raise Misuse("no command; one of " + ", ".join(COMMANDS))
    function, usage = COMMANDS[command]
    operands, _ = parse_usage(usage)
    given = options["operands"]
    for extra in given[len(operands):]:
        raise Misuse(f"{extra}: {command} takes no such operand")
    if not given and operands and operands[0].isalpha():
        raise Misuse(f"{command}: needs {operands[0]}")
    if function is command_version or "--example" in options:
        return function(None, options) or 0
    options["-c"] = options.get("-c") or os.environ.get("MARGO_CONFIG") or "/etc/margo/agent.yaml"
    try:
        config = load_config(options["-c"])
        log.level = "error" if "-q" in options else config.log.level
        if "-v" in options:
            log.level = "debug"
        return function(config, options) or 0
    except MargoError as error:
        if "--json" in options:                     # who reads JSON gets some
            print_json({"error": {"code": error.code, "message": error.message}})
        raise


def prepare_streams():
    """Makes the standard streams take any text.

    A closed one (`>&-`) leads nowhere, so that no file of ours takes its place.  What the locale's encoding
    lacks is escaped.
    """
    spare = 0
    while spare < 3:
        spare = os.open(os.devnull, os.O_RDWR)
        os.set_inheritable(spare, spare < 3)
    os.close(spare)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    if hasattr(sys.stdout, "reconfigure"):          # whoever embeds this may have put something else there
        sys.stdout.reconfigure(errors="backslashreplace")


def main(arguments=None):
    """The command line: takes a list of arguments (default: those of the process), returns an exit code.

    It never raises for what went wrong.
    """
    try:
        prepare_streams()
        code = run_main(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0                                    # the reader of our output has seen enough
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = tell_fault(error)
    try:
        sys.stderr.flush()
    except OSError:                                 # a log on a full disk is no reason for another exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return code


def tell_fault(error):
    """Logs what ended a command, and returns the exit code for it."""
    import errno
    # `idna` needs unicodedata
    if isinstance(error, ImportError) or str(error).startswith("unknown encoding"):
        log.form = "text"                           # the other form needs a module itself
        error = ConfigError(f"this Python lacks a part of its standard library ({error}); install it (see"
                            " README, Small devices)")
    elif getattr(error, "errno", 0) == errno.ENOSPC and not error.filename:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        error = StorageError(f"the output cannot be written ({error.strerror})")
    if isinstance(error, Misuse) and log.form == "text":
        words = make_printable(error.message, MAX_MESSAGE)
        log.write(f"margo-agent: {words}")          # for who typed it, not for a log
        return error.exit
    fault = to_fault(error)
    if not isinstance(fault, MargoError):
        fault = MargoError(f"bug: {type(error).__name__}: {error}; run again with -v and report what it"
                           " prints")
    log("error", fault.message, code=fault.code)
    if fault is not error:
        import traceback
        log("debug", traceback.format_exc())
    return fault.exit


if __name__ == "__main__":
    signal.signal(signal.SIGINT, at_interrupt)
    sys.exit(main())
