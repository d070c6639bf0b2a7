"""How the compilers and the linker of a system spell the flags of a library.

The rows in ``__init__.py`` have the flags of GCC, which clang and Apple's clang spell alike. This
table has the others. A flag of an instruction set that is not in it has no counterpart: MSVC
compiles every intrinsic without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from . import Library

_MSVC = {
    "-O1": ("/O1",),
    "-O3": ("/O2",),
    "-ffp-contract=off": ("/fp:precise",),  # portability.h forbids contraction, too
    "-fno-math-errno": (),
    "-fvisibility=hidden": (),  # only what is declared as exported is
    "-DNDEBUG": ("/DNDEBUG",),
    # These let MSVC use more than their name says: FMA, BMI and LZCNT, or AVX512-CD. Every CPU that
    # is known to have the one has the other; a hypervisor that hides it fails the self-test.
    "-mavx2": ("/arch:AVX2",),
    "-mavx512f": ("/arch:AVX512",),
}

# By system: its compilers' spelling of GCC's flags. Torch compiles with MSVC on Windows.
_COMPILER_FLAGS: Mapping[str, Mapping[str, tuple[str, ...]]] = {"windows": _MSVC}

# By system: what a library that starts threads needs. Elsewhere cpu/parallel.h needs no flag.
_THREAD_FLAGS: Mapping[str, tuple[str, ...]] = {"windows": ("/openmp",)}

# By system: its linker's spelling of the flags of GNU ld.
_LINKER_FLAGS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "darwin": {"-Wl,--as-needed": ()},
    "windows": {"-Wl,--as-needed": ()},
}


def compiler_flags(library: Library, system: str) -> tuple[str, ...]:
    """Spell the compiler flags of a library for a system, one of ``Hardware.system``.

    Raises:
        ValueError: The table has no counterpart of a flag.
    """
    threads = _THREAD_FLAGS.get(system, ()) if library.starts_threads else ()
    return (*_spell(library.cflags, _COMPILER_FLAGS.get(system)), *threads)


def linker_flags(library: Library, system: str) -> tuple[str, ...]:
    """Spell the linker flags of a library for a system.

    Raises:
        ValueError: The table has no counterpart of a flag.
    """
    return _spell(library.ldflags, _LINKER_FLAGS.get(system))


def _spell(
    flags: Iterable[str], spellings: Mapping[str, tuple[str, ...]] | None
) -> tuple[str, ...]:
    if spellings is None:
        return tuple(flags)
    spelled: list[str] = []
    for flag in flags:
        if flag not in spellings and not flag.startswith("-m"):
            raise ValueError(f"{flag} has no counterpart in bitlinear/kernels/flags.py")
        spelled += spellings.get(flag, ())
    return tuple(spelled)
