"""The child process of ``cpu.py``: print what py-cpuinfo finds, as JSON."""

from __future__ import annotations

import os
import shutil
import sys

if __name__ == "__main__":
    # On Linux, py-cpuinfo reads /proc/cpuinfo with the command cat. Without it, it guesses from
    # CPUID, of which it knows only some flags.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), os.defpath])
    if sys.platform == "linux" and shutil.which("cat") is None:
        sys.exit("py-cpuinfo needs the command cat")
    import cpuinfo

    print(cpuinfo.get_cpu_info_json())
