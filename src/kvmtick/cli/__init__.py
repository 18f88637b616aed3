"""The command line: `kvmtick VERB`. One module a verb, imported when the verb runs."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from kvmtick import __version__
from kvmtick.abi.errors import HostError

__all__ = [
    "EXIT_DIFFERENCE",
    "EXIT_GUEST",
    "EXIT_HOST",
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "EXIT_USAGE",
    "UsageError",
    "main",
]

EXIT_OK = 0
EXIT_DIFFERENCE = 1
EXIT_USAGE = 2
EXIT_HOST = 3
EXIT_GUEST = 4
EXIT_INTERRUPTED = 130

VERBS = {
    "run": "boot a guest and follow its ticks",
    "record": "record the ticks of the VMs on this host",
    "report": "explain a recording, a trace or a run: findings first, numbers after",
    "query": "ask a recording by SQL",
    "compare": "run a guest on the model and on the kernel: does the same happen?",
    "conform": "run the conformance suite on the model or on /dev/kvm",
    "fuzz": "look for a difference between the model and /dev/kvm",
    "bench": "how fast it is, beside QEMU and Bochs in the same run",
    "doctor": "what this machine offers, what it lacks, what to do about it",
}

HELP = """\
usage: kvmtick VERB [OPTION ...]
       kvmtick VERB --help

Follow a timer tick through KVM: from the expiry of the PIT's hrtimer, through the kvm-pit worker,
GSI 0, the PIC and the VM entry, to the guest's handler and its EOI. The chips are a model of the
kernel's, under real guest code, in deterministic virtual time: no /dev/kvm and no root needed.
The VMs of a real host are recorded and explained in the same words.

verbs:
{verbs}

options:
  -h, --help     this page
  --version      the version

examples:
  kvmtick run                                   1,000 ticks at 1 kHz, what became of each
  kvmtick run tick-if0 --no-reinject            interrupts off for 50 ms: what is lost?
  kvmtick run --story 3                         the life of tick 3, step by step
  kvmtick run --fault worker_delay=exp:200us    a host whose kvm-pit thread is late
  kvmtick run my.bin --for 10s --trace out.txt  your own image; its events as ftrace text
  kvmtick run --json | jq .ticks                for programs
  kvmtick run linux                             an installed kernel, to a prompt
  kvmtick record --for 10s -o t.ktrace          the ticks of all VMs on this host
  kvmtick report t.ktrace --html t.html         which were late or lost, why, what to do
  kvmtick compare tick-if0                      the same on the real kernel: does it differ?
  kvmtick conform --backend kernel              does this host's KVM do what KVM must?
  kvmtick fuzz --for 10m                        random operations on both, compared after each

exit codes:
  0 fine   1 a difference, or a case that failed   2 usage   3 the host lacks what was asked for
  4 the guest failed (triple fault, deadlock, wall-time limit)   130 interrupted
"""


class UsageError(Exception):
    """The command line asks for something that cannot be; one line that names it and the remedy."""


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"kvmtick: {error}", file=sys.stderr)
        return EXIT_USAGE
    except HostError as error:
        print(f"kvmtick: {error}", file=sys.stderr)
        return EXIT_HOST
    except KeyboardInterrupt:
        print("kvmtick: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough (`| head`); say nothing, not even at exit.
        _forget_output()
        return EXIT_OK
    except ImportError as error:
        print(f"kvmtick: {error}; see kvmtick doctor", file=sys.stderr)
        return EXIT_HOST
    except OSError as error:
        print(f"kvmtick: {error.strerror or error}: give the output some place", file=sys.stderr)
        _forget_output()
        return EXIT_HOST


def _forget_output() -> None:
    """What is still buffered for stdout goes nowhere, so that Python's exit has nothing to say."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help", "help"):
        print(
            HELP.format(verbs="\n".join(f"  {v:<14} {text}" for v, text in VERBS.items())), end=""
        )
        return EXIT_OK
    if verb == "--version":
        print(f"kvmtick {__version__}")
        return EXIT_OK
    if verb not in VERBS:
        raise UsageError(f"unknown verb {verb!r}: choose {' or '.join(VERBS)}; see kvmtick --help")
    module = import_module(f"kvmtick.cli.{verb}")
    code: int = module.main(arguments[1:])
    return code
