"""safetensors files: our bytes are the library's bytes, bad headers are refused by name, I/O hits its place."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fp4conv.errors import OutputError, SourceError
from fp4conv.safetensors_io import (
    DTYPE_BYTES,
    MAX_OPEN_FILES,
    Reader,
    TensorRef,
    TensorSpec,
    Writer,
    header_bytes,
    lay_out,
    numpy_dtype,
    parse_header,
    read_header,
)

TORCH_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
SPEC = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def write_laid_out(path: Path, tensors: Mapping[str, tuple[TensorSpec, bytes]], metadata: dict[str, str]) -> None:
    layout = lay_out([(name, spec) for name, (spec, _) in tensors.items()], metadata, file=path.name)
    with Writer(path, layout.nbytes) as writer:
        writer.write(0, layout.header)
        for ref in reversed(layout.tensors):
            writer.write(ref.offset, tensors[ref.name][1])


# ---- against the safetensors library


def test_every_dtype_is_written_as_the_library_writes_it(tmp_path: Path) -> None:
    """One tensor a dtype and several that tie, names out of order and beyond ASCII."""
    tensors = {f"t.{name}": torch.zeros(3, dtype=kind) for name, kind in TORCH_TYPES.items()}
    tensors |= {"b": torch.zeros(2, 3), "a": torch.zeros(()), "zero": torch.zeros(0, 4), 'é"\\\n漢': torch.zeros(5)}
    for tensor in tensors.values():
        raw = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else None
        if raw is not None and tensor.dtype is not torch.bool:
            raw.copy_(torch.arange(raw.numel(), dtype=torch.int32).to(torch.uint8))
    theirs = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(tensors, theirs, metadata={"format": "pt"})
    names = {kind: name for name, kind in TORCH_TYPES.items()}
    ours = {
        name: (
            TensorSpec(names[tensor.dtype], tuple(tensor.shape)),
            bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b"",
        )
        for name, tensor in tensors.items()
    }
    write_laid_out(tmp_path / "ours.safetensors", ours, {"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == theirs.read_bytes()


def test_e8m0_is_ordered_as_the_library_orders_it() -> None:
    """torch's table of names lacks E8M0 for some releases; the serialiser takes the name itself."""
    kinds = {
        "F8_E8M0": torch.float8_e8m0fnu,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "U8": torch.uint8,
    }
    raw = safetensors.torch.save({name: torch.zeros(4, dtype=kind) for name, kind in kinds.items()})
    assert raw.startswith(lay_out([(name, TensorSpec(name, (4,))) for name in kinds], None).header)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.tuples(
            st.sampled_from(["U8", "F16", "F32", "I64", "U32"]), st.lists(st.integers(0, 3), max_size=3).map(tuple)
        ),
        max_size=6,
    ),
    st.none() | st.dictionaries(st.just("format"), st.sampled_from(["pt", "np"])),
)
@settings(max_examples=50, deadline=None)
def test_any_file_is_written_as_the_library_writes_it(
    specs: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    assume(specs or metadata != {})  # of which safetensors 0.8.0 makes a header that is no JSON
    arrays = {name: np.zeros(shape, numpy_dtype(dtype)) for name, (dtype, shape) in specs.items()}
    theirs = safetensors.numpy.save(arrays, metadata)
    layout = lay_out([(name, TensorSpec(*spec)) for name, spec in specs.items()], metadata)
    assert layout.header == theirs[: len(layout.header)]
    assert layout.nbytes == len(theirs)
    parsed = parse_header(layout.header[8:], layout.nbytes, "")
    assert {ref.name: ref for ref in parsed.tensors} == {ref.name: ref for ref in layout.tensors}
    assert parsed.metadata == (metadata or {})


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    half = values.astype(ml_dtypes.bfloat16)
    tensors = {
        "half": (TensorSpec("BF16", (3, 4)), half.tobytes()),
        "scalar": (TensorSpec("F64", ()), np.float64(0.5).tobytes()),
        "empty": (TensorSpec("I32", (0, 7)), b""),
    }
    write_laid_out(tmp_path / "x.safetensors", tensors, {"format": "pt", "a": "b"})
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "a": "b"}
        assert torch.equal(file.get_tensor("half").float(), torch.from_numpy(values))
        assert file.get_tensor("scalar").item() == 0.5
        assert file.get_tensor("empty").shape == (0, 7)


