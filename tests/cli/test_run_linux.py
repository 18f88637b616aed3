"""`kvmtick run linux`: which kernel it takes, and what it refuses in one line."""

import sys
from pathlib import Path

import pytest
from terminal import Terminal

from kvmtick.abi.errors import HostError
from kvmtick.cli import EXIT_HOST, EXIT_USAGE
from kvmtick.machine.installed import find_kernel

BZIMAGE = bytes(0x202) + b"HdrS"


def test_the_newest_kernel_is_taken_and_other_files_are_not(tmp_path: Path) -> None:
    for version in ("6.9.1", "6.10.0", "5.99.0"):
        (tmp_path / f"vmlinuz-{version}-amd64").write_bytes(BZIMAGE)
    (tmp_path / "vmlinuz-7.0.0-arm64").write_bytes(b"MZ" + bytes(1000))
    (tmp_path / "initrd.img-8.0").write_bytes(BZIMAGE)
    assert find_kernel(tmp_path).name == "vmlinuz-6.10.0-amd64"


def test_without_a_kernel_it_says_how_to_get_one(
    kvmtick: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HostError, match="apt-get install linux-image-cloud-amd64"):
        find_kernel(tmp_path)
    monkeypatch.setattr(find_kernel, "__defaults__", (tmp_path,))
    result = kvmtick("run", "linux")
    assert (result.code, result.out) == (EXIT_HOST, "")
    assert result.err.count("\n") == 1
    assert "apt-get install linux-image-cloud-amd64, or give --kernel FILE" in result.err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("linux", "--hz", "100"), "--hz: Linux goes its own way; leave it out"),
        (("linux", "--no-ack"), "--no-ack: Linux goes its own way"),
        (("linux", "--module", "a"), "--module: Linux goes its own way"),
        (("linux", "--load-at", "0x7c00"), "--load-at: Linux goes its own way"),
        (("linux", "--counter", "0x1000"), "--counter: Linux goes its own way"),
        (("linux", "--vcpus", "9"), "--vcpus 9: give 1 to 8"),
        (("linux", "--ram", "much"), "--ram 'much' is no size"),
        (("tick-pic", "--kernel", "k"), "--kernel k: 'tick-pic' is a guest already"),
        (("--initrd", "i"), "--initrd i: only Linux takes it"),
        (("tick-pic", "--initrd", "i"), "--initrd i: only Linux takes it"),
        (("--kernel", "/nowhere"), "'/nowhere'"),
        (("--kernel", "/etc/passwd"), "is no Linux bzImage"),
        (("--kernel", "k", "--initrd", "/nowhere"), "--initrd: cannot read '/nowhere'"),
        (("--kernel", "k", "--initrd", "/dev"), "--initrd: cannot read '/dev': Is a directory"),
        (("--kernel", "k", "--initrd", "/dev/zero"), "--initrd: '/dev/zero' is a device or a pipe"),
        (("--kernel", "/dev"), "cannot read '/dev': Is a directory"),
        (("linux", "--vcpus", "0"), "--vcpus 0: give 1 to 8"),
        (("linux", "--vcpus", "x"), "--vcpus 'x' is not a whole number"),
        (("linux", "--ram", "1025K"), "--ram 1025K: give 1M to 3G, a multiple of 4K"),
        (("linux", "--ram", "4G"), "--ram 4G: give 1M to 3G"),
        (("--append", "quiet"), "--append: 'tick-pic' is a built-in guest"),
        (("tick-pic", "--busybox", "b"), "--busybox b: only Linux takes it"),
        (("--kernel", "k", "--busybox", "/nowhere"), "--busybox: cannot read '/nowhere'"),
        (("--kernel", "k", "--busybox", ""), "--busybox: cannot read '.': Is a directory"),
        (("--kernel", "k", "--busybox", "/etc/passwd"), "--busybox: /etc/passwd is no x86-64 ELF"),
        (("--kernel", "k", "--busybox", "b", "--initrd", "i"), "is for our initramfs, not for 'i'"),
        (("linux", "--fast", "--gdb", "0"), "--fast: a debugger stops at any instruction"),
        (("linux", "--chips", "kernel", "--fast"), "--fast: it tells where the unicorn CPU"),
    ],
)
def test_what_makes_no_sense_is_refused(
    kvmtick: Terminal, words: tuple[str, ...], complaint: str
) -> None:
    result = kvmtick("run", *words)
    assert (result.code, result.out) == (EXIT_USAGE, "")
    assert complaint in result.err
    assert result.err.count("\n") == 1


def test_closed_stdin_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    from kvmtick.cli.run_console import Input, input_of

    monkeypatch.setattr(sys, "stdin", None)
    assert input_of(argparse.Namespace(json=False)) == Input(None)
