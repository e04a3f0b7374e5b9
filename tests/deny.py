"""Runs the agent, and the operating system denies it one thing: python3 -S tests/deny.py NUMBER ERROR FILE ARGUMENT...

Counted are what the agent itself calls in `os`, opening a file, locking, starting a program and waiting for it; the call of this number
raises OSError.  With 0 nothing is denied.  The last line on stderr is the number of calls and what was denied.
"""
import builtins
import errno
import os
import sys
from importlib import import_module

CALLS = ("chmod chown fchmod fstat fsync link listdir lstat mkdir open pipe read readlink remove rename replace rmdir scandir stat statvfs symlink"
         " unlink write").split()


class Denial:
    """What is denied: the call of this number by this error."""

    def __init__(self, number, code):
        self.number, self.code, self.count, self.denied = number, code, 0, ""

    def wrap(self, call, name):
        def denied(*arguments, **options):
            if sys._getframe(1).f_code.co_filename == sys.argv[0]:
                self.count += 1
                if self.count == self.number:
                    self.denied = name
                    path = arguments[0] if arguments and isinstance(arguments[0], str) else None
                    raise OSError(self.code, os.strerror(self.code), path)
            return call(*arguments, **options)
        return denied


def main():
    _, number, code, file, *arguments = sys.argv
    sys.argv[:] = [file] + arguments
    sys.path[0], _, name = file.rpartition("/")
    agent = import_module(name[:-len(".py")])
    import fcntl
    import select
    import subprocess
    denial = Denial(int(number), getattr(errno, code))
    for holder, names in ((os, CALLS), (builtins, ["open"]), (fcntl, ["flock"]), (select, ["select"]), (subprocess, ["Popen"])):
        for word in names:
            setattr(holder, word, denial.wrap(getattr(holder, word), f"{holder.__name__}.{word}"))
    result = agent.main(arguments)
    sys.stderr.write(f"{denial.count} {denial.denied}\n")
    return result


if __name__ == "__main__":
    sys.exit(main())
