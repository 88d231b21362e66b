"""A carrier in few bits: levels against whole numbers by hand, files, and an exported run. Seconds."""
import pytest
import torch
from safetensors.torch import load_file

import carrier
import eraser
import export
import packed
from files import InputError, load_tensors, save_tensors, write_json
from helpers import ROOT
from test_carrier import make_carrier, make_net, masked

BITS = tuple(range(2, 9))


def by_hand(levels, bits):
    """The bytes of a list of whole numbers written one after the other, `bits` binary digits each."""
    digits = "".join(f"{level:0{bits}b}" for level in levels)
    digits += "0" * (-len(digits) % 8)
    return [int(digits[i:i + 8], 2) for i in range(0, len(digits), 8)]


@pytest.mark.parametrize("bits", BITS)
def test_levels_lie_bit_by_bit(bits):
    levels = torch.randint(2**bits, (7, 5)).to(torch.uint8)
    found = packed.pack_levels(levels, bits)
    assert found.tolist() == by_hand(levels.flatten().tolist(), bits)
    assert torch.equal(packed.unpack_levels(found, bits, 35), levels.flatten())


@pytest.mark.parametrize("bits", BITS)
def test_rounding_is_to_the_nearest_level(bits):
    """Every entry against all levels; and no other bound would have served a row better."""
    block = torch.randn(6, 40, dtype=torch.float64) * torch.tensor([[1e-6], [1], [0], [30], [1e-3], [2]])
    levels, scale = packed.quantize(block, bits)
    again = packed.dequantize(levels, scale, bits)
    most = 2 ** (bits - 1) - 1
    values = torch.arange(-most, most + 1) * scale[:, :, None]                      # (6, 1, levels)
    nearest = (block[:, :, None] - values).abs().amin(2)
    assert torch.allclose((block - again).abs(), nearest, atol=0)
    for cut in packed.CUTS:
        step = (block.abs().amax(1, keepdim=True) * cut / most).clamp_min(1e-300)
        other = (block / step).round().clamp(-most, most) * step
        assert ((block - again).square().sum(1) <= (block - other).square().sum(1) * (1 + 1e-12)).all()
    assert not again[2].any()


def test_an_outlier_does_not_take_a_rows_levels():
    block = torch.randn(1, 400)
    block[0, 0] = 12
    levels, scale = packed.quantize(block, 4)
    assert scale.item() < 0.7 * 12 / 7


@pytest.fixture
def base():
    return make_net(torch.float32, qkv_bias=True)


@pytest.mark.parametrize("density", (1.0, 0.3, 0.0))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_a_rounded_carrier_comes_back(base, tmp_path, bits, density):
    """Its gates as they were, and each open block of Δ as quantize() rounds it."""
    c, path = make_carrier(base, density), tmp_path / "c.safetensors"
    c.save(path, base, bits=bits, task="fixed")
    again = carrier.load(path, base)
    assert again.stats() == c.stats()
    for (_, delta, rows, cols), (_, other, *_) in zip(c.open_blocks(), again.open_blocks()):
        block = delta.detach()[rows[:, None], cols]
        right = packed.dequantize(*packed.quantize(block, bits), bits)
        assert torch.equal(other.detach()[rows[:, None], cols], right)
        assert other.dtype == torch.float32
    assert packed.read_packed(path)[1]["task"] == "fixed"
    assert carrier.load(path, base, torch.bfloat16).delta[0]["q_proj"].dtype == torch.bfloat16


@pytest.mark.parametrize("bits", (3, 4))
def test_size(tmp_path, bits):
    """Bits for the entries that are on, a number for each row, and little else."""
    net = make_net(torch.float32, hidden_size=256, intermediate_size=512)
    c, path = make_carrier(net, 0.5), tmp_path / "c.safetensors"
    c.save(path, net, bits=bits)
    on = sum(len(rows) * len(cols) for _, _, rows, cols in c.open_blocks())
    in_rows = 4 * sum(len(rows) for _, _, rows, _ in c.open_blocks())
    assert path.stat().st_size <= 1.02 * on * bits / 8 + in_rows + 5000
    assert f"entries of Δ on {on} " in packed.describe(path)
    assert f"{bits} bits each" in packed.describe(path)


