"""The sample project every agent of the demo works on, and the jobs it runs there.

Owns the text of those files and how they are laid out in a working directory (a git repository of its own). Must not:
run any of it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_CART = '''"""Adding up a cart."""


def total(prices, discount=0.0):
    """Sum of the prices, less the discount (0..1)."""
    return sum(prices) * (1 + discount)


def receipt(prices, discount=0.0):
    return f"{len(prices)} items, {total(prices, discount):.2f}"
'''

_FIX = """--- a/shop/cart.py
+++ b/shop/cart.py
@@ -3,7 +3,7 @@

 def total(prices, discount=0.0):
     \"\"\"Sum of the prices, less the discount (0..1).\"\"\"
-    return sum(prices) * (1 + discount)
+    return sum(prices) * (1 - discount)


 def receipt(prices, discount=0.0):
"""

_CATALOGUE = '''"""All articles in memory: what makes the test run heavy."""


def load(count):
    return {f"article-{n}": {"name": f"Article number {n}", "price": n % 997 / 10} for n in range(count)}
'''

_TEST_CART = """from shop.cart import receipt, total


def test_total_adds_prices():
    assert total([1.0, 2.5]) == 3.5


def test_discount_is_subtracted():
    assert total([10.0], discount=0.5) == 5.0


def test_receipt_counts_items():
    assert receipt([1.0, 1.0]).startswith("2 items")
"""

_TEST_CATALOGUE = """import time

import pytest

from shop.catalogue import load


@pytest.fixture(scope="module")
def catalogue():
    return load(250_000)


def test_every_article_has_a_price(catalogue):
    assert all("price" in article for article in catalogue.values())


def test_payment_service_answers(catalogue):
    time.sleep(3)  # the service is slow, as services are
    assert len(catalogue) == 250_000
"""

_BURST = '''"""A data job: grows by MEBIBYTES in one burst, works on them for SECONDS, prints a checksum."""

import sys
import time

mebibytes, seconds = int(sys.argv[1]), float(sys.argv[2])
blocks = []
for number in range(mebibytes // 4):
    block = bytearray(4 << 20)
    block[::4096] = bytes([number % 251 + 1]) * 1024  # touch every page: memory the kernel has to find
    blocks.append(block)
end = time.monotonic() + seconds
checksum = 0
while time.monotonic() < end:
    checksum = (checksum + sum(blocks[checksum % len(blocks)][::65536])) % 1_000_003
    time.sleep(0.05)
print(f"loaded {len(blocks) * 4} MiB of orders, 7 regions, checksum {checksum}")
'''

_RUNAWAY = '''"""A join that never ends. Harmless: gives up at 3 GiB in case nobody stops it."""

import sys
import time

rows = []
while len(rows) < 768:
    row = bytearray(4 << 20)
    for page in range(0, len(row), 4096):
        row[page] = 1
    rows.append(row)
    time.sleep(0.004)
print("nobody stopped me: gave up at 3 GiB")
sys.exit(3)
'''

_SERVE = '''"""A development server that outlives the command that started it. Writes its port to a file; ends alone."""

import http.server
import pathlib
import sys
import threading
import time

port_file, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
cache = bytearray(64 << 20)
cache[::4096] = b"x" * (len(cache) // 4096)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"ok, {len(cache) >> 20} MiB of articles cached".encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        return None


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
port_file.write_text(str(server.server_address[1]))
threading.Thread(target=server.serve_forever, daemon=True).start()
time.sleep(seconds)
server.shutdown()
'''

_FETCH = '''"""Ask the development server for its state."""

import pathlib
import sys
import time
import urllib.request

for _ in range(20):
    try:
        port = int(pathlib.Path(sys.argv[1]).read_text())
        print(urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=3).read().decode())
        break
    except (OSError, ValueError):
        time.sleep(0.2)
else:
    print("the server does not answer")
    sys.exit(1)
'''

_REVIEW = '''"""Wait for an answer from outside: almost no memory, no CPU, many seconds."""

import sys
import time

time.sleep(float(sys.argv[1]))
print("review: looks fine, please add a test for a discount of zero")
'''

_MAIN_C = """#include <stdio.h>
#include <stdlib.h>