def test_other_peoples_headers_are_laid_out_alike(reference: Callable[[str], Path]) -> None:
    """Files written by transformers and ModelOpt: the same tensors and metadata give the same first bytes."""
    files = [
        path
        for name in ("gptoss-bf16", "gptoss-mxfp4", "gptoss-nvfp4-default", "llama-nvfp4-default")
        for path in reference(name).glob("*.safetensors")
    ]
    assert files
    for path in files:
        header = read_header(path)
        layout = lay_out([(ref.name, ref.spec) for ref in header.tensors], header.metadata or None, file=path.name)
        assert path.read_bytes()[: header.nbytes] == layout.header
        assert layout.nbytes == path.stat().st_size
        assert {ref.name: ref for ref in layout.tensors} == {ref.name: ref for ref in header.tensors}


def test_layout_does_not_depend_on_the_order_given() -> None:
    specs = [(f"t{number}", TensorSpec(dtype, (number,))) for number, dtype in enumerate(DTYPE_BYTES)]
    assert lay_out(specs) == lay_out(specs[::-1])
    assert len(lay_out(specs).header) % 8 == 0


@pytest.mark.parametrize("name", list(DTYPE_BYTES))
def test_dtype_sizes_are_those_of_torch_and_numpy(name: str) -> None:
    assert numpy_dtype(name).itemsize == DTYPE_BYTES[name] == TensorSpec(name, (1,)).nbytes
    if name in TORCH_TYPES:
        assert TORCH_TYPES[name].itemsize == DTYPE_BYTES[name]


@pytest.mark.parametrize("name", ["F4", "F6_E2M3", "F6_E3M2", "Q4_K", ""])
def test_dtypes_that_are_not_read_are_named(name: str) -> None:
    with pytest.raises(SourceError, match=re.escape(repr(name))):
        numpy_dtype(name)


# ---- headers that are refused


def entry(**changes: object) -> dict[str, object]:
    return {**SPEC, **changes}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json at all", "not valid JSON"),
        (b'{"t": NaN}', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "'a' comes twice"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b" {}", "not a JSON object"),
        ({"t": 3}, "must have dtype"),
        ({"t": {"dtype": "F32", "shape": [2, 2]}}, "must have dtype"),
        ({"t": entry(dtype="F4")}, "'F4' is not one that fp4conv reads"),
        ({"t": entry(dtype=None)}, "'None' is not one that fp4conv reads"),
        ({"t": entry(shape="4")}, "must be a list of sizes"),
        ({"t": entry(shape=[2, -2])}, "must be a list of sizes"),
        ({"t": entry(shape=[2, 2.0])}, "must be a list of sizes"),
        ({"t": entry(shape=[True, 4])}, "must be a list of sizes"),
        ({"t": entry(shape=[1] * 65)}, "must be a list of sizes"),
        ({"t": entry(data_offsets=[0])}, "must be two byte offsets"),
        ({"t": entry(data_offsets=[-16, 0])}, "must be two byte offsets"),
        ({"t": entry(data_offsets=[0, 2**64])}, "must be two byte offsets"),
        ({"t": entry(data_offsets=[0, "16"])}, "must be two byte offsets"),
        ({"t": entry(data_offsets=[16, 0])}, "span -16"),
        ({"t": entry(shape=[2, 3])}, "F32 [2, 3] takes 24 bytes, its data_offsets span 16"),
        ({"t": entry(shape=[2**40, 2**40])}, "its data_offsets span 16"),
        ({"t": entry(data_offsets=[8, 24])}, "leaves a hole before it"),
        ({"s": SPEC, "t": entry()}, "overlaps the one before"),
        ({"s": SPEC, "t": entry(data_offsets=[8, 24])}, "overlaps the one before"),
        ({"__metadata__": {"format": 1}, "t": SPEC}, "must map strings to strings"),
        ({"__metadata__": ["pt"], "t": SPEC}, "must map strings to strings"),
        ({}, "16 bytes after the last tensor belong to none"),
    ],
)
def test_bad_headers_are_refused(header: bytes | dict[str, object], message: str) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    with pytest.raises(SourceError, match=re.escape(message)) as caught:
        parse_header(raw, 8 + len(raw) + 16, "shard.safetensors")
    assert caught.value.where is not None
    assert caught.value.where.startswith("shard.safetensors")
    if isinstance(header, dict) and "t" in header and "__metadata__" not in header:
        assert "tensor 't'" in caught.value.where


def test_the_library_refuses_too(tmp_path: Path) -> None:
    """We are no stricter than the library on holes, overlaps and tails: it refuses the same three."""
    for header in ({"t": entry(data_offsets=[8, 24])}, {"s": SPEC, "t": SPEC}, {}):
        raw = json.dumps(header).encode()
        content = len(raw).to_bytes(8, "little") + raw + bytes(16)
        with pytest.raises(safetensors.SafetensorError):
            safetensors.numpy.load(content)