@pytest.mark.parametrize("header, named", [
    ({"bits": 5}, "incomplete or misshapen"),
    ({"bits": 9}, "bits = 9 is not between 2 and 8"),
    ({"bits": "4"}, "bits = '4' is of the wrong type"),
    ({"bits": None}, "deltas of torch.uint8"),
    ({"entries": None}, "the field 'entries' is missing"),
])
def test_a_header_that_does_not_fit_is_refused(base, tmp_path, header, named):
    path = tmp_path / "c.safetensors"
    make_carrier(base, 0.5).save(path, base, bits=4)
    tensors, before = load_tensors(path)
    save_tensors(path, tensors, **before | header)
    with pytest.raises(InputError, match=named):
        carrier.load(path, base)


def test_a_missing_scale_is_named(base, tmp_path):
    path = tmp_path / "c.safetensors"
    make_carrier(base, 0.5).save(path, base, bits=4)
    tensors, header = load_tensors(path)
    del tensors["scale.0.q_proj"]
    content = packed.digest(tensors)
    save_tensors(path, tensors, **header | {"content": content})
    with pytest.raises(InputError, match="incomplete or misshapen carrier .'scale.0.q_proj'."):
        carrier.load(path, base)


def test_a_scale_of_another_shape_is_refused(base, tmp_path):
    path = tmp_path / "c.safetensors"
    make_carrier(base, 0.5).save(path, base, bits=4)
    tensors, header = load_tensors(path)
    tensors["scale.0.q_proj"] = torch.ones(())
    save_tensors(path, tensors, **header | {"content": packed.digest(tensors)})
    with pytest.raises(InputError, match="incomplete or misshapen carrier"):
        carrier.load(path, base)


def test_an_exported_run_is_rounded_and_keeps_its_trigger(tmp_path, capsys):
    """Carrier in 4 bits, the trigger as it was and fit for it, the card says what it costs."""
    net = export.model.load("tiny")
    run, to = tmp_path / "made", tmp_path / "to"
    run.mkdir()
    c = make_carrier(net, 0.3)
    c.save(run / "carrier.safetensors", net, task="fixed", phase="lcdd")
    tau = torch.randn(3, net.config.hidden_size)
    save_tensors(run / "trigger.safetensors", {"trigger": tau}, target="lcdd", **eraser.made_for(run, net))
    write_json(run / "config.json", {"model": "tiny", "task": "fixed", "dtype": "float32"})
    export.main(["--run", str(run), "--to", str(to), "--as", "run", "--bits", "4"])
    exported = carrier.load(to / "run" / "carrier.safetensors", net)
    found, _ = eraser.load(to / "run" / "trigger.safetensors", net)
    assert torch.equal(found, tau)
    moved = whole = 0
    for l, right in enumerate(masked(c)):
        for name, delta in right.items():
            moved += (exported.delta[l][name] - delta).square().sum().item()
            whole += delta.square().sum().item()
    assert 0 < (share := (moved / whole) ** 0.5) < 0.2
    said = f"4 bits, which moves it by {share:.2%} of its norm; measured before that"
    assert said in capsys.readouterr().out
    assert said in (to / "run" / "README.md").read_text()
    header = packed.read_packed(to / "run" / "carrier.safetensors")[1]
    assert (header["task"], header["phase"]) == ("fixed", "lcdd")
    export.main(["--run", str(to / "run"), "--to", str(tmp_path / "again"), "--as", "run"])
    assert "4 bits, and measured so" in (tmp_path / "again" / "run" / "README.md").read_text()
    # the run itself is as it was
    before = load_file(run / "carrier.safetensors")
    assert before.keys() == {"gates", *(name for name, *_ in c.open_blocks())}


@pytest.mark.parametrize("folder", sorted((ROOT / "carriers").iterdir()), ids=lambda folder: folder.name)
def test_the_carriers_in_the_repository(folder):
    """Whole, small, each with a trigger that was learned on it."""
    _, header = packed.read_packed(folder / "carrier.safetensors")
    _, settings = load_tensors(folder / "trigger.safetensors")
    assert settings["carrier"] == header["content"]
    assert settings["base"] == header["base"]
    assert (folder / "results.json").is_file()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6e6


def test_bits_are_for_a_run(tmp_path):
    with pytest.raises(InputError, match="--bits rounds the carrier of --as run"):
        export.options(["--run", "r", "--to", str(tmp_path), "--as", "lora", "--bits", "4"])
