# SPDX-License-Identifier: BSD-3-Clause
"""What SECURITY.md promises: importing and calling write no file, connect to nothing, unpickle nothing and start nothing;
the library is linked with the usual protections."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torch_gated_attn import _C

PACKAGE = Path(_C.__file__).parent

# Python reports what it does to an audit hook, which cannot be removed: hence a process of its own, in which torch, whose
# import is not ours to judge, is already loaded.
AUDITED = """
import os, sys
import torch

def hook(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    kind = event.split(".")[0]
    if writes or opens or kind in ("socket", "urllib", "http", "ftplib", "pickle", "subprocess", "shutil", "tempfile"):
        seen.append(event)
    if event in ("os.mkdir", "os.rename", "os.remove", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.chmod"):
        seen.append(event)

seen = []
sys.addaudithook(hook)
import torch_gated_attn
x = torch.ones(2, 3, 4, requires_grad=True)
torch_gated_attn.gated_attention(x, x, x).sum().backward()
torch_gated_attn.GatedAttention(8, 2)(torch.ones(3, 8))
{extra}
print(seen)
"""


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("", "[]"),
        ("open(os.devnull, 'w')", "['open']"),
        ("import pickle; pickle.loads(pickle.dumps(torch_gated_attn.GatedAttention))", "['pickle.find_class']"),
        ("import socket; socket.socket()", "['socket.__new__']"),
    ],
    ids=["the library", "a file", "a pickle", "a socket"],
)
def test_no_file_connection_pickle_or_process(extra, expected):
    """The other cases show that the hook sees what it should."""
    command = [sys.executable, "-B", "-c", AUDITED.replace("{extra}", extra)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == expected


def test_sources_name_no_module_that_unpickles_or_connects():
    words = r"\b(pickle|marshal|shelve|socket|urllib|requests|http\.client|eval|exec|torch\.load|load_inline)\b\s*[\(.]"
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(words, path.read_text()), path


@pytest.fixture(scope="module")
def elf() -> str:
    readelf = shutil.which("readelf")
    if readelf is None or not sys.platform.startswith("linux"):
        pytest.skip("readelf is missing")
    command = [readelf, "-W", "-l", "-d", "--dyn-syms", _C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_linked_with_protections(elf):
    assert "GNU_RELRO" in elf
    assert re.search(r"FLAGS.*(BIND_NOW|NOW)", elf), "symbols are bound late: the table of functions stays writable"
    stack = next(line for line in elf.splitlines() if "GNU_STACK" in line)
    assert " RW " in stack
    assert "RWE" not in elf
    assert "TEXTREL" not in elf
    assert "RPATH" not in elf
    assert "RUNPATH" not in elf


def test_compiled_with_stack_protector(elf):
    assert "__stack_chk_fail" in elf