def test_truncated_file_says_what_it_has_and_needs(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file({"t": np.zeros(100, np.float32)}, path)
    whole = path.read_bytes()
    for kept, message in (
        (0, "ends after 0 bytes"),
        (7, "ends after 7 bytes"),
        (30, "the file ends at 30"),
        (len(whole) - 1, "holds 399 bytes of tensors, its header promises 400"),
    ):
        path.write_bytes(whole[:kept])
        with pytest.raises(SourceError, match=message) as caught:
            read_header(path)
        assert caught.value.where == "m.safetensors"
        assert "download it again" in str(caught.value)


def test_header_length_is_bounded() -> None:
    with pytest.raises(SourceError, match="100,000,000"):
        header_bytes((100_000_001).to_bytes(8, "little"), 2**40, "x.safetensors")
    assert header_bytes((100_000_000).to_bytes(8, "little"), 2**40, "x.safetensors") == 100_000_000


def test_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(SourceError, match="git lfs pull"):
        read_header(tmp_path / "x.safetensors")


def test_missing_and_unreadable_files_are_source_errors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.safetensors: cannot be read: No such file"):
        read_header(tmp_path / "gone.safetensors")
    with pytest.raises(SourceError, match="cannot be read"):
        read_header(tmp_path)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_random_bytes_never_raise_anything_else(raw: bytes) -> None:
    try:
        parse_header(raw, 8 + len(raw), "x")
    except SourceError:
        return


def test_checking_a_large_header_costs_a_few_times_its_json() -> None:
    layout = lay_out([(f"model.layers.{number}.weight", TensorSpec("BF16", (2880, 2880))) for number in range(20_000)])
    raw = layout.header[8:]

    def best(work: Callable[[], object]) -> float:
        def once() -> float:
            begin = time.process_time()
            work()
            return time.process_time() - begin

        return min(once() for _ in range(5))

    parsed = best(lambda: json.loads(raw))
    assert best(lambda: parse_header(raw, layout.nbytes, "x")) < 20 * parsed  # 3 to 4 times; quadratic work: thousands


# ---- reading


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    (tmp_path / "numbers").write_bytes(np.arange(1000, dtype="<u2").tobytes())
    return tmp_path


def test_reads_land_in_any_contiguous_buffer(numbers: Path) -> None:
    with Reader(numbers) as reader:
        words = np.zeros((5, 2), np.uint16)
        reader.read_into("numbers", 20, words)
        assert words.ravel().tolist() == list(range(10, 20))
        halves = np.zeros(4, ml_dtypes.bfloat16)  # has no buffer protocol of its own
        reader.read_into("numbers", 0, halves)
        assert halves.view(np.uint16).tolist() == [0, 1, 2, 3]
        scalar = np.zeros((), np.uint16)
        reader.read_into("numbers", 14, scalar)
        assert scalar == 7
        part = bytearray(6)
        reader.read_into("numbers", 2, memoryview(part)[2:4])
        assert part == b"\0\0\x01\0\0\0"
        reader.read_into("numbers", 2000, np.zeros((0, 3), np.uint16))


@pytest.mark.parametrize("row_stride", [6, 10, 64])
def test_strided_reads_gather_rows(numbers: Path, row_stride: int) -> None:
    with Reader(numbers) as reader:
        found = np.zeros((7, 3), np.uint16)
        reader.read_strided("numbers", 8, found, row_bytes=6, row_stride=row_stride, rows=7)
    expected = [[4 + row * row_stride // 2 + column for column in range(3)] for row in range(7)]
    assert found.tolist() == expected


def test_short_read_names_file_and_bytes(numbers: Path) -> None:
    with Reader(numbers) as reader, pytest.raises(SourceError, match="numbers: the file ends at byte 2,000") as caught:
        reader.read_into("numbers", 1990, bytearray(20))
    assert "expected at least 2,010" in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with Reader(tmp_path) as reader, pytest.raises(SourceError, match="gone: cannot be opened"):
        reader.read_into("gone", 0, bytearray(1))


def test_short_preads_are_continued(numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:7]], offset))
    found = np.zeros(500, np.uint16)
    with Reader(numbers) as reader:
        reader.read_into("numbers", 0, found)
    assert found.tolist() == list(range(500))


