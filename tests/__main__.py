"""Every test, as CI runs it: side by side, and what failed there once more by itself.

    python -m equipoise.tests               everything
    python -m equipoise.tests tests/gpuctl  a part; arguments are pytest's

Tests of a loaded machine must wait for conditions and not for times, but where three files share two cores one of
them now and then meets a limit of the product's own. Such a test is run again alone, and what it says there counts; it
is named at the end, since a test that leans on the machine is to be mended. More than a few failures are no accident
and are not run again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

WORKERS = 3
"""One boots the guest and waits for it, and most of the others' time is waiting as well."""
AGAIN_AT_MOST = 8
FAILED = 1
"""pytest's exit code where tests have failed, and nothing else went wrong."""


def main(arguments: list[str]) -> int:
    # What failed in a run before this one is not this one's.
    code = _pytest("--cache-clear", "-n", str(WORKERS), "-p", "equipoise.tests.side_by_side", *arguments)
    failed = _failed()
    if code != FAILED or not 0 < len(failed) <= AGAIN_AT_MOST:
        return code
    print(f"== {len(failed)} failed; once more, each by itself", flush=True)
    code = _pytest("--durations=0", "--durations-min=1", *failed)
    passed = sorted(set(failed) - set(_failed())) if code in (0, FAILED) else []
    if passed:
        print(f"== LEANS ON THE MACHINE: {len(passed)} failed beside others and passed alone")
        print(*passed, sep="\n", flush=True)
    return code


def _pytest(*arguments: str) -> int:
    try:
        return subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], check=False).returncode
    except KeyboardInterrupt:
        return 130  # pytest got it as well and has cleaned up


def _failed() -> list[str]:
    """Node ids that pytest's cache has as failed, in the order of their files."""
    file = Path(".pytest_cache/v/cache/lastfailed")
    return sorted(json.loads(file.read_text())) if file.exists() else []


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
