"""Tensors without torch: a .pt file comes out as torch has it, and nothing in it is called."""

import collections
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from headgate.placement.careful import opened
from headgate.placement.traces.readers import read, torch_file


def load_torch(path):
    with opened(path, "read") as file:
        return torch_file.load_torch(file)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
     torch.uint8, torch.uint16, torch.bool],
    ids=str,
)  # fmt: skip
def test_tensors_of_every_kind_come_out_as_torch_has_them(tmp_path, dtype):
    whole = (torch.arange(24) % 7).reshape(2, 3, 4).to(dtype)
    saved = {"a": whole, "view": whole[:, 1:, ::2], "t": whole.mT, "none": whole[:0], "one": whole[0, 0, 0]}
    torch.save([saved, (1, 2.5, "x", None, True), collections.OrderedDict(k=saved["a"])], tmp_path / "t.pt")
    found, plain, ordered = load_torch(tmp_path / "t.pt")
    for name, tensor in saved.items():
        expected = (tensor.float() if dtype == torch.bfloat16 else tensor).numpy()
        np.testing.assert_array_equal(found[name], expected)
        assert found[name].dtype == expected.dtype
    assert plain == (1, 2.5, "x", None, True)
    np.testing.assert_array_equal(ordered["k"], found["a"])


def test_a_parameter_is_its_tensor(tmp_path):
    torch.save(torch.nn.Parameter(torch.ones(2)), tmp_path / "t.pt")
    assert load_torch(tmp_path / "t.pt").tolist() == [1, 1]


class Call:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def test_nothing_but_tensors_is_called(tmp_path):
    flag = tmp_path / "was-run"
    torch.save({"records": Call(os.mkdir, str(flag))}, tmp_path / "t.pt")
    with pytest.raises(ValueError, match=r"must be of tensors and plain Python values only, got (posix|nt)\.mkdir"):
        read(tmp_path / "t.pt")
    assert not flag.exists()
    torch.save(torch.nn.Linear(2, 2), tmp_path / "t.pt")
    with pytest.raises(ValueError, match=r"values only, got torch\.nn\.modules\.linear\.Linear"):
        load_torch(tmp_path / "t.pt")
    torch.save(eval, tmp_path / "t.pt")
    with pytest.raises(ValueError, match=r"values only, got builtins\.eval|__builtin__\.eval"):
        load_torch(tmp_path / "t.pt")


def rewrite(path, change):
    """The archive with change(name, bytes) in place of each member."""
    with zipfile.ZipFile(path) as old:
        members = [(info.filename, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members:
            if (data := change(name, data)) is not None:
                new.writestr(name, data)


def test_torch_files_that_are_not_whole_are_refused(tmp_path):
    path = tmp_path / "t.pt"
    with pytest.raises(FileNotFoundError):
        load_torch(path)
    torch.save({"a": torch.arange(1000)}, path)
    good = path.read_bytes()
    for length in (0, 10, 500, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"t\.pt must be"):
            load_torch(path)
    for end, change, message in (
        ("data/0", lambda d: d[:-8], "storage 0 of .* must be 8000 stored bytes, got 7992"),
        ("data/0", lambda d: None, "storage 0 of .* must be in the archive"),
        ("data.pkl", lambda d: None, "holding one data.pkl, as torch.save writes it, got 0"),
        ("data.pkl", lambda d: d[:40], "must be as torch.save writes it"),
        ("data.pkl", lambda d: d.replace(b"M\xe8\x03\x85", b"M\xe9\x03\x85"), "must be inside its storage of 1000"),
        ("data.pkl", lambda d: d.replace(b"storage", b"storagf"), "persistent id of .* must be a storage"),
    ):
        path.write_bytes(good)
        rewrite(path, lambda name, data, end=end, change=change: change(data) if name.endswith(end) else data)
        with pytest.raises(ValueError, match=message):
            load_torch(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"must be a zip archive, whole, as torch.save writes it"):
        load_torch(path)
