"""Each layer of the sandbox by itself, in processes of their own: none can be left again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox's layers are Linux's")


def run(body: str, setup: str = "box = sandbox.enter(os.getppid())") -> str:
    code = f"import os, sys, ctypes, socket, resource\nfrom client import sandbox\n{setup}\n{body}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_filter_alone_refuses_sockets_in_native_code():
    refused = run(
        "import errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.socket(2, 1, 0), errno.errorcode[ctypes.get_errno()])",
        setup="assert sandbox._prctl(38, 1) and sandbox._filter_calls()",
    )
    assert refused == "-1 EPERM"


@pytest.mark.parametrize(
    "call",
    [
        "libc.ptrace(16, os.getppid(), 0, 0)",
        "libc.syscall(310, os.getppid(), 0, 0, 0, 0, 0)",
        "libc.syscall(425, 1, 0)",
        "libc.connect(0, 0, 0)",
        "libc.bind(0, 0, 0)",
    ],
)
@pytest.mark.skipif("x86_64" not in __import__("platform").machine(), reason="numbers of x86-64")
def test_the_filter_refuses_what_reaches_out(call: str):
    said = run(
        f"import errno\nlibc = ctypes.CDLL(None, use_errno=True)\nr = {call}\nprint(r, errno.errorcode[ctypes.get_errno()])"
    )
    assert said == "-1 EPERM"


def test_the_filter_leaves_ordinary_work_alone():
    assert (
        run("import threading, tempfile\nt = threading.Thread(target=print, args=('ok',)); t.start(); t.join()") == "ok"
    )


@pytest.mark.parametrize(
    "call",
    [
        "socket.socket()",
        "socket.create_connection(('127.0.0.1', 1))",
        "socket.getaddrinfo('example.org', 80)",
        "__import__('urllib.request').request.urlopen('http://127.0.0.1:1')",
    ],
)
def test_python_is_told_why(call: str):
    said = run(
        f"try:\n    {call}\n    print('opened')\nexcept OSError as error:\n    print(error)",
        setup="sys.addaudithook(sandbox._refuse_sockets)",
    )
    assert "a worker opens no sockets" in said


def test_no_core_is_dumped_and_the_report_is_true():
    said = run(
        "print(resource.getrlimit(resource.RLIMIT_CORE), box.seccomp, box.no_new_privileges, box.dies_with_agent)"
    )
    assert said == "(0, 0) True True True"


def test_a_worker_whose_agent_is_gone_ends_at_once():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os\nfrom client import sandbox\nsandbox.enter(1 if os.getppid() != 1 else 2)\nprint('alive')",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_agents_memory_is_hidden():
    assert run("print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))", setup="assert sandbox.hide_memory()") == "0"
