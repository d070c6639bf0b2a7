"""Run the test suite as a 64-bit Arm process, under an emulator.

    python -m scripts.dev.test_aarch64 [--cpu cortex-a53] [tests/kernels -k scalar]

Needs an x86-64 host like Debian, root, Linux 6.7 or newer, the packages debootstrap and util-linux,
and qemu-user 8.2 or newer. Older versions show programs the host's /proc/cpuinfo, from which
BitLinear reads the CPU's flags. The backports of Debian 12 have a newer one, which runs without
being installed:

    apt-get download qemu-user/bookworm-backports && dpkg-deb -x qemu-user_*.deb DIR
    python -m scripts.dev.test_aarch64 --emulator DIR/usr/bin/qemu-aarch64

The first run makes a Debian with Python, g++ and torch in --root; later runs install nothing. Each
run copies this checkout's files, as git lists them, into it. Everything there runs emulated: the
interpreter, the compiler that the import starts, the kernels. The mounts and the registration of
the emulator are private to each command, and nothing else on the host changes. Arguments that are
not options of this script go to pytest. Prints one line for tests/README.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from scripts import tools

ROOT = Path(__file__).resolve().parents[2]
RELEASE = "bookworm"
PACKAGES = "python3,python3-venv,python3-dev,g++"
FOR_PIP = ("_proxy", "pip_index_url")
CERTIFICATES = "/root/certificates.pem"
# It has the flags of every Arm kernel. "max" has SME too, which torch 2.9's quantised Linear uses
# in a way that qemu 10.0 calls an illegal instruction; "max,sme=off" works.
CPU = "neoverse-v1"
CHECKOUT = "/root/bitlinear"
PYTHON = "/root/venv/bin/python"
DESCRIBE = """
import sys, numpy, torch
print(sys.version.split()[0], torch.__version__, numpy.__version__)
"""

# The first process of the namespaces waits until its user is mapped to root. The mapping takes
# effect when it starts another program.
WAIT = 'echo >&0; read -r mapped; exec setpriv --pdeathsig KILL sh -euc "$@"'
# No directory of the host is mounted writable: devices are single files, and of /sys only the part
# that torch reads is there.
ENTER = r"""
root=$1 emulator=$2
shift 2
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 dev "$root/dev"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir -m 1777 "$root/dev/shm"
mkdir "$root/dev/pts"
mount -t devpts -o newinstance,ptmxmode=666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for number in 0:stdin 1:stdout 2:stderr; do
    ln -s "/proc/self/fd/${number%:*}" "$root/dev/${number#*:}"
done
mount -t tmpfs -o mode=755 sys "$root/sys"
cpu=sys/devices/system/cpu
mkdir -p "$root/$cpu"
mount --bind "/$cpu" "$root/$cpu"
mount -o remount,bind,ro "$root/$cpu"
mount -t binfmt_misc binfmt_misc "$root/proc/sys/fs/binfmt_misc"
magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
printf ':aarch64:M::%s:%s:%s:FP' "$magic" "$mask" "$emulator" \
    > "$root/proc/sys/fs/binfmt_misc/register"
# Not exec: the first process of a namespace ignores signals that it has no handler for.
status=0
chroot "$root" "$@" < /dev/null || status=$?
exit $status
"""


@dataclass(frozen=True)
class Machine:
    """An emulated machine.

    Attributes:
        root: Its root file system.
        emulator: The emulator, statically linked.
        cpu: The emulated CPU.
    """

    root: Path
    emulator: Path
    cpu: str

    def run(self, *command: str) -> None:
        """Run a command.

        Raises:
            subprocess.CalledProcessError: The command failed.
        """
        with self.start(*command) as process:
            pass
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)

    def output(self, *command: str) -> str:
        """Return the standard output of a command."""
        with self.start(*command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            return process.stdout.read()

    def inside(self, path: str) -> Path:
        """Return the host's path of an absolute path inside the machine."""
        return self.root / path.lstrip("/")

    def description(self) -> str:
        """Return the emulated CPU and the emulator, for people."""
        version = subprocess.run(
            [self.emulator, "--version"], stdout=subprocess.PIPE, text=True, check=True
        )
        number = re.search(r"version ([\d.]+)", version.stdout)
        return f"{self.cpu}, QEMU {number[1] if number else '?'}"

    @contextmanager
    def start(
        self, *command: str, stdout: int | IO[str] | None = None
    ) -> Iterator[subprocess.Popen[str]]:
        """Start a command as root of namespaces of its own, and wait for its end."""
        unshare = ("unshare", "--user", "--mount", "--pid", "--fork", "--kill-child")
        arguments = (ENTER, "sh", self.root, self.emulator, *command)
        ours, theirs = socket.socketpair()
        with (
            ours,
            subprocess.Popen(
                [*unshare, "sh", "-c", WAIT, "sh", *arguments],
                stdin=theirs,
                stdout=stdout,
                env=self._environment(),
                text=True,
            ) as process,
        ):
            theirs.close()
            try:
                if ours.recv(1):
                    for name in ("uid_map", "gid_map"):
                        Path(f"/proc/{process.pid}/{name}").write_text("0 0 65536")
                    ours.send(b"\n")
                yield process
            except BaseException:
                process.kill()  # the kernel kills its children with it
                raise

    def _environment(self) -> dict[str, str]:
        return {
            **{k: v for k, v in os.environ.items() if k.lower().endswith(FOR_PIP)},
            "PIP_CERT": CERTIFICATES,
            "REQUESTS_CA_BUNDLE": CERTIFICATES,
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",  # shows output at once
            "QEMU_CPU": self.cpu,
        }


