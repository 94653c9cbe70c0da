"""The ways into a flow: presets, CosyVoice yaml files, checkpoints."""

import copy
import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import fastflow
from fastflow import config
from fastflow.config import build, load, preset, read_yaml

DATA = Path(__file__).parent / "data"
YAMLS = ["cosyvoice.yaml", "cosyvoice2.yaml", "cosyvoice3.yaml"]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def with_line(name: str, old: str, new: str, tmp_path: Path) -> Path:
    """A copy of a yaml file with one piece of text replaced."""
    text = (DATA / name).read_text(encoding="utf-8")
    assert text.count(old) == 1
    return write(tmp_path / name, text.replace(old, new))


def model_dir(tmp_path: Path, name: str, state: dict | None = None) -> tuple[Path, dict]:
    """A model directory with a yaml file and ``flow.pt``, and the weights in it."""
    shutil.copy(DATA / name, tmp_path)
    state = build(read_yaml(DATA / name)).state_dict() if state is None else state
    torch.save(state, tmp_path / "flow.pt")
    return tmp_path, state


def same_state(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ------------------------------------------------------------------------------------------------ presets
def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"name must be one of cosyvoice, cosyvoice2.*tiny3; got 'cosyvoice4'"):
        fastflow.from_preset("cosyvoice4")


def test_a_preset_is_a_copy() -> None:
    changed = preset("tiny")
    changed["decoder"]["cfm_params"]["sigma_min"] = 7
    assert preset("tiny")["decoder"]["cfm_params"]["sigma_min"] == 1e-6


def test_overrides_replace_arguments_of_the_flow() -> None:
    flow = fastflow.from_preset("tiny", input_frame_rate=25, vocab_size=10)
    assert flow.input_frame_rate == 25
    assert flow.input_embedding.num_embeddings == 10


def test_an_argument_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match=r"flow: MaskedDiffWithXvec has no argument 'causal'; it has input_size, "):
        fastflow.from_preset("tiny", causal=True)
    spec = preset("tiny")
    spec["decoder"]["estimator"]["causal"] = True
    with pytest.raises(ValueError, match=r"flow\.decoder\.estimator: ConditionalDecoder has no argument 'causal'"):
        build(spec)


def test_a_value_that_is_refused_is_located() -> None:
    spec = preset("tiny")
    spec["encoder"]["macaron_style"] = True
    with pytest.raises(ValueError, match=r"flow\.encoder \(ConformerEncoder\): macaron_style must be False"):
        build(spec)