def test_read_errors_name_the_file(numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, buffers: object, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with Reader(numbers) as reader, pytest.raises(SourceError, match="numbers: cannot be read at byte 4: Input/output"):
        reader.read_into("numbers", 4, bytearray(1))


def open_descriptors() -> int:
    """How many this process has open; 0 where the system does not tell."""
    listing = Path("/proc/self/fd")
    return len(list(listing.iterdir())) if listing.exists() else 0


def test_many_threads_share_few_descriptors(tmp_path: Path) -> None:
    files = 3 * MAX_OPEN_FILES
    for number in range(files):
        (tmp_path / str(number)).write_bytes(number.to_bytes(4, "little") * 8)
    failures: list[object] = []
    before = open_descriptors()

    def read(first: int) -> None:
        for step in range(files):
            number = (first + step * 7) % files
            found = np.zeros(8, np.uint32)
            reader.read_into(str(number), 0, found)
            if set(found.tolist()) != {number}:
                failures.append((number, found))

    with Reader(tmp_path) as reader:
        threads = [threading.Thread(target=read, args=(first * 11,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert open_descriptors() <= before + MAX_OPEN_FILES + 8
    assert failures == []
    assert open_descriptors() <= before


# ---- writing


def test_writes_land_in_place_from_many_threads(tmp_path: Path) -> None:
    rows, columns = 64, 33
    expected = np.arange(rows * columns, dtype=np.uint32).reshape(rows, columns)
    with Writer(tmp_path / "out", expected.nbytes) as writer:
        threads = [
            threading.Thread(target=writer.write, args=(row * columns * 4, expected[row])) for row in range(rows)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.sync()
    assert (tmp_path / "out").read_bytes() == expected.tobytes()


@pytest.mark.parametrize("row_stride", [6, 10, 64])
def test_strided_writes_are_undone_by_strided_reads(tmp_path: Path, row_stride: int) -> None:
    rows = np.arange(21, dtype=np.uint16).reshape(7, 3) + 1
    with Writer(tmp_path / "out", 1000) as writer:
        writer.write_strided(8, rows, row_bytes=6, row_stride=row_stride, rows=7)
    content = np.frombuffer((tmp_path / "out").read_bytes(), np.uint16)
    assert np.count_nonzero(content) == 21
    back = np.zeros_like(rows)
    with Reader(tmp_path) as reader:
        reader.read_strided("out", 8, back, row_bytes=6, row_stride=row_stride, rows=7)
    assert np.array_equal(back, rows)


def test_a_new_file_has_its_size_and_space_at_once(tmp_path: Path) -> None:
    with Writer(tmp_path / "out", 1 << 20) as writer:
        assert not writer.reused
    status = (tmp_path / "out").stat()
    assert status.st_size == 1 << 20
    if hasattr(os, "posix_fallocate"):
        assert status.st_blocks * 512 >= 1 << 20


def test_a_file_of_the_right_size_keeps_its_bytes_and_any_other_does_not(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"abcd")
    with Writer(path, 4) as writer:
        assert writer.reused
        writer.write(1, b"X")
    assert path.read_bytes() == b"aXcd"
    for nbytes in (3, 6):
        with Writer(path, nbytes) as writer:
            assert not writer.reused
        assert path.read_bytes() == bytes(nbytes)
    with Writer(path, 0) as writer:
        assert not writer.reused
    assert path.read_bytes() == b""


@pytest.mark.parametrize("refusal", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_without_preallocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int) -> None:
    def refuse(descriptor: int, offset: int, length: int) -> None:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    Writer(tmp_path / "out", 100).close()
    assert (tmp_path / "out").stat().st_size == 100


def test_no_room_for_the_file_says_how_much_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match=r"out: the disk is full: the file needs 5\.00 GB in all, .* GB are free"):
        Writer(tmp_path / "out", 5_000_000_000)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "cannot be written: Input/output")]
)
def test_write_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    def fail(descriptor: int, content: object, offset: int) -> int:
        raise OSError(code, os.strerror(code))

    with Writer(tmp_path / "out", 4) as writer:
        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(OutputError, match=f"out: {message}"):
            writer.write(0, b"abcd")


def test_short_pwrites_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, content, offset: whole(fd, content[:3], offset))
    with Writer(tmp_path / "out", 10) as writer:
        writer.write(0, b"0123456789")
    assert (tmp_path / "out").read_bytes() == b"0123456789"


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"keep")
    (tmp_path / "out").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="cannot be created"):
        Writer(tmp_path / "out", 4)
    assert (tmp_path / "precious").read_bytes() == b"keep"


def test_refs_of_a_read_file_point_at_the_values(tmp_path: Path) -> None:
    values: dict[str, npt.NDArray[np.generic]] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.int64),
    }
    safetensors.numpy.save_file(values, tmp_path / "x.safetensors")
    refs: tuple[TensorRef, ...] = read_header(tmp_path / "x.safetensors").tensors
    with Reader(tmp_path) as reader:
        for ref in refs:
            found = np.empty(ref.spec.shape, numpy_dtype(ref.spec.dtype))
            reader.read_into(ref.file, ref.offset, found)
            assert np.array_equal(found, values[ref.name])