extern double run_all(double seed);

int main(int argc, char **argv)
{
	double sum = 0;
	int rounds = argc > 1 ? atoi(argv[1]) : 1;

	for (int i = 0; i < rounds * 2000; i++)
		sum += run_all(i);
	printf("checksum %.6f\\n", sum);
	return 0;
}
"""


def _kernels_c(count: int) -> str:
    """`count` small functions and one that calls them all: enough for a compiler to grow by some 100 MiB."""
    parts = ["#include <math.h>"]
    for n in range(count):
        parts.append(
            f"static double k{n}(double x)\n{{\n\tdouble a[8];\n\tfor (int i = 0; i < 8; i++)\n"
            f"\t\ta[i] = x * {n % 13 + 1} + i * {n % 7 + 1}.5;\n"
            f"\tfor (int i = 1; i < 8; i++)\n\t\ta[i] += a[i - 1] / (a[i] * a[i] + {n + 1}.0);\n"
            f"\treturn a[7] / (x + {n + 2}.0);\n}}"
        )
    calls = "\n".join(f"\tsum += k{n}(seed);" for n in range(count))
    parts.append(f"double run_all(double seed)\n{{\n\tdouble sum = 0;\n{calls}\n\treturn sum;\n}}\n")
    return "\n\n".join(parts)


_FILES = (
    ("shop/__init__.py", ""),
    ("shop/cart.py", _CART),
    ("shop/catalogue.py", _CATALOGUE),
    ("tests/test_cart.py", _TEST_CART),
    ("tests/test_catalogue.py", _TEST_CATALOGUE),
    ("conftest.py", ""),
    ("jobs/burst.py", _BURST),
    ("jobs/runaway.py", _RUNAWAY),
    ("jobs/serve.py", _SERVE),
    ("jobs/fetch.py", _FETCH),
    ("jobs/review.py", _REVIEW),
    ("native/main.c", _MAIN_C),
)


def write_project(workdir: Path, kernel_count: int = 700) -> None:
    """Lay the sample project out in `workdir` (made; must not exist) as a git repository with a short history.

    Raises FileExistsError, or CalledProcessError where git fails.
    """
    workdir.mkdir(parents=True)
    for name, text in _FILES:
        path = workdir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (workdir / "native" / "kernels.c").write_text(_kernels_c(kernel_count))
    (workdir / ".gitignore").write_text("__pycache__/\n.pytest_cache/\nnative/kernels\nnative/debug\n*.port\n*.patch\n")
    right = _CART.replace("1 + discount", "1 - discount")
    (workdir / "shop" / "cart.py").write_text(right)
    _git(workdir, "init", "-q")
    _git(workdir, "add", "-A")
    _git(workdir, "commit", "-q", "-m", "Start the shop")
    (workdir / "shop" / "cart.py").write_text(_CART)
    _git(workdir, "commit", "-q", "-a", "-m", "Let receipts show the discount")
    (workdir / "fix.patch").write_text(_FIX)


def git_environment() -> tuple[tuple[str, str], ...]:
    """Variables that make git independent of the person's own settings."""
    return (
        ("GIT_AUTHOR_NAME", "demo"),
        ("GIT_AUTHOR_EMAIL", "demo@localhost"),
        ("GIT_COMMITTER_NAME", "demo"),
        ("GIT_COMMITTER_EMAIL", "demo@localhost"),
        ("GIT_CONFIG_GLOBAL", os.devnull),
        ("GIT_CONFIG_NOSYSTEM", "1"),
        ("GIT_PAGER", "cat"),
    )


def _git(workdir: Path, *arguments: str) -> None:
    environment = {**os.environ, **dict(git_environment())}
    subprocess.run(("git", *arguments), cwd=workdir, env=environment, check=True, capture_output=True)