@pytest.mark.parametrize("name", ["tiny", "tiny2", "tiny3"])
def test_tiny_presets_learn_one_utterance(name: str) -> None:
    random.seed(0)
    flow = fastflow.from_preset(name)
    assert sum(p.numel() for p in flow.parameters()) < 3e6
    tokens = torch.arange(20)[None]
    frames = 34 if name == "tiny" else 40
    time = torch.arange(frames)[None, :, None] / frames
    batch = {
        "speech_token": tokens,
        "speech_token_len": torch.tensor([20]),
        "speech_feat": torch.sin(6 * time + torch.arange(80) / 20),
        "speech_feat_len": torch.tensor([frames]),
        "embedding": torch.randn(1, 192),
    }
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = flow(batch, "cpu")["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.85 * sum(losses[:5]) / 5


# ------------------------------------------------------------------------------------------------ yaml
@pytest.mark.parametrize("name", YAMLS)
def test_a_published_yaml_is_read_without_cosyvoice(name: str) -> None:
    assert "cosyvoice" not in sys.modules
    spec = read_yaml(DATA / name)
    like = preset(name.removesuffix(".yaml"))

    def keys(part: dict) -> dict:
        return {key: keys(value) if isinstance(value, dict) else type(value) for key, value in part.items()}

    # The presets leave out two arguments that have no effect.
    assert keys({**like, "output_type": "mel", "only_mask_loss": True}) == keys(spec)
    assert isinstance(build(spec), getattr(fastflow, spec["class"]))


def test_references_and_arithmetic_are_resolved() -> None:
    spec = read_yaml(DATA / "cosyvoice2.yaml")
    assert spec["spk_embed_dim"] == 192
    assert spec["encoder"]["static_chunk_size"] == 5
    assert spec["decoder"]["estimator"]["static_chunk_size"] == 10
    assert spec["decoder"]["estimator"]["num_decoding_left_chunks"] == -1


def test_chains_of_references_follow_hyperpyyaml(tmp_path: Path) -> None:
    text = "a: 2\nb: !ref <a> + 1\nsizes:\n  wide: !ref <b> * 10\n" + (DATA / "cosyvoice2.yaml").read_text()
    path = write(tmp_path / "x.yaml", text.replace("chunk_size: 5 # tokens", "chunk_size: !ref <sizes[wide]>"))
    assert read_yaml(path)["decoder"]["estimator"]["static_chunk_size"] == 60


def test_values_are_plain_python() -> None:
    params = read_yaml(DATA / "cosyvoice.yaml")["decoder"]["cfm_params"]
    assert params["sigma_min"] == 1e-6
    assert {type(value) for value in params.values()} == {float, str}


def test_a_tuple_is_read_as_hyperpyyaml_does(tmp_path: Path) -> None:
    path = with_line("cosyvoice.yaml", "channels: [32, 32]", "channels: (32, 32)", tmp_path)
    assert read_yaml(path)["decoder"]["estimator"]["channels"] == (32, 32)


@pytest.mark.parametrize("tag", ["!apply:os.mkdir", "!applyref:os.mkdir"])
def test_nothing_outside_the_flow_section_is_executed(tag: str, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    path = write(tmp_path / "x.yaml", f"trap: {tag} [{trap}]\n" + (DATA / "cosyvoice.yaml").read_text())
    read_yaml(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    "value", ["!apply:os.mkdir [{trap}]", "!applyref:os.mkdir [{trap}]", "!ref <trap>", "!include:{trap}"]
)
def test_nothing_inside_the_flow_section_is_executed(value: str, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    path = with_line("cosyvoice.yaml", "vocab_size: 40", f"vocab_size: {value.format(trap=trap)}", tmp_path)
    write(path, f"trap: !applyref:os.mkdir [{trap}]\n" + path.read_text())
    with pytest.raises(ValueError, match=r"the tag !(apply|applyref|include):.* is not allowed"):
        read_yaml(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("value", "tag"),
    [
        ("!new:torch.nn.Linear\n        in_features: 3", "!new:torch.nn.Linear"),
        ("!new:cosyvoice.transformer.encoder.TransformerEncoder\n        input_size: 3", "TransformerEncoder"),
        ("!name:os.getcwd", "!name:os.getcwd"),
        ("!module:os", "!module:os"),
    ],
)
def test_other_tags_in_the_flow_section_are_refused(value: str, tag: str, tmp_path: Path) -> None:
    path = with_line("cosyvoice.yaml", "vocab_size: 40", f"vocab_size: {value}", tmp_path)
    with pytest.raises(ValueError, match=rf"flow\.vocab_size: the tag \S*{re.escape(tag)} is not allowed"):
        read_yaml(path)


def test_a_yaml_without_a_flow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have a section 'flow:'; it has llm, hift"):
        read_yaml(write(tmp_path / "a.yaml", "llm: 1\nhift: 2\n"))
    with pytest.raises(ValueError, match=r"'flow:' must be !new:cosyvoice\.flow\.flow\.<MaskedDiffWithXvec"):
        read_yaml(write(tmp_path / "b.yaml", "flow: !new:fastflow.DiT\n  dim: 64\n"))
    with pytest.raises(ValueError, match="is not a yaml file"):
        read_yaml(write(tmp_path / "c.yaml", "flow: [1, 2\n"))


def test_without_hyperpyyaml_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hyperpyyaml", None)
    with pytest.raises(ImportError, match=r"pip install fastflow\[yaml\]"):
        read_yaml(DATA / "cosyvoice.yaml")


@pytest.mark.parametrize("name", YAMLS)
def test_a_training_script_may_swap_the_prefix_in_its_yaml(name: str) -> None:
    """What CosyVoice's own trainer does: hyperpyyaml instantiates the section, DictConfig included."""
    from hyperpyyaml import load_hyperpyyaml

    text = (DATA / name).read_text()
    text = re.sub(r"!new:cosyvoice\.[\w.]+\.(\w+)", r"!new:fastflow.\1", text)
    overrides = {"llm": None, "hift": None, **({"mel_spec_transform1": None} if "2" in name else {})}
    flow = load_hyperpyyaml(text, overrides=overrides)["flow"]
    assert isinstance(flow, getattr(fastflow, read_yaml(DATA / name)["class"]))
    flow.load_state_dict(build(read_yaml(DATA / name)).state_dict())
    assert flow.decoder.sigma_min == 1e-6


# ------------------------------------------------------------------------------------------------ load
@pytest.mark.parametrize("name", YAMLS)
def test_a_model_directory_gives_its_weights_in_eval_mode(name: str, tmp_path: Path) -> None:
    directory, state = model_dir(tmp_path, name)
    flow = fastflow.load(directory)
    assert same_state(flow.state_dict(), state)
    assert not any(module.training for module in flow.modules())
    assert {(p.dtype, p.device.type, p.requires_grad) for p in flow.parameters()} == {(torch.float32, "cpu", True)}


def test_loading_draws_nothing_and_leaves_no_parameter_unset(tmp_path: Path) -> None:
    directory, state = model_dir(tmp_path, "cosyvoice2.yaml")
    before = torch.get_rng_state()
    flow = load(directory)
    assert torch.equal(before, torch.get_rng_state())
    fresh = build(read_yaml(directory / "cosyvoice2.yaml"))
    fresh.load_state_dict(state)
    assert torch.equal(flow.decoder.rand_noise, fresh.decoder.rand_noise)


def test_the_first_yaml_counts_as_in_cosyvoice(tmp_path: Path) -> None:
    directory, _ = model_dir(tmp_path, "cosyvoice2.yaml")
    shutil.copy(DATA / "cosyvoice3.yaml", directory)
    assert isinstance(load(directory), fastflow.CausalMaskedDiffWithXvec)


def test_a_yaml_takes_the_checkpoint_beside_it_or_none(tmp_path: Path) -> None:
    directory, state = model_dir(tmp_path, "cosyvoice.yaml")
    assert same_state(load(directory / "cosyvoice.yaml").state_dict(), state)
    os.remove(directory / "flow.pt")
    flow = load(str(directory / "cosyvoice.yaml"))
    assert not flow.training
    assert not same_state(flow.state_dict(), state)
    assert all(p.isfinite().all() for p in flow.parameters())


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds none of cosyvoice\.yaml, cosyvoice2\.yaml, cosyvoice3\.yaml"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model_dir_or_yaml must be .*nothing\.yaml does not exist"):
        load(tmp_path / "nothing.yaml")
    shutil.copy(DATA / "cosyvoice.yaml", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"flow\.pt does not exist"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"epoch_1\.pt does not exist"):
        load(tmp_path, tmp_path / "epoch_1.pt")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_training_checkpoint_loads(prefix: str, tmp_path: Path) -> None:
    state = build(read_yaml(DATA / "cosyvoice3.yaml")).state_dict()
    saved = {prefix + key: value for key, value in state.items()} | {"epoch": 3, "step": 1200}
    torch.save(saved, tmp_path / "epoch_3_whole.pt")
    assert same_state(load(DATA / "cosyvoice3.yaml", tmp_path / "epoch_3_whole.pt").state_dict(), state)


def test_safetensors_load(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = build(read_yaml(DATA / "cosyvoice.yaml")).state_dict()
    save_file(state, tmp_path / "flow.safetensors")
    assert same_state(load(DATA / "cosyvoice.yaml", tmp_path / "flow.safetensors").state_dict(), state)


def test_half_precision_weights_arrive_in_float32(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in build(read_yaml(DATA / "cosyvoice.yaml")).state_dict().items()}
    directory, _ = model_dir(tmp_path, "cosyvoice.yaml", state)
    flow = load(directory)
    assert same_state(flow.state_dict(), {key: value.float() for key, value in state.items()})


def test_a_wrong_checkpoint_names_its_keys(tmp_path: Path) -> None:
    state = build(read_yaml(DATA / "cosyvoice.yaml")).state_dict()
    del state["encoder_proj.bias"]
    state["encoder.extra"] = torch.zeros(1)
    state["input_embedding.weight"] = torch.zeros(50, 32)
    directory, _ = model_dir(tmp_path, "cosyvoice.yaml", state)
    with pytest.raises(ValueError, match=r"flow\.pt does not fit MaskedDiffWithXvec") as error:
        load(directory)
    message = str(error.value)
    assert "1 missing: encoder_proj.bias\n" in message
    assert "1 unexpected: encoder.extra\n" in message
    assert "1 misshapen: input_embedding.weight (given (50, 32), expected (40, 32))" in message
    assert "look like" not in message


def test_long_lists_of_keys_are_cut(tmp_path: Path) -> None:
    directory, _ = model_dir(tmp_path, "cosyvoice.yaml", {"llm.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"\d\d missing: \S+, \S+, \S+, \.\.\.\n  1 unexpected: llm\.weight"):
        load(directory)


@pytest.mark.parametrize("given", [1, 2, 3])
@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_the_version_of_a_wrong_checkpoint_is_named(given: int, wanted: int, tmp_path: Path) -> None:
    if given == wanted:
        return
    torch.save(build(read_yaml(DATA / YAMLS[given - 1])).state_dict(), tmp_path / "flow.pt")
    with pytest.raises(ValueError, match=rf"its keys look like those of \w+ \(CosyVoice {given}\)") as error:
        load(DATA / YAMLS[wanted - 1], tmp_path / "flow.pt")
    assert f"(CosyVoice {wanted})" not in str(error.value)


class Arbitrary:
    """A class of the pickling program, which no checkpoint may bring along."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": Arbitrary()}, "must hold a state dict and nothing else"),
        ([torch.zeros(1)], "must hold a state dict; it holds list"),
        ({"a": "text"}, "must hold tensors by name; 'a' is str"),
    ],
)
def test_a_checkpoint_holds_tensors_only(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "flow.pt")
    with pytest.raises(ValueError, match=message):
        load(DATA / "cosyvoice.yaml", tmp_path / "flow.pt")


@pytest.mark.parametrize("name", ["flow.pt", "flow.safetensors"])
def test_a_file_that_is_no_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, "version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"checkpoint: .* must hold a state dict and nothing else"):
        load(DATA / "cosyvoice.yaml", tmp_path / name)


def test_a_spec_round_trips_through_json() -> None:
    import json

    for name in config.PRESETS:
        assert json.loads(json.dumps(preset(name))) == preset(name)
    assert copy.deepcopy(preset("tiny")) == preset("tiny")
