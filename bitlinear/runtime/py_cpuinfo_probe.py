"""The child process of ``cpu.py``: print what py-cpuinfo finds, as JSON."""

from __future__ import annotations

if __name__ == "__main__":
    import cpuinfo

    print(cpuinfo.get_cpu_info_json())
