"""`equipoise policy`: check, show, diff, apply and schema of policy documents. Owns parsing and printing."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from ...policies.document import changes, json_schema, written
from ...policies.policy import Policy
from ..errors import CommandError
from ..policy import BUILTINS, PolicyError, Sources, Text, builtin_text, dump, policy_of
from ..rpc import client
from .adding import Command, Commands, add

_WORDS = f"""POLICY is a file (with the policies.d/*.yaml beside it), a folder of files, or a built-in name:
{", ".join(BUILTINS)}. Of several, the last is said over the others."""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "policy",
        help="check, show, compare and apply policy documents",
        description=f"Check, show, compare and apply policy documents.\n\n{_WORDS}",
        epilog="examples:\n"
        "  equipoise policy show laptop > policy.yaml     begin with a built-in one\n"
        "  equipoise policy check policy.yaml\n"
        "  equipoise policy diff policy.yaml              against what the daemon has in force\n"
        "  equipoise policy apply policy.yaml             until its files change or it ends\n"
        "  equipoise policy schema > equipoise.schema.json    for editors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    check = _add(
        actions,
        "check",
        _check,
        "say everything that is wrong with a policy, and where",
        "equipoise policy check policy.yaml",
        "equipoise policy check laptop site.yaml --json     site.yaml over the built-in laptop",
    )
    check.add_argument("policy", nargs="+", metavar="POLICY")
    check.add_argument("--json", action="store_true", help="one JSON object")
    show = _add(
        actions,
        "show",
        _show,
        "print a policy",
        "equipoise policy show                              the default one, with its comments",
        "equipoise policy show evaluation-farm",
        "equipoise policy show --whole laptop site.yaml     as one document, every default written out",
        "equipoise policy show --running                    what the daemon has in force",
    )
    show.add_argument("policy", nargs="*", metavar="POLICY")
    show.add_argument("--whole", action="store_true", help="all layers as one document, every default written out")
    show.add_argument("--running", action="store_true", help="what the daemon has in force, and where it is from")
    show.add_argument("--json", action="store_true", help="as --whole, one JSON object")
    diff = _add(
        actions,
        "diff",
        _diff,
        "say what differs between two policies",
        "equipoise policy diff policy.yaml                  what would change if the daemon had it in force",
        "equipoise policy diff default laptop",
    )
    diff.add_argument("before", metavar="POLICY", help="with one POLICY: the one to come; with two: the one before")
    diff.add_argument("after", nargs="?", metavar="POLICY")
    diff.add_argument("--exit-code", action="store_true", help="exit with 1 where they differ")
    diff.add_argument("--json", action="store_true", help="one JSON array")
    apply = _add(
        actions,
        "apply",
        _apply,
        "put a policy in force in the running daemon, or have it read its files again",
        "equipoise policy apply policy.yaml                 all of it, or nothing",
        "equipoise policy apply --check policy.yaml         only say what would change",
        "equipoise policy apply                             read the daemon's own files again",
    )
    apply.add_argument("policy", nargs="*", metavar="POLICY")
    apply.add_argument("--check", action="store_true", help="change nothing")
    apply.add_argument("--json", action="store_true", help="one JSON object")
    _add(
        actions,
        "schema",
        _schema,
        "print the JSON Schema of a policy document",
        "equipoise policy schema > equipoise.schema.json    then, in the first line of a policy:",
        "# yaml-language-server: $schema=equipoise.schema.json",
    )
    for each in (show, diff, apply):
        client.add_socket_argument(each)


def _add(actions: Commands, name: str, run: Command, text: str, *examples: str) -> argparse.ArgumentParser:
    return add(actions, name, run, text, *examples, more=_WORDS)


def _check(arguments: argparse.Namespace) -> int:
    try:
        policy = Sources(arguments.policy).load()
    except PolicyError as error:
        if not arguments.json:
            raise
        print(json.dumps({"ok": False, "errors": [asdict(each) for each in error.problems]}, indent=1))
        return 1
    if arguments.json:
        print(json.dumps({"ok": True, "policy": policy.name, "errors": []}))
        return 0
    tenants = ", ".join(f"{t.id} (weight {t.weight:g})" for t in policy.tenants)
    files, mode = " ".join(arguments.policy), policy.mode.value
    print(f"{files}: policy {policy.name} is well formed; mode {mode}; tenants: {tenants}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    if arguments.running and arguments.policy:
        raise CommandError("--running shows what the daemon has in force: leave POLICY out")
    if arguments.running:
        return _show_running(arguments)
    words: list[str] = arguments.policy or ["default"]
    if arguments.json:
        print(json.dumps(written(Sources(words).load()), indent=1))
    elif arguments.whole or len(Sources(words).files()) > 1:
        print(dump(Sources(words).load()), end="")
    elif words[0] in BUILTINS:
        print(builtin_text(words[0]), end="")
    else:
        (text,) = Sources(words).texts()
        policy_of((text,))
        print(text.text, end="")
    return 0


def _show_running(arguments: argparse.Namespace) -> int:
    found = client.get_policy(arguments.socket)
    if arguments.json:
        policy = policy_of((Text("in force", found.document),))
        print(json.dumps(written(policy) | {"layers": list(found.layers), "refused": list(found.refused)}, indent=1))
        return 0
    print("".join(f"# from {layer}\n" for layer in found.layers), end="")
    for line in found.refused:
        print(f"equipoise: not in force: {line}", file=sys.stderr)
    print(found.document, end="")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    if arguments.after is None:
        running = client.get_policy(arguments.socket)
        before, after = policy_of((Text("in force", running.document),)), _load([arguments.before])
    else:
        before, after = _load([arguments.before]), _load([arguments.after])
    found = changes(before, after)
    print(json.dumps(found, indent=1) if arguments.json else "\n".join(found) or "no difference")
    return 1 if found and arguments.exit_code else 0


def _load(words: Sequence[str]) -> Policy:
    return Sources(words).load()


def _apply(arguments: argparse.Namespace) -> int:
    if arguments.check and not arguments.policy:
        raise CommandError("check what? equipoise policy apply --check POLICY")
    texts = Sources(arguments.policy).texts() if arguments.policy else ()
    if texts:
        policy_of(texts)  # here: everything that is wrong, where an answer of the daemon has room for the first lines
    answered = client.apply_policy(
        arguments.socket, [(text.name, text.text) for text in texts], only_check=arguments.check
    )
    found = list(answered.changes)
    if arguments.json:
        print(json.dumps({"policy": answered.policy_name, "applied": not arguments.check, "changes": found}, indent=1))
        return 0
    print("\n".join(found) or "nothing changes: it is in force already")
    if not arguments.check:
        until = "until its files change or it ends" if texts else "from its own files"
        print(f"policy {answered.policy_name} is in force {until}")
    return 0


def _schema(_: argparse.Namespace) -> int:
    print(json.dumps(json_schema(), indent=1))
    return 0
