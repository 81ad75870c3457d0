"""A run of rounded weights is a run: loaded is what was rounded, of every mixer and FFN, in the bytes counted."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import swamla
from swamla.checkpoint import convert_checkpoint, find_checkpoint, quantize, quantized_bytes, save_quantized
from swamla.checkpoint.folder import FORMAT_VERSION, load_checkpoint, save_checkpoint
from swamla.checkpoint.quantized import formats_of
from swamla.checkpoint.shards import ShardReader
from swamla.cli import main
from swamla.config import to_plain
from swamla.data.config import DataConfig
from swamla.data.tokenizer import IdTokenizer
from swamla.errors import CorruptError, UsageError
from swamla.files import sha256_of
from swamla.inference.decoding import Decoder
from swamla.inference.sampling import Sampling
from swamla.model.language_model import LanguageModel, LanguageModelConfig
from swamla.ops.rounding import FORMATS, GROUP
from swamla.train.config import RunConfig, TrainConfig
from tests.model.helpers import FFNS, MIXERS, build_model, hybrid_config
from tests.toys import registered


@pytest.fixture(autouse=True)
def _toys() -> Iterator[None]:
    with registered():
        yield


CONFIGS = {name: hybrid_config(pattern=(name,)) for name in MIXERS} | {
    f"ffn {name}": hybrid_config(pattern=("gdn", "mla"), ffn=name) for name in FFNS
}


def as_run(folder: Path, model: LanguageModel) -> Path:
    """A run of the model, without training state and data."""
    config = RunConfig(model=model.config, data=DataConfig(source="ids"), train=TrainConfig(steps=1))
    folder.mkdir()
    weights = dict(model.state_dict(keep_vars=True))
    if model.config.tied_head:
        weights["head.weight"] = weights["embedding.weight"]
    save_checkpoint(folder / "checkpoints", 3, tensors={"model": weights}, state={"weights_only": True})
    IdTokenizer(model.config.vocab_size - 1).save(folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps({"format_version": FORMAT_VERSION, **to_plain(config)}))
    return folder


def rounded_run(tmp_path: Path, config: LanguageModelConfig, format: str) -> tuple[LanguageModel, Path]:
    """A model, and the run of its rounded weights."""
    model = build_model(config).eval()
    run = as_run(tmp_path / "run", model)
    checkpoint = find_checkpoint(run)
    weights = quantize(checkpoint.tensors("model"), config, format)
    save_quantized(run, tmp_path / format, checkpoint, weights, format)
    return model, tmp_path / format


def file_of(run: Path) -> Path:
    return find_checkpoint(run).path / "model.safetensors"


def by_hand(integers: torch.Tensor, scale: torch.Tensor, width: int) -> torch.Tensor:
    """The weight of stored integers, written from the description of the format."""
    if integers.dtype == torch.int8:
        return integers.double() * scale.double().unsqueeze(-1)
    columns = []
    for column in range(width):
        byte = integers[..., column // 2].int()
        columns.append(((byte // 16 if column % 2 else byte % 16) - 8).double() * scale[..., column // GROUP].double())
    return torch.stack(columns, dim=-1)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_load_gives_the_integers_times_their_scales(name: str, format: str, tmp_path: Path) -> None:
    model, run = rounded_run(tmp_path, CONFIGS[name], format)
    loaded, _ = swamla.load(run)
    assert loaded.quantized == format
    assert loaded.head.weight is loaded.embedding.weight
    with safe_open(file_of(run), framework="pt") as stored:
        names = set(stored.keys())
        for key, weight in loaded.state_dict().items():
            if f"{key}_scale" not in names:
                continue
            expected = by_hand(stored.get_tensor(key), stored.get_tensor(f"{key}_scale"), weight.shape[-1])
            torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=0)
        kept = {key for key in loaded.state_dict() if f"{key}_scale" not in names} - {"head.weight"}
    for key in kept:
        assert torch.equal(loaded.state_dict()[key], model.state_dict()[key]), key
    assert {key for key, p in loaded.named_parameters() if p.ndim < 2} <= kept
    steps = {"int8": 100, "int4": 6}[format]
    for key, parameter in loaded.named_parameters():
        off = (parameter - model.state_dict()[key]).abs().max()
        assert off <= model.state_dict()[key].abs().max() / steps, key


@pytest.mark.parametrize("name", CONFIGS)
def test_matrices_are_rounded_and_vectors_are_not(name: str) -> None:
    config = CONFIGS[name]
    formats = formats_of(config, "int4")
    parameters = dict(config.skeleton().named_parameters(remove_duplicate=False))
    assert set(formats) == {key for key, p in parameters.items() if p.ndim > 1} - config.vectors
    assert not any("router" in key or "conv" in key for key in formats)
    assert {formats[key] for key in ("embedding.weight", "head.weight")} == {"int8"}
    assert all(format == "int4" for key, format in formats.items() if key.startswith("blocks."))
    assert any(key.startswith("blocks.") for key in formats)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_has_the_bytes_that_the_config_foretells(name: str, format: str, tmp_path: Path) -> None:
    _, run = rounded_run(tmp_path, CONFIGS[name], format)
    file = file_of(run)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == 8 + header + quantized_bytes(CONFIGS[name], format)


def test_an_untied_head_is_rounded_by_itself(tmp_path: Path) -> None:
    config = replace(hybrid_config(), tied_head=False)
    model, run = rounded_run(tmp_path, config, "int4")
    loaded, _ = swamla.load(run)
    assert not torch.equal(loaded.head.weight, loaded.embedding.weight)
    assert 0 < (loaded.head.weight - model.head.weight).abs().max() < 0.05
    header = int.from_bytes(file_of(run).read_bytes()[:8], "little")
    assert file_of(run).stat().st_size == 8 + header + quantized_bytes(config, "int4")


def test_decoding_in_int8_gives_the_text_of_the_model_before_it_was_rounded(tmp_path: Path) -> None:
    """Both multiply by the same integers. Only prefill, which is not rounded, and embeddings have other weights."""
    model, run = rounded_run(tmp_path, hybrid_config(), "int8")
    loaded, _ = swamla.load(run)
    expected = Decoder(model, "int8").stepping
    found = Decoder(loaded, "int8").stepping
    pairs = zip(found.modules(), expected.modules(), strict=True)
    rounded = [(a.rounded, b.rounded) for a, b in pairs if getattr(a, "rounded", None) is not None]
    assert len(rounded) > 10
    assert all(torch.equal(a.integers_FD, b.integers_FD) and torch.equal(a.scale_F, b.scale_F) for a, b in rounded)


def test_a_run_of_rounded_weights_is_read_by_what_reads_runs(tmp_path: Path) -> None:
    _, run = rounded_run(tmp_path, hybrid_config(), "int4")
    loaded, _ = swamla.load(run)
    text = Decoder(loaded).generate([[1, 2, 3]], 5, sampling=Sampling(temperature=0))
    assert main(["info", str(run)]) == 0
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert main(["export", str(run), str(tmp_path / "exported"), "--to", "swamla"]) == 0
    convert_checkpoint(run, tmp_path / "whole", weights_only=True)
    whole, _ = swamla.load(tmp_path / "whole")
    assert whole.quantized == ""
    assert Decoder(whole).generate([[1, 2, 3]], 5, sampling=Sampling(temperature=0)) == text
    (tmp_path / "again").mkdir()
    _, again = rounded_run(tmp_path / "again", hybrid_config(), "int4")
    assert file_of(again).read_bytes() == file_of(run).read_bytes()


def test_a_part_of_a_rounded_weight_is_that_part_of_the_whole(tmp_path: Path) -> None:
    _, run = rounded_run(tmp_path, hybrid_config(), "int4")
    reader = ShardReader([file_of(run)])
    name = "blocks.0.mixer.qkvz_proj.weight"
    whole = reader.read(name)
    assert whole.shape == reader.shapes()[name]
    assert torch.equal(reader.read(name, (3, 0), (5, whole.shape[1])), whole[3:8])


def damage(run: Path, change) -> None:
    """Write the file of the weights anew, changed, with a manifest that fits."""
    checkpoint = find_checkpoint(run)
    file = checkpoint.path / "model.safetensors"
    with safe_open(file, framework="pt") as stored:
        tensors, header = {key: stored.get_tensor(key) for key in stored.keys()}, dict(stored.metadata())  # noqa: SIM118
    told = json.loads(header["quantized"])
    change(tensors, told)
    save_file(tensors, file, metadata={"quantized": json.dumps(told)})
    manifest = checkpoint.path / "manifest.json"
    listed = json.loads(manifest.read_text())
    listed["files"]["model.safetensors"] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    manifest.write_text(json.dumps(listed))


NAME = "blocks.0.mixer.qkvz_proj.weight"
CHANGES = {
    "without scales": lambda tensors, told: tensors.pop(f"{NAME}_scale"),
    "without integers": lambda tensors, told: tensors.pop(NAME),
    "of an unknown format": lambda tensors, told: told["weights"][NAME].update(format="int3"),
    "of another shape": lambda tensors, told: told["weights"][NAME].update(shape=[4, 4]),
    "of no shape": lambda tensors, told: told["weights"][NAME].pop("shape"),
    "of another type": lambda tensors, told: tensors.update({NAME: tensors[NAME].float()}),
    "not said to be rounded": lambda tensors, told: told["weights"].pop(NAME),
    "not listed at all": lambda tensors, told: told.update(weights=[1]),
}


@pytest.mark.parametrize("how", CHANGES)
def test_damaged_weights_are_refused_in_one_line(how: str, tmp_path: Path) -> None:
    _, run = rounded_run(tmp_path, hybrid_config(), "int4")
    damage(run, CHANGES[how])
    with pytest.raises(CorruptError) as raised:
        swamla.load(run)
    assert "\n" not in str(raised.value)
    assert "model.safetensors" in str(raised.value) or "step-" in str(raised.value)


def test_a_truncated_file_is_refused_and_a_half_written_folder_is_no_run(tmp_path: Path) -> None:
    _, run = rounded_run(tmp_path, hybrid_config(), "int8")
    file = file_of(run)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptError, match="truncated or overwritten"):
        load_checkpoint(file.parent)
    (run / "config.json").unlink()
    with pytest.raises(UsageError, match="not a run folder"):
        swamla.load(run)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(hybrid_config())
    run = as_run(tmp_path / "run", model)
    checkpoint = find_checkpoint(run)
    weights = quantize(checkpoint.tensors("model"), model.config, "int8")
    monkeypatch.setattr("shutil.copyfile", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_quantized(run, tmp_path / "out", checkpoint, weights, "int8")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model = build_model(hybrid_config())
    weights = model.state_dict()
    weights[NAME][0, 0] = torch.nan
    with pytest.raises(UsageError, match=rf"{NAME} has values that are not finite"):
        quantize(weights, model.config, "int8")
