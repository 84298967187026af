"""The initial inputs of fuzzing: ``python -m tests.fuzz.seeds`` writes them into the corpus."""

import gzip
import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import zstandard
from safetensors.torch import save

from streams.formats.json_body import make_example
from tests.fuzz.targets import NAMED, SPECS

CORPUS = Path(__file__).parent / "corpus"
WRONG_JSON = (
    b'{"support_x": [[1, 2], [3, NaN]], "support_y": [0, 1e400]}',
    b'{"support_x": [[1, 2], [3, -Infinity]], "support_y": [9007199254740993, 9223372036854775808]}',
    b'{"support_x": [[1, 2], [3]], "support_y": [true, null]}',
    b'{"support_x": [[1, "2"], {"a": 4}], "support_x": []}',
    b'{"support_x": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    b'\xef\xbb\xbf {"\\ud800": [1.0, 1E2, -0.0, 256, -1, 0.5]}',
    b'{"support_x": [[], []], "support_y": [], "query_x": 1, "query_y": ""}',
)

FIRST_LINES = (
    b"k,x,z,y\na,1,2,0\na,2,3,1\nb,5,6,2\nb,7,8,0\n",
    b"\xef\xbb\xbfk,x,z,y\r\na,1,2,0\r\na,2,3,1\n\r\nb,5,6,2\r\n",
    b"k,x,z,y\ra,1,2,0\ra,2,3,1\r",
    b"k,x,x,y,z\na,1,2,0,4\n",
    b'"k","x","z","y"\n"a ""b"" c","1",2,0\n"a ""b"" c",3,4,"1"\n"un, closed,5,6,0\n',
    b"k,x,z,y\na,99999999999999999999999999999999,NaN,0\na,-1e400,1,1\n,,,\nnull,1,2,0\n",
    b"y,k,z,x\n0,a,1,2024-01-31\n1,a,2,0000-01-01\n2,a,3,99999-01-01T25:61:00+99:99\n0,a,4,20240131\n",
    b"y,k,z,x\n0,a,1,-62135596801\n1,a,2,253402300800\n0,a,3,1e9\n1,a,4,2024-02-29T12:00:00+14:00\n",
    b"\xff\xfek\x00,\x00x\x00\n",
    b"k,x,z,y",
    b'k,"x\n',
    b"",
)
"""Tables with marks of byte order, three kinds of line ends, quotes, repeated columns, and far numbers and dates."""
OBJECTS = (
    b'{"k": "a", "x": 1, "z": 2, "y": 0}\n{"k": "a", "x": 3, "z": null, "y": 1}\r\n{"k": "a", "x": 3, "z": 4}\n',
    b'\xef\xbb\xbf{"k": "a", "x": 1, "z": 2, "y": 0}\n\n{"k": "a", "x": 5, "z": 6, "y": 2}',
    b'{"k": "a", "x": 1, "x": 2, "z": 2, "y": 0, "y": [1]}\n{"k": {"a": [1]}, "x": NaN, "z": -Infinity, "y": 1e999}\n',
    b'{"k": 1e3, "x": ' + b"9" * 5000 + b', "z": 1, "y": 0}\n{"k": true, "x": "2024-13-01", "z": [[[]]], "y": -1}\n',
    b'{"k": "a", "x": '
    + b"9" * 320
    + b', "z": '
    + b"9" * 320
    + b', "y": 0}\n{"k": "a", "x": 1e300, "z": -1e308, "y": 0}\n',
    b'{"k": "\\ud800", "x": "2024-01-01T00:00:00Z", "z": 1, "y": 0}\n{"k": "a", "x": 2534023008e2, "z": 1, "y": 0}\n',
)
"""Rows of JSON of the same kinds."""
TEXTS = (
    b'{"support_x": ["a web server", "", "na\xc3\xafve"], "support_y": [0, 1, 2], "query_x": ["b"], "query_y": [1]}',
    b'{"support_x": ["a", 3, null], "support_y": [0, 1, 2]}',
    b'{"support_x": ["\\ud800", "\\u0000", "' + b"long " * 300 + b'"], "support_y": [0, 1, 2]}',
    b'{"support_x": [[101, 102, 0, 0, 0, 0, 0, 0]], "support_y": [0], "query_x": [["b"]], "query_y": [1]}',
    b'{"support_x": ["a"], "support_x.input_ids": [[1, 2, 3, 4, 5, 6, 7, 8]], "support_y": [0]}',
    b'{"support_x": "a", "support_y": 0}',
    b'{"x": "a web server", "y": 0, "k": "of John"}\n{"x": "\\ud83d", "y": 1, "k": ""}\n{"x": 3, "y": 2, "k": null}\n',
    b'"a ""quoted"" server",0,1\nfirst,1,\n"two, three",2,\xff\n',
)
"""Bodies and rows of texts."""


