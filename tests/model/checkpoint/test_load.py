"""Opening a model directory: sound ones give the same net however they are written, hostile ones are refused."""

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint.card import INDEX, WEIGHTS, read_card
from model.checkpoint.header import MAX_HEADER_BYTES, Entry, modern, parse, read_header
from model.checkpoint.load import load_model
from model.errors import ModelRefused
from model.nets.config import MAX_PARAMETERS
from tests.model.convert.directories import entry, safetensors, weights, write_model
from tests.model.convert.refusals import refusal
from tests.model.tiny import CPU, T, tiny_model

Tensors = dict[str, Tensor]


def why(directory: Path) -> str:
    """The line with which this directory is refused when its net is loaded."""
    return refusal(lambda: load_model(read_card(directory), CPU, torch.float32))


def output(directory: Path) -> Tensor:
    """What the net of this directory says to a fixed input."""
    model = load_model(read_card(directory), CPU, torch.float32)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        out: Tensor = model.net(x.to(memory_format=torch.channels_last), model.table[[3, 17]])
    return out


def old_names(tensors: Tensors) -> Tensors:
    """The same weights as diffusers wrote them in 2022."""
    new = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, tensor in tensors.items():
        for today, then in new.items():
            name = name.replace(today, then)
        renamed[name] = tensor
    return renamed


# Good ones


def test_a_sound_directory_gives_its_net_and_a_row_for_every_timestep(tmp_path: Path) -> None:
    model, expected = load_model(read_card(write_model(tmp_path)), CPU, torch.float32), tiny_model()

    assert model.parameters == expected.parameters
    assert model.table.shape == (T, model.net.embedding_width)
    assert torch.equal(model.table, expected.table)


def test_folders_and_a_flat_directory_give_the_same_net(tmp_path: Path) -> None:
    assert torch.equal(output(write_model(tmp_path / "a")), output(write_model(tmp_path / "b", folders=True)))


def test_attention_may_be_spelled_as_in_2022(tmp_path: Path) -> None:
    renamed = old_names(weights())
    assert any(".query." in name for name in renamed)

    assert torch.equal(output(write_model(tmp_path / "a")), output(write_model(tmp_path / "b", tensors=renamed)))


def test_only_layers_of_attention_are_renamed() -> None:
    assert modern("mid_block.attentions.0.proj_attn.bias") == "mid_block.attentions.0.to_out.0.bias"
    assert modern("down_blocks.1.attentions.0.to_q.weight") == "down_blocks.1.attentions.0.to_q.weight"
    assert modern("query.weight") == "query.weight"
    assert modern("conv_in.weight") == "conv_in.weight"
    assert modern("bogus") == "bogus"


def test_blocks_may_be_called_as_in_the_summer_of_2022(tmp_path: Path) -> None:
    assert modern("downsample_blocks.0.resnets.1.conv1.bias") == "down_blocks.0.resnets.1.conv1.bias"
    assert modern("mid.attentions.0.query.weight") == "mid_block.attentions.0.to_q.weight"
    assert modern("conv_in.mid.weight") == "conv_in.mid.weight"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_may_be_stored_in_any_float(tmp_path: Path, dtype: torch.dtype) -> None:
    rounded = {name: tensor.to(dtype) for name, tensor in weights().items()}
    exact = {name: tensor.float() for name, tensor in rounded.items()}

    assert torch.equal(
        output(write_model(tmp_path / "a", tensors=rounded)), output(write_model(tmp_path / "b", tensors=exact))
    )


def test_metadata_is_allowed(tmp_path: Path) -> None:
    write_model(tmp_path)
    save_file(weights(), tmp_path / WEIGHTS, metadata={"format": "pt"})

    assert output(tmp_path).isfinite().all()


# Weights in several files, or in half precision

SHARDS = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]


def write_shards(directory: Path, halves: tuple[Tensors, Tensors], changes: dict[str, str] | None = None) -> Path:
    """A model directory with its weights in two files, and an index that says so, but for `changes`."""
    first, second = halves
    (write_model(directory) / WEIGHTS).unlink()
    for name, tensors in zip(SHARDS, (first, second), strict=True):
        save_file(tensors, directory / name)
    places = {key: SHARDS[0] for key in first} | {key: SHARDS[1] for key in second} | (changes or {})
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return directory


def halves() -> tuple[Tensors, Tensors]:
    """The tiny net's weights in two parts."""
    tensors = sorted(weights().items())
    return dict(tensors[:20]), dict(tensors[20:])


def test_weights_in_several_files_are_the_same_net(tmp_path: Path) -> None:
    assert torch.equal(output(write_model(tmp_path / "a")), output(write_shards(tmp_path / "b", halves())))


