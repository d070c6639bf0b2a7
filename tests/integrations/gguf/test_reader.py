"""Files as such: damaged, cut off, of other kinds; types that are refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from tests import oracle
from tests.integrations.gguf.files import Writer, gguf, integration, quantize, read_one


@pytest.fixture
def path(tmp_path):
    writer = Writer(tmp_path / "x.gguf")
    writer.writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "déf"])
    writer.writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.writer.add_array("nested", [[1, 2], [3]])
    writer.add("b.weight", np.ones(7, np.float32))
    writer.add_ternary("a.weight", oracle.ternary(4, 512), 37.0, "TQ2_0")
    return writer.write()


def test_arrays_in_the_metadata_are_passed_over(path):
    assert read_one(path).w_packed.tolist() == oracle.pack(oracle.ternary(4, 512)).tolist()


def test_a_file_that_is_cut_off_anywhere_is_refused(path):
    whole = path.read_bytes()
    used = len(whole) - (-4 * 132) % 32  # The padding after the last tensor may be missing.
    start = used - 4 * 132  # of the last tensor
    for length in [*range(0, used, 13), start - 1, start, start + 1, used - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"is not a GGUF file|cut off|damaged"):
            list(integration.tensors(path))
    path.write_bytes(whole[:used])
    assert len(list(integration.tensors(path))) == 1


def test_i2_s_without_its_scale_is_cut_off(tmp_path):
    t = oracle.ternary(4, 256)
    path = Writer(tmp_path / "x.gguf").add_ternary("a.weight", t, 37.0, "x86").write()
    path.write_bytes(path.read_bytes()[:-32])
    with pytest.raises(ValueError, match=r"tensor a\.weight of type I2_S .*288 bytes.* 256 .*off"):
        integration.tensors(path, i2_s_layout="x86")


def test_a_tensor_that_reaches_into_the_next_is_refused(tmp_path):
    writer = Writer(tmp_path / "x.gguf")
    writer.add("a.weight", np.zeros(64, np.uint8), "TQ2_0", (4, 256))
    path = writer.add("b.weight", np.ones(300, np.float32)).write()
    with pytest.raises(ValueError, match=r"tensor a\.weight .*264 bytes, .*only 64 .*is damaged"):
        integration.tensors(path)


def test_other_files_are_refused(path, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"PK" * 100)
    with pytest.raises(ValueError, match=r"other is not a GGUF file"):
        integration.tensors(other)
    with pytest.raises(FileNotFoundError):
        integration.tensors(tmp_path / "none.gguf")
    data = bytearray(path.read_bytes())
    for version, message in [(b"\1\0\0\0", "version 1 of GGUF"), (b"\0\0\0\3", "is big-endian")]:
        data[4:8] = version
        other.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            integration.tensors(other)


def test_one_part_of_several_is_refused(tmp_path):
    writer = Writer(tmp_path / "x.gguf")
    writer.writer.add_uint16("split.count", 3)
    writer.add("a.weight", np.ones(7, np.float32)).write()
    with pytest.raises(ValueError, match=r"one of 3 parts of a model: merge them"):
        integration.tensors(tmp_path / "x.gguf")


def test_activations_in_a_rotated_basis_are_refused(tmp_path):
    writer = Writer(tmp_path / "x.gguf")
    writer.writer.add_uint32("prism.hadamard.block_size", 128)
    writer.add("a.weight", np.ones(7, np.float32)).write()
    with pytest.raises(ValueError, match=r"prism\.hadamard\.block_size .*Hadamard"):
        integration.tensors(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("number", "row_bytes", "message"),
    [
        (38, 64, "type TL1 has its weights in the order of kernels"),
        (39, 56, "type TL2 has its weights in the order of kernels"),
        (41, 36, "type Q1_0 has binary weights"),
        (134, 56, "type IQ1_BN of ik_llama.cpp"),
        (135, 68, "type IQ2_BN of ik_llama.cpp"),
        (999, 56, "type number 999 is not known"),
    ],
)
def test_types_that_cannot_be_read_are_refused_by_name(number, row_bytes, message, tmp_path):
    data = np.zeros(16 * row_bytes + 32, np.uint8)
    writer = Writer(tmp_path / "x.gguf").add("blk.3.ffn_up.weight", data, number, (16, 256))
    path = writer.add("z.weight", np.ones(7, np.float32)).write()
    with pytest.raises(ValueError, match=rf"blk\.3\.ffn_up\.weight: {message}"):
        integration.tensors(path)


def test_mxfp4_is_told_from_tl2_by_its_size(tmp_path):
    data = gguf.quantize(np.ones((4, 256), np.float32), gguf.GGMLQuantizationType.MXFP4)
    path = Writer(tmp_path / "x.gguf").add("a.weight", data, "MXFP4").write()
    assert list(integration.tensors(path)) == []


def test_a_shuffled_layout_is_not_read_as_the_same_weights(tmp_path):
    t = oracle.ternary(4, 256)
    data = quantize(t, 1.0, "TQ2_0")
    data[:, :64] = data[:, 63::-1]
    path = Writer(tmp_path / "x.gguf").add("a.weight", data, "TQ2_0").write()
    assert read_one(path).w_packed.tolist() != oracle.pack(t).tolist()


def test_rows_of_no_whole_blocks_are_refused(tmp_path):
    data = np.zeros(4 * 66, np.uint8)
    writer = Writer(tmp_path / "x.gguf").add("a.weight", data, 35, (4, 200))
    with pytest.raises(ValueError, match=r"a\.weight has rows of 200 weights, .*blocks of 256"):
        integration.tensors(writer.write())


def test_a_name_that_is_there_twice_is_refused(path):
    data = path.read_bytes()
    name = struct.pack("<Q", 8) + b"b.weight"
    assert name in data
    path.write_bytes(data.replace(name, struct.pack("<Q", 8) + b"a.weight"))
    with pytest.raises(ValueError, match=r"tensor a\.weight is in the file twice"):
        integration.tensors(path)


def test_two_tensors_at_one_place_are_refused(tmp_path):
    """The offset of the second one is changed to that of the first, which is 0."""
    t = np.ones((4, 256), np.int64)
    writer = Writer(tmp_path / "x.gguf")
    path = writer.add_ternary("a.weight", t, 1.0, "TQ2_0").add_ternary("b.weight", t, 1.0, "TQ2_0")
    data = bytearray(path.write().read_bytes())
    size = 66 * 4
    aligned = -(-size // 32) * 32
    at = data.index(aligned.to_bytes(8, "little"), data.index(b"b.weight"))
    data[at : at + 8] = bytes(8)
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: two tensors lie at one place"):
        list(integration.tensors(tmp_path / "x.gguf"))