def tensors(which: int, query: bool = True) -> dict[str, torch.Tensor]:
    """Return the tensors of a small task of one spec."""
    spec, random = SPECS[which], torch.Generator().manual_seed(which)
    found = {}
    for part, n in (("support", 4), ("query", 2))[: 1 + query]:
        shape = [3 if size < 0 else size for size in spec.x_shape]
        found[f"{part}_x"] = (9 * torch.rand(n, *shape, generator=random)).to(getattr(torch, spec.x_dtype))
        labels = torch.randint(spec.ways or 2, (n, *spec.y_shape), generator=random)
        found[f"{part}_y"] = labels if spec.y == "class" else labels.float()
    return found


def named_tensors(weighted: bool = False, ignored: bool = False) -> dict[str, torch.Tensor]:
    """Return the tensors of a small task of named inputs and targets."""
    found, random = {}, torch.Generator().manual_seed(9)
    for part, n in (("support", 4), ("query", 2)):
        found[f"{part}_x.tokens"] = torch.randint(9, (n, 3), generator=random)
        found[f"{part}_x.mask"] = torch.ones(n, 2, dtype=torch.uint8)
        found[f"{part}_y.tags"] = torch.randint(3, (n, 3), generator=random)
        found[f"{part}_y.score"] = torch.randn(n, generator=random)
        if weighted:
            found[f"{part}_weight"] = torch.arange(n).float()
        if ignored:
            found[f"{part}_y.tags"][:, 1] = -100
    return found


def npz(which: int, packed: bool) -> bytes:
    """Return that task as an .npz file."""
    buffer = BytesIO()
    (np.savez_compressed if packed else np.savez)(buffer, **{name: t.numpy() for name, t in tensors(which).items()})
    return buffer.getvalue()


def arrow(which: int, **options: str) -> bytes:
    """Return that task as an Arrow file."""
    named = tensors(which)
    x, y = (torch.cat([named[f"support_{name}"], named[f"query_{name}"]]).numpy() for name in "xy")
    columns = {"x": _column(x), "y": _column(y), "query": np.arange(len(y)) >= 4}
    return _write_arrow(columns, **options)


