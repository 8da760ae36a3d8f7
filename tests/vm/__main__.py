"""`python -m equipoise.tests.vm`: run a command, a shell or the package fetch of the test VM."""

import argparse
import json
import sys

from .errors import VmError
from .machine import Machine, settings_from_environment


def main() -> int:
    """Exit code: the command's own; 124 where a time limit ended it; 125 where the VM could not be run."""
    parser = argparse.ArgumentParser(prog="python -m equipoise.tests.vm", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run one command in a fresh guest")
    run.add_argument("command", nargs=argparse.REMAINDER, help="-- CMD ARG...")
    verbs.add_parser("shell", help="an interactive shell in a fresh guest")
    verbs.add_parser("packages", help="fetch what the VM is made of and print the versions")
    arguments = parser.parse_args()
    try:
        machine = Machine(settings_from_environment())
        if arguments.verb == "packages":
            machine.prepare()
            print(json.dumps(machine.packages.versions(), indent=2))
            return 0
        if arguments.verb == "shell":
            return machine.shell()
        command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
        if not command:
            parser.error("run needs a command: run -- CMD ARG...")
        outcome = machine.run(command)
        if outcome.failure is not None:
            print(f"vm: {outcome.failure}", file=sys.stderr)
        return outcome.exit_code
    except VmError as error:
        print(f"vm: {error}", file=sys.stderr)
        return 125
    except KeyboardInterrupt:
        print("vm: interrupted, guest ended", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