def test_the_digest_is_that_of_every_file_with_weights(tmp_path: Path) -> None:
    first, second = halves()
    before = read_card(write_shards(tmp_path, (first, second))).digest
    second["mid_block.resnets.0.conv1.bias"][0] += 1
    save_file(second, tmp_path / SHARDS[1])

    assert read_card(tmp_path).digest != before


def test_a_file_that_the_index_names_and_that_is_missing_is_named(tmp_path: Path) -> None:
    (write_shards(tmp_path, halves()) / SHARDS[1]).unlink()

    assert refusal(lambda: read_card(tmp_path)) == f"{SHARDS[1]} is missing"


def test_a_tensor_in_two_files_is_ambiguous(tmp_path: Path) -> None:
    first, second = halves()

    directory = write_shards(tmp_path, (first, second | first), {next(iter(first)): SHARDS[0]})

    assert "holds weights twice" in why(directory)


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/passwd", "..", "a/b.safetensors", "a.bin", "", ".safetensors", "a\n.safetensors"]
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    write_shards(tmp_path, halves(), {"conv_in.bias": name})

    assert refusal(lambda: read_card(tmp_path)).startswith(f"{INDEX}: weight_map must name at most 256 files")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[]"])
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: str) -> None:
    (write_shards(tmp_path, halves()) / INDEX).write_text(index)

    assert refusal(lambda: read_card(tmp_path)).startswith(INDEX)


def test_weights_in_half_precision_are_taken_where_the_full_ones_are_missing(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in weights().items()}
    write_model(tmp_path / "a", tensors=half)
    (write_model(tmp_path / "b") / WEIGHTS).unlink()
    save_file(half, tmp_path / "b" / "diffusion_pytorch_model.fp16.safetensors")
    assert torch.equal(output(tmp_path / "a"), output(tmp_path / "b"))

    save_file(weights(), tmp_path / "b" / WEIGHTS)
    assert torch.equal(output(tmp_path / "b"), output(write_model(tmp_path / "c")))


# Weights that do not fit the configuration


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["conv_out.bias"]

    assert why(write_model(tmp_path, tensors=tensors)) == f"{WEIGHTS} lacks conv_out.bias"


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    wrong = weights() | {"conv_in.weight": torch.zeros(8, 3, 3, 3)}
    message = f"{WEIGHTS}: conv_in.weight must have shape [8, 1, 3, 3], got [8, 3, 3, 3]"

    assert why(write_model(tmp_path, tensors=wrong)) == message


@pytest.mark.parametrize("name", ["bogus", "class_embedding.weight", "conv_in.weight.more", "\n.\n", "é"])
def test_an_extra_tensor_is_refused(tmp_path: Path, name: str) -> None:
    message = why(write_model(tmp_path, tensors=weights() | {name: torch.zeros(3)}))

    assert message == f"{WEIGHTS} holds 1 tensors that config.json does not call for, such as {ascii(name)}"


def test_a_wrong_name_is_a_missing_one(tmp_path: Path) -> None:
    tensors = weights()
    tensors["conv_inn.bias"] = tensors.pop("conv_in.bias")

    assert why(write_model(tmp_path, tensors=tensors)) == f"{WEIGHTS} lacks conv_in.bias"


def test_attention_under_both_its_names_is_ambiguous(tmp_path: Path) -> None:
    message = why(write_model(tmp_path, tensors=weights() | old_names(weights())))

    assert message == f"{WEIGHTS} holds weights twice, or under both their old and their new names"