def _write_arrow(columns: dict[str, Any], **options: str) -> bytes:
    table, buffer = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_file(buffer, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    written: bytes = buffer.getvalue().to_pybytes()
    return written


def _column(values: np.ndarray) -> pa.Array:
    if values.ndim > 2:
        return pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    flat = pa.array(values.ravel())
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def seeds() -> Iterator[tuple[str, str, bytes]]:
    """Yield (target, name, input)."""
    for which in range(len(SPECS)):
        body = save(tensors(which))
        yield "safetensors", f"task-{which}", body
        yield "safetensors", f"no-query-{which}", save(tensors(which, query=False))
        wrongs = [("query_x", float("nan")), ("query_x", float("-inf")), ("query_y", 255)]
        for number, (name, wrong) in enumerate(wrongs if SPECS[which].x_dtype != "uint8" else wrongs[2:]):
            bad = tensors(which)
            bad[name].view(-1)[-1] = wrong
            yield "safetensors", f"wrong-{which}-{number}", save(bad)
        lists = {name: tensor.tolist() for name, tensor in tensors(which).items()}
        yield "json", f"task-{which}", json.dumps(lists).encode()
        yield (
            "json",
            f"no-query-{which}",
            json.dumps({name: lists[name] for name in ("support_x", "support_y")}).encode(),
        )
        yield "compressed", f"zstd-{which}", b"\x00" + zstandard.compress(body)
        yield "compressed", f"gzip-{which}", b"\x01" + gzip.compress(body, mtime=0)
        yield "npz", f"stored-{which}", npz(which, packed=False)
        yield "npz", f"packed-{which}", npz(which, packed=True)
        yield "arrow", f"plain-{which}", arrow(which)
    for weighted, ignored in ((False, False), (True, False), (False, True), (True, True)):
        named = named_tensors(weighted, ignored)
        name = f"named{'-weighted' if weighted else ''}{'-ignored' if ignored else ''}"
        yield "safetensors", name, save(named)
        buffer = BytesIO()
        np.savez(buffer, **{key: tensor.numpy() for key, tensor in named.items()})
        yield "npz", name, buffer.getvalue()
        rows = {}
        for column in ("x.tokens", "x.mask", "y.tags", "y.score", *(["weight"] if weighted else [])):
            whole = torch.cat([named[f"support_{column}"], named[f"query_{column}"]])
            rows[column] = _column(whole.numpy())
        yield "arrow", name, _write_arrow({**rows, "query": np.arange(6) >= 4})
    without = {key: tensor for key, tensor in named_tensors(True).items() if key != "query_y.tags"}
    for number, wrong in enumerate((-1.0, float("nan"), 0.0)):
        bad = named_tensors(True)
        bad["support_weight"][:] = wrong
        yield "safetensors", f"wrong-weight-{number}", save(bad)
    yield (
        "safetensors",
        "named-adapt",
        save({key: one for key, one in without.items() if key[:7] not in ("query_y", "query_w")}),
    )
    yield "arrow", "packed", arrow(0, compression="zstd")
    stream = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compressobj()
    yield "compressed", "unsized", b"\x00" + stream.compress(save(tensors(0))) + stream.flush()
    yield "compressed", "bomb", b"\x01" + gzip.compress(bytes(1_000_000), mtime=0)
    yield "compressed", "plain", b"\x02" + save(tensors(0))
    yield "json", "named", json.dumps(make_example(NAMED) | {"support_weight": [0, 1, 2.5, 1e3]}).encode()
    for number, text in enumerate(WRONG_JSON):
        yield "json", f"wrong-{number}", text
    for which in range(len(SPECS)):
        lines_of_json, comma = bytes([2 * which]), bytes([2 * which + 1])
        pixels = b"[[[1, 2]], [[3, 4]], [[5, 255]]]"
        for number, x in enumerate((b"%d.5", b"[%d, 0.5]", pixels)):
            lines = (
                b'{"x": ' + (x % n if b"%d" in x else x) + b', "y": %d, "k": "%d"}\n' % (n % 3, n // 4)
                for n in range(9)
            )
            yield "rows", f"json-{which}-{number}", lines_of_json + b"".join(lines)
        yield "rows", f"csv-{which}", comma + b"".join(b"%d.5,%d,%d\n" % (n, n % 3, n // 4) for n in range(9))
        yield "rows", f"broken-{which}", comma + b'"1,2,3\n\xff,1,2\n1e999,nan,2\n1,2\n,,\n"1","2","3"\n1,2,3'
    yield from tables()
    for number, id in enumerate([b"a", b"task-1.x:y_z", b"../a", b"a\n", "\u0430".encode(), b"x" * 41, b"\x00", b""]):
        yield "ids", f"id-{number}", id


def tables() -> Iterator[tuple[str, str, bytes]]:
    """Yield inputs of the targets that read tables and task files of lines."""
    for which in range(len(SPECS)):
        for option in (0, 8, 16):
            values = (b"2024-01-0%d", b"red %d")[which] if which < 2 else b"%d.5"
            cells = [(values % (n % 3 + 1), n % 3, b"key %d" % (n % 2), n // 3 + 1) for n in range(12)]
            yield (
                "table",
                f"csv-{which}-{option}",
                bytes([2 * which + 1 + option]) + b"".join(b"%s,%d,%s,2024-01-%02d\n" % row for row in cells),
            )
            text = (b'{"x": "%s", "y": %d, "k": "%s", "t": %d}\n' % (*row[:3], 86400 * row[3]) for row in cells)
            yield "table", f"json-{which}-{option}", bytes([2 * which + option]) + b"".join(text)
        yield (
            "table",
            f"broken-{which}",
            bytes([2 * which + 17]) + b'"1,2,3\n\xff,1,2,\n,nan,a,1e999\nNA,,a,2024-02-30\n,,,\n',
        )
    for number, text in enumerate(
        [b"\x00x,y\n1,2\n3,0\n", b"\x00y,query,x\n1,true,2\n0,0,3\n", b"\x00", b"\x00x,x\n1,2"]
    ):
        yield "lines", f"csv-{number}", text
    objects = b'{"x": [1, 2], "y": 0}\n{"x": [3, 4.5], "y": 1, "query": true}\n', b'{"x": [[[1]]], "y": 2}\n\n[1]\n'
    for number, text in enumerate(objects):
        yield "lines", f"json-{number}", b"\xff" + text
    yield from whole_files()


def whole_files() -> Iterator[tuple[str, str, bytes]]:
    """Yield inputs of the targets that read tables with their first line, and texts."""
    for number, text in enumerate(FIRST_LINES):
        yield "header", f"csv-{number}", b"\x01" + text
        yield "header", f"date-{number}", b"\x07" + text
    for number, text in enumerate(OBJECTS):
        yield "header", f"json-{number}", b"\x00" + text
        yield "header", f"json-date-{number}", b"\x06" + text
    for number, text in enumerate(TEXTS):
        yield "texts", f"text-{number}", text


def main() -> None:
    """Write the corpus."""
    for target, name, data in seeds():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()