def log(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def bootstrap(machine: Machine, mirror: str | None) -> None:
    """Make a Debian in the machine's root."""
    log(f"installing Debian into {machine.root}")
    partial = machine.root.with_name(f"{machine.root.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    options = ("--arch=arm64", "--foreign", "--variant=minbase", f"--include={PACKAGES}")
    log_file = partial.with_suffix(".log")
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("w") as file:
        first = ["debootstrap", *options, RELEASE, partial, *([mirror] if mirror else [])]
        subprocess.run(first, stdout=file, check=True)
        half = Machine(partial, machine.emulator, machine.cpu)
        # debootstrap makes device files unless it runs in a container of this kind.
        second = ("env", "container=lxc", "/debootstrap/debootstrap", "--second-stage")
        with half.start(*second, stdout=file) as process:
            pass
    if process.returncode:
        sys.exit(f"debootstrap's second stage failed, see {log_file}")
    partial.rename(machine.root)


def check(machine: Machine) -> None:
    """End this program unless the emulator shows the flags of the CPU that it emulates."""
    shown = machine.output("cat", "/proc/cpuinfo")
    if re.search(r"^Features\s*:.* asimd", shown, re.MULTILINE) is None:
        sys.exit(
            f"{machine.emulator} ({machine.description()}) cannot run Arm programs here, or it "
            "shows them the host's /proc/cpuinfo; the top of this file lists the requirements"
        )


def refresh(machine: Machine) -> None:
    """Copy the files of this checkout, as git lists them, into the machine."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    checkout = machine.inside(CHECKOUT)
    if checkout.exists():
        shutil.rmtree(checkout)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():  # git also lists deletions that are not committed
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, checkout / name)


def install(machine: Machine, torch_version: str) -> None:
    """Install the checkout and the dependencies of its tests, unless they are installed already."""
    constraint = f"torch=={torch_version}"
    wanted = "\n".join([constraint, (ROOT / "pyproject.toml").read_text()])
    done = machine.inside("/root/installed")
    if done.exists() and done.read_text() == wanted:
        return
    log("installing the package and the dependencies of its tests")
    if not machine.inside(PYTHON).is_symlink():
        machine.run("python3", "-m", "venv", str(Path(PYTHON).parent.parent))
    # pip trusts the same certificates as the host.
    shutil.copyfile(
        ssl.get_default_verify_paths().cafile or "/dev/null", machine.inside(CERTIFICATES)
    )
    machine.inside("/root/constraints.txt").write_text(constraint)
    pip = (PYTHON, "-m", "pip", "install", "--quiet", "-c", "/root/constraints.txt")
    machine.run(*pip, "-e", f"{CHECKOUT}[dev]")
    done.write_text(wanted)


def test(machine: Machine, arguments: list[str]) -> tuple[str, bool]:
    """Run the doctor and pytest; return the line for the table, and whether both succeeded."""
    with machine.start(PYTHON, "-m", "bitlinear.doctor") as doctor:
        pass
    in_checkout = ("env", "-C", CHECKOUT)
    output = ""
    with machine.start(
        *in_checkout, PYTHON, "-m", "pytest", *arguments, stdout=subprocess.PIPE
    ) as pytest:
        assert pytest.stdout is not None
        while text := os.read(pytest.stdout.fileno(), 4096).decode(errors="replace"):
            print(text, end="", flush=True)
            output += text
    summary = output.rstrip().rpartition("\n")[2].strip("= ")
    versions = machine.output(PYTHON, "-c", DESCRIBE)
    cells = [*versions.split(), machine.description(), summary]
    return f"| {' | '.join(cells)} |", doctor.returncode == pytest.returncode == 0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=ROOT / ".aarch64-root")
    parser.add_argument("--cpu", default=CPU, help=f"as the emulator names it (default: {CPU})")
    parser.add_argument("--emulator", default="qemu-aarch64", help="static qemu-aarch64")
    parser.add_argument(
        "--torch", default="2.9.1", help="a release whose aarch64 wheel is for CPUs"
    )
    parser.add_argument("--mirror", help="of Debian, for debootstrap (default: its own)")
    arguments, for_pytest = parser.parse_known_args(argv)
    emulator = tools.require_program(
        arguments.emulator, "the top of this file says how to get version 8.2 or newer"
    )
    for program, package in (("unshare", "util-linux"), ("setpriv", "util-linux")):
        tools.require_program(program, f"run apt-get install {package}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    machine = Machine(arguments.root.resolve(), Path(emulator).resolve(), arguments.cpu)
    if not machine.root.exists():
        tools.require_program("debootstrap", "run apt-get install debootstrap")
        bootstrap(machine, arguments.mirror)
    check(machine)
    refresh(machine)
    install(machine, arguments.torch)
    line, passed = test(machine, for_pytest)
    print("| Python | torch | NumPy | machine | result |\n|---|---|---|---|---|")
    print(line)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
