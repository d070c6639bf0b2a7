"""What the tests of the kernels compile: once a session for each compiler, variant and flags."""

from __future__ import annotations

import pytest

from tests.kernels.native import compile_variant


@pytest.fixture(scope="session")
def compiled_driver(tmp_path_factory):
    """``compiled_driver(compiler, variant, *flags)``: the native driver of an unchanged kernel."""
    return _cached_compilation(tmp_path_factory, "driver")


@pytest.fixture(scope="session")
def compiled_object(tmp_path_factory):
    """``compiled_object(compiler, variant)``: the kernel alone."""
    return _cached_compilation(tmp_path_factory, "kernel.o", "-c")


def _cached_compilation(tmp_path_factory, name, *fixed_flags):
    outputs = {}

    def compile_once(compiler, variant, *flags):
        key = (compiler, variant.name, flags)
        if key not in outputs:
            output = tmp_path_factory.mktemp(variant.name) / name
            compile_variant(compiler, variant, output, *fixed_flags, *flags)
            outputs[key] = output
        return outputs[key]

    return compile_once