def test_the_weights_of_a_larger_net_are_refused(tmp_path: Path) -> None:
    assert "must have shape" in why(write_model(tmp_path, {"block_out_channels": [16, 32]}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    tensors = weights()
    tensors["mid_block.resnets.0.conv1.bias"][3] = bad
    message = f"{WEIGHTS}: mid_block.resnets.0.conv1.bias holds numbers that are not finite"

    assert why(write_model(tmp_path, tensors=tensors)) == message


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_no_floats_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = weights() | {"conv_in.bias": torch.zeros(8).to(dtype)}
    message = why(write_model(tmp_path, tensors=tensors))

    assert message.startswith(f"{WEIGHTS} holds 'conv_in.bias' as '")
    assert message.endswith("', which is not one of F64, F32, F16, BF16")


def test_a_net_of_absurd_size_is_counted_before_it_is_built(tmp_path: Path) -> None:
    giant = {"block_out_channels": [8192] * 8, "layers_per_block": 16, "sample_size": 128}
    types = {"down_block_types": ["DownBlock2D"] * 8, "up_block_types": ["UpBlock2D"] * 8}
    directory = write_model(tmp_path, giant | types)

    assert refusal(lambda: read_card(directory)).startswith(
        f"config.json: at most {MAX_PARAMETERS} parameters are allowed, it calls for over"
    )


def test_a_net_that_is_too_large_by_its_rarer_parts_is_counted_before_memory_is_spent(tmp_path: Path) -> None:
    large = {"block_out_channels": [8192], "layers_per_block": 1, "sample_size": 8}
    types = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}

    assert why(write_model(tmp_path, large | types)).startswith(
        f"config.json: at most {MAX_PARAMETERS} parameters are allowed, it calls for"
    )


# Hostile files

FLOAT = b"\0\0\0\0"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "it is empty"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "its header claims 0 of 7 bytes"),
    "length without header": (struct.pack("<Q", 2), "its header claims 2 of 8 bytes"),
    "length bomb": (safetensors({}, length=2**63), f"its header claims {2**63} of 10 bytes"),
    "length of all ones": (safetensors({}, length=2**64 - 1), f"its header claims {2**64 - 1} of 10 bytes"),
    "length beyond the file": (safetensors({}, length=100), "its header claims 100 of 10 bytes"),
    "header cut off": (safetensors('{"a": {"dtype"'), "malformed header: Expecting ':' delimiter"),
    "header not UTF-8": (safetensors(b'{"\xff": 1}'), "malformed header: 'utf-8' codec can't decode byte"),
    "header a list": (safetensors([]), "malformed header: not an object"),
    "nested header": (safetensors('{"a":' * 100_000), "malformed header: it is nested too deeply"),
    "nested shape": (safetensors('{"a": ' + "[" * 1_000_000), "malformed header: it is nested too deeply"),
    "duplicate keys": (
        safetensors('{"a": %s, "a": %s}' % ((json.dumps(entry([1], 0, 4)),) * 2), FLOAT),
        "malformed header: a key occurs twice",
    ),
    "duplicate field": (
        safetensors('{"a": {"dtype": "F32", "dtype": "F16", "shape": [1], "data_offsets": [0, 4]}}', FLOAT),
        "malformed header: a key occurs twice",
    ),
    "entry a number": (safetensors({"a": 1}), "malformed entry"),
    "entry without shape": (safetensors({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "malformed entry"),
    "entry with a secret": (safetensors({"a": entry([], 0, 4) | {"code": "x"}}, FLOAT), "malformed entry"),
    "dtype a list": (safetensors({"a": entry([1], 0, 4, ["F32"])}, FLOAT), "not one of F64"),
    "dtype unknown": (safetensors({"a": entry([1], 0, 4, "F128")}, FLOAT), "not one of F64"),
    "negative shape": (safetensors({"a": entry([-1, -1], 0, 4)}, FLOAT), "malformed shape or offset"),
    "negative offset": (safetensors({"a": entry([1], -4, 0)}, FLOAT), "malformed shape or offset"),
    "offsets swapped": (safetensors({"a": entry([1], 4, 0)}, FLOAT), "bytes do not match its shape"),
    "float shape": (safetensors({"a": entry([1.0], 0, 4)}, FLOAT), "malformed shape or offset"),
    "boolean shape": (safetensors({"a": entry([True], 0, 4)}, FLOAT), "malformed shape or offset"),
    "infinite shape": (
        safetensors('{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}', FLOAT),
        "shape",
    ),
    "shape a string": (safetensors({"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, FLOAT), "shape"),
    "a hundred dimensions": (safetensors({"a": entry([1] * 100, 0, 4)}, FLOAT), "malformed shape or offset"),
    "overflow of 64 bits": (safetensors({"a": entry([2**32, 2**32], 0, 0)}), "bytes do not match its shape"),
    "overflow of one factor": (safetensors({"a": entry([2**64 + 1], 0, 4)}, FLOAT), "malformed shape or offset"),
    "three offsets": (
        safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, FLOAT),
        "malformed shape or offset",
    ),
    "overlap": (safetensors({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, FLOAT * 2), "overlap or leave holes"),
    "the same bytes twice": (
        safetensors({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, FLOAT),
        "overlap or leave holes",
    ),
    "hole": (safetensors({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, FLOAT * 3), "overlap or leave holes"),
    "hole at the start": (safetensors({"a": entry([1], 4, 8)}, FLOAT * 2), "overlap or leave holes"),
    "trailing bytes": (safetensors({"a": entry([1], 0, 4)}, FLOAT + b"MZ"), "6 bytes, 4 expected"),
    "truncated": (safetensors({"a": entry([2], 0, 8)}, FLOAT), "4 bytes, 8 expected"),
    "a pickle": (pickle.dumps({"a": list(range(100))}), "is not a safetensors file"),
    "a zip, as torch.save writes": (b"PK\x03\x04" + bytes(100), "is not a safetensors file"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, kind: str) -> None:
    content, expected = HOSTILE[kind]
    (write_model(tmp_path) / WEIGHTS).write_bytes(content)
    message = why(tmp_path)

    assert message.startswith(WEIGHTS) and expected in message
    assert len(message) < 300


def test_a_million_empty_tensors_are_not_even_parsed(tmp_path: Path) -> None:
    one = '"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    content = safetensors("{" + ",".join(one % i for i in range(1_000_000)) + "}")
    (write_model(tmp_path) / WEIGHTS).write_bytes(content)

    assert (
        why(tmp_path)
        == f"{WEIGHTS} is not a safetensors file: its header claims {len(content) - 8} of {len(content)} bytes"
    )


def test_as_many_empty_tensors_as_a_header_holds_are_cheap(tmp_path: Path) -> None:
    one = '"%05d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(one % i for i in range(MAX_HEADER_BYTES // 60)) + "}"
    (write_model(tmp_path) / WEIGHTS).write_bytes(safetensors(header))

    assert why(tmp_path) == f"{WEIGHTS} lacks conv_in.weight"


def test_a_sparse_terabyte_costs_nothing(tmp_path: Path) -> None:
    with (write_model(tmp_path) / WEIGHTS).open("r+b") as file:
        file.truncate(1 << 40)

    assert "is truncated or has data behind its tensors" in why(tmp_path)


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_download_that_was_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    path = write_model(tmp_path) / WEIGHTS
    path.write_bytes(path.read_bytes()[:-cut])

    assert "is truncated" in why(tmp_path)


class Bomb:
    """What a malicious pickle holds: it writes a file when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.canary}'",)


@pytest.mark.parametrize("name", [WEIGHTS, "diffusion_pytorch_model.bin", "pytorch_model.pt"])
def test_a_pickle_does_not_run(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (write_model(tmp_path) / WEIGHTS).unlink()
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(canary)))

    with pytest.raises(ModelRefused):
        load_model(read_card(tmp_path), CPU, torch.float32)
    assert not canary.exists()


def test_the_header_of_a_sound_file_is_read_without_its_data(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(0), "c": torch.tensor(1.0).half()}, tmp_path / "f.safetensors")

    assert read_header(tmp_path / "f.safetensors") == {"a": ("F32", (2, 3)), "b": ("F32", (0,)), "c": ("F16", ())}


# What was checked is what is used


def other_weights() -> Tensors:
    """Weights of the same shapes, and other values."""
    return {name: tensor + 1 for name, tensor in weights().items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_digest_is_that_of_the_bytes_that_were_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    card = read_card(write_model(tmp_path, tensors={name: tensor.to(dtype) for name, tensor in weights().items()}))
    before = card.digest
    same = load_model(card, CPU, torch.float32)
    write_model(tmp_path, tensors={name: tensor.to(dtype) for name, tensor in other_weights().items()})
    other = load_model(card, CPU, torch.float32)

    assert same.digest == card.digest == before
    assert other.digest == read_card(tmp_path).digest != before


def test_the_digest_of_weights_in_several_files_is_that_of_what_was_loaded(tmp_path: Path) -> None:
    card = read_card(write_shards(tmp_path, halves()))
    before = card.digest
    save_file({name: tensor + 1 for name, tensor in halves()[1].items()}, tmp_path / SHARDS[1])

    assert load_model(card, CPU, torch.float32).digest == read_card(tmp_path).digest != before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: os.truncate(path, 50_000), "became shorter while it was read"),
        (lambda path: os.truncate(path, 1 << 20), "became longer while it was read"),
        (lambda path: path.unlink() or path.write_bytes(b"another"), None),
    ],
    ids=["cut", "longer", "replaced"],
)
def test_a_file_that_changes_after_its_header_was_read_kills_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], said: str | None
) -> None:
    """A mapped file that becomes shorter would end the process by a signal."""
    card = read_card(write_model(tmp_path))
    before = card.digest

    def parse_then_change(file: BufferedReader, name: str) -> tuple[list[Entry], bytes]:
        parsed = parse(file, name)
        change(card.weights)
        return parsed

    monkeypatch.setattr("model.checkpoint.load.parse", parse_then_change)
    if said is None:
        assert load_model(card, CPU, torch.float32).digest == before
    else:
        with pytest.raises(ModelRefused, match=said):
            load_model(card, CPU, torch.float32)


PEAK = """
import resource, sys, torch
from pathlib import Path
from model.checkpoint.load import read_tensors

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

before = peak()
tensors, _ = read_tensors(Path(sys.argv[1]), {name: (1 << 20,) for name in "abcdefghijklmnop"})
print((peak() - before) / sum(t.numel() * 4 for t in tensors.values()))
"""


@pytest.mark.alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_load_holds_one_copy_of_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "w.safetensors"
    save_file({name: torch.zeros(1 << 20, dtype=dtype) for name in "abcdefghijklmnop"}, path)
    ran = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True)

    assert float(ran.stdout) < 1.3
