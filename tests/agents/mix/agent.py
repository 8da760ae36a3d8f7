"""An agent of our own that does what a plan says and writes down what it started: the truth for the mix.

A program by itself (standard library only): `python agent.py PLAN LOG PORT`. It speaks to a model on PORT once a turn:
what it is about to be asked for goes out, and it goes on when the answer is there. Owns the log: one line of JSON for
each thing that it started, with its number in the plan, its pid (0: started by a shell) and CLOCK_MONOTONIC in ns.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from typing import Any

Step = dict[str, Any]


class Model:
    """The connection that makes this process the agent."""

    def __init__(self, port: int) -> None:
        self.stream = socket.create_connection(("127.0.0.1", port)).makefile("rw")

    def turn(self, asks: list[tuple[str, str]]) -> None:
        """Results of the turn before go in, and these calls are asked for."""
        self.stream.write(json.dumps(asks) + "\n")
        self.stream.flush()
        assert self.stream.readline(), "the model is gone"


class Shell:
    """A persistent shell, fed line by line."""

    def __init__(self, argv: list[str], how: str) -> None:
        self.lock = threading.Lock()
        if how == "terminal":
            self.ours, theirs = pty.openpty()
            raw = termios.tcgetattr(theirs)
            raw[3] &= ~termios.ECHO
            termios.tcsetattr(theirs, termios.TCSANOW, raw)
        elif how == "socket":
            pair = socket.socketpair()
            self.ours, theirs = pair[0].detach(), pair[1].detach()
        else:
            theirs, self.ours = os.pipe()
        environment = {**os.environ, "PS1": "", "TERM": "dumb"}
        self.process = subprocess.Popen(
            argv, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
            start_new_session=how == "terminal",
        )  # fmt: skip
        os.close(theirs)

    def line(self, number: int, text: str) -> int:
        """Its exit code, as the shell tells it."""
        with self.lock:
            os.write(self.ours, f'{text}\necho "said-{number} $?"\n'.encode())
            assert self.process.stdout is not None
            while True:
                said = self.process.stdout.readline().decode(errors="replace")
                assert said, "the shell has ended"
                if f"said-{number} " in said:
                    return int(said.split(f"said-{number} ")[1].split()[0])

    def close(self) -> None:
        os.close(self.ours)
        self.process.kill()
        self.process.communicate()


class Agent:
    def __init__(self, plan: dict[str, Any], log: str, port: int) -> None:
        self.plan = plan
        self.port = port
        self.log = open(log, "w", buffering=1)  # noqa: SIM115 - as long as the agent
        self.lock = threading.Lock()
        self.shells: dict[str, Shell] = {}
        self.kept: list[subprocess.Popen[bytes]] = []

    def run(self) -> None:
        self.note("runtime", 0, os.getpid(), time.monotonic_ns(), None, None)
        for step in self.plan["before"]:
            self.do(step)
        model = Model(self.port)
        time.sleep(0.3)  # a real one waits for an answer longer than that
        for turn in self.plan["turns"]:
            # A real conversation takes seconds a turn: what a call left running may stay, what it ended has ended.
            calls = [step for step in turn if step["role"] == "tool call"]
            model.turn([(f"call-{step['number']}", step["text"]) for step in calls])
            threads = [threading.Thread(target=self.do, args=(step,)) for step in turn]
            for thread in threads:
                thread.start()
                if not self.plan["at_once"]:
                    thread.join()
            for thread in threads:
                thread.join()
        model.turn([])
        time.sleep(self.plan["stays_s"])
        for shell in self.shells.values():
            shell.close()
        for child in self.kept:
            child.kill()
            child.communicate()

    def note(self, role: str, number: int, pid: int, began: int, ended: int | None, code: int | None) -> None:
        with self.lock:
            print(json.dumps([role, number, pid, began, ended, code]), file=self.log, flush=True)

    def do(self, step: Step) -> None:
        began, number, role = time.monotonic_ns(), step["number"], step["role"]
        how, text = step["how"], step["text"]
        if how == "spawned workers":
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                pids = [process.pid for process in multiprocessing.active_children()]
                pool.map(abs, range(4))
                for pid in pids:
                    self.note(role, number, pid or 0, began, None, None)
            return
        if how.startswith("shell "):
            code, pid = self.shell(how).line(number, text), 0
        elif how == "stays":
            child = subprocess.Popen(shlex.split(text), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.kept.append(child)
            self.note(role, number, child.pid, began, None, None)
            time.sleep(0.1)
            return
        else:
            argv, options = started_as(how, text, f"call-{number}", self.plan["folder"])
            child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
            )
            pid = child.pid
            child.communicate()
            code = child.returncode
        self.note(role, number, pid, began, time.monotonic_ns(), code)

    def shell(self, how: str) -> Shell:
        """Of one kind one is started and kept."""
        if how not in self.shells:
            _, program, fed = how.split()
            argv = {"bash": ["bash", "--norc", "--noprofile"], "dash": ["dash"], "sh": ["/bin/sh", "-s"]}[program]
            began = time.monotonic_ns()
            self.shells[how] = Shell(argv, fed)
            self.note("shell", 0, self.shells[how].process.pid, began, None, None)
            time.sleep(0.2)  # agents wait for a shell's first prompt
        return self.shells[how]


def started_as(how: str, text: str, call: str, folder: str) -> tuple[list[str], dict[str, Any]]:
    """What this way of starting a command execs, and the options of Popen."""
    known = " && ".join(
        ["source /dev/null 2>/dev/null || true", f"eval {shlex.quote(text)} < /dev/null", "pwd -P >| /dev/null"]
    )
    trapped = (
        f"_bgpids_file=/dev/null\n(\n  trap 'jobs -p > \"$_bgpids_file\"' EXIT\n{text}\n)\n__code=$?\nexit $__code"
    )
    codex = ["/bin/sh", "-c", f"exec '/bin/bash' -c {shlex.quote(text)}", "codex", "--codex-run-as-process-setup"]
    environment = {**os.environ, "PATH": f"{folder}/shims:{os.environ['PATH']}"}
    argv = {
        "argv": lambda: shlex.split(text),
        "sh -c": lambda: ["sh", "-c", text],
        "bash -c": lambda: ["/bin/bash", "-c", text],
        "bash -lc": lambda: ["bash", "--norc", "-c", f"cd / && {text}"],
        "dash -c": lambda: ["dash", "-c", text],
        "session": lambda: ["bash", "-c", text],
        "env": lambda: ["env", "LANG=C", "bash", "-c", text],
        "timeout": lambda: ["timeout", "20", "bash", "-c", text],
        "nice nohup": lambda: ["nice", "nohup", "sh", "-c", text],
        "sudo": lambda: [f"{folder}/shims/sudo", "bash", "-c", text],
        "npx": lambda: [f"{folder}/shims/npx", text],
        "pyenv": lambda: [f"{folder}/shims/shimmed-bash", "-c", text],
        "wrapper": lambda: [sys.executable, "-m", "equipoise.daemon.cli", "tool", "--", "bash", "-c", text],
        "as claude": lambda: ["/bin/bash", "-c", known],
        "as codex": lambda: codex,
        "as opencode": lambda: ["/bin/bash", "-c", text],
        "as gemini": lambda: ["bash", "-c", trapped],
    }[how]()  # fmt: skip
    options: dict[str, Any] = {"env": environment}
    if how in ("session", "as claude", "as opencode", "as gemini"):
        options["start_new_session"] = True
    if how == "as codex":
        options["env"] = {**environment, "CODEX_TOOL_CALL_ID": call, "CODEX_THREAD_ID": "thread"}
    return argv, options


if __name__ == "__main__":
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    with open(sys.argv[1]) as file:
        Agent(json.load(file), sys.argv[2], int(sys.argv[3])).run()
