"""``fastflow report`` states the true costs: parameters, FLOPs and saved bytes, and what shrinking would save."""

import argparse
import json
import random

import pytest
import torch
from torch._subclasses.fake_tensor import is_fake

from fastflow import config, report, use_backend
from fastflow.recompute import MODES
from fastflow.testing.counters import Counts, SavedTensors
from fastflow.unet import TransformerBlock

# The table of the flow specification, and the sizes of CosyVoice's former from-scratch recipe.
PARAMETERS = {
    "cosyvoice": {
        "input_embedding": 2_097_152,
        "spk_embed_affine_layer": 15_440,
        "encoder": 20_758_016,
        "encoder_proj": 41_040,
        "length_regulator": 84_240,
        "decoder.estimator": 81_878_864,
        "encoder.embed": 263_680,
        "encoder.encoders": 20_493_312,
        "encoder.after_norm": 1_024,
        "decoder.estimator.time_mlp": 1_378_304,
        "decoder.estimator.down_blocks": 10_314_240,
        "decoder.estimator.mid_blocks": 59_129_856,
        "decoder.estimator.up_blocks": 10_838_528,
        "decoder.estimator.final_block": 197_376,
        "decoder.estimator.final_proj": 20_560,
        "total": 104_874_752,
    },
    "cosyvoice2": {
        "input_embedding": 3_359_232,
        "spk_embed_affine_layer": 15_440,
        "encoder": 37_831_168,
        "encoder_proj": 41_040,
        "decoder.estimator": 71_302_480,
        "encoder.pre_lookahead_layer": 1_836_032,
        "encoder.up_layer": 1_311_232,
        "encoder.up_embed": 263_680,
        "encoder.up_encoders": 13_662_208,
        "decoder.estimator.down_blocks": 5_189_888,
        "decoder.estimator.mid_blocks": 59_129_856,
        "decoder.estimator.up_blocks": 5_386_496,
        "total": 112_549_360,
    },
    "cosyvoice3": {
        "input_embedding": 524_880,
        "spk_embed_affine_layer": 15_440,
        "pre_lookahead_layer": 574_544,
        "decoder.estimator": 331_142_224,
        "decoder.estimator.time_embed": 1_312_768,
        "decoder.estimator.input_embed": 4_393_984,
        "decoder.estimator.transformer_blocks": 323_254_272,
        "decoder.estimator.norm_out": 2_099_200,
        "decoder.estimator.proj_out": 82_000,
        "total": 332_257_088,
    },
}
FRAMES, ROWS = 200, 2
# Upstream's own bytes for backward of this batch in float32, measured on its code.
UPSTREAM_SAVED_MIB = {"cosyvoice": 452, "cosyvoice2": 804, "cosyvoice3": 680}
# The same of 8 x 1000 frames: eight times what benchmarks/run.py counts in train-1x1000.
UPSTREAM_SAVED_OF_LONG_ROWS_MIB = {"cosyvoice": 14_531, "cosyvoice2": 30_257, "cosyvoice3": 14_194}


@pytest.fixture(scope="module")
def published() -> dict[str, report.Report]:
    with use_backend("reference"):
        return {name: report.report(config.preset(name), name, FRAMES, ROWS) for name in PARAMETERS}


def sums(result: report.Report, name: str, field: str) -> int:
    """A field of all parts that belong to the module ``name``."""
    if name == "total":
        return getattr(result.total, field)
    return sum(getattr(part, field) for part in result.parts if (part.name + ".").startswith(name + "."))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_equal_the_specification(published, name):
    assert {part: sums(published[name], part, "parameters") for part in PARAMETERS[name]} == PARAMETERS[name]


def test_the_from_scratch_recipe_has_its_known_size():
    result = report.report(config.preset("cosyvoice-fromscratch"), "cosyvoice-fromscratch", 50, 1)
    assert result.total.parameters == 71_769_344


@pytest.mark.parametrize(("name", "linear", "attention"), [("cosyvoice2", 132e6, 115e3), ("cosyvoice3", 378e6, 90e3)])
def test_flops_of_the_estimator_match_the_analytic_figures(published, name, linear, attention):
    per_frame_and_row = sums(published[name], "decoder.estimator", "flops_per_step") / FRAMES / 2
    assert per_frame_and_row == pytest.approx(linear + attention * FRAMES, rel=0.03)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parts_add_up_to_the_total(published, name):
    result = published[name]
    for field in ("parameters", "flops_per_step", "flops_per_utterance", "saved_bytes"):
        parts = sum(getattr(part, field) for part in result.parts)
        assert parts == pytest.approx(getattr(result.total, field), abs=len(result.parts) * result.solver_steps)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_reference_saves_no_more_than_upstream(published, name):
    assert published[name].total.saved_bytes / 2**20 < UPSTREAM_SAVED_MIB[name]


@pytest.mark.parametrize("name", ["tiny", "tiny3"])
def test_saved_bytes_equal_those_of_a_real_training_step(name):
    flow = config.build(config.preset(name))
    batch = report._training_batch(flow, 2, 60)
    random.seed(0)
    with SavedTensors(flow.parameters()) as saved:
        flow(batch, "cpu")
    assert report.report(config.preset(name), name, 60, 2).total.saved_bytes == saved.bytes


@pytest.mark.parametrize("name", ["tiny", "tiny3"])
def test_saved_bytes_of_every_mode_equal_those_of_a_real_training_step(name):
    flow = config.build(config.preset(name))
    batch, kept = report._training_batch(flow, 2, 60), {}
    for mode in MODES:
        flow.recompute = mode
        random.seed(0)
        with SavedTensors(flow.parameters()) as saved:
            flow(batch, "cpu")
        kept[mode] = saved.bytes
    memory = report.report(config.preset(name), name, 60, 2).memory
    assert {part.mode: part.saved_bytes for part in memory} == kept


@pytest.mark.parametrize("name", UPSTREAM_SAVED_OF_LONG_ROWS_MIB)
def test_long_rows_keep_a_quarter_of_upstreams_and_a_fifteenth_in_block_mode(name):
    modes = report.report(config.preset(name), name, frames=1000, batch=8).memory
    kept = {mode.mode: mode.saved_bytes / 2**20 for mode in modes}
    assert kept["auto"] <= UPSTREAM_SAVED_OF_LONG_ROWS_MIB[name] / 4
    assert kept["block"] <= UPSTREAM_SAVED_OF_LONG_ROWS_MIB[name] / 15


def test_attention_of_a_unet_block_beside_upstreams():
    """Of 8 x 1000 frames: q, k, v, output, softmax sums, and upstream's mask as a float for each of 8 heads."""
    frame = 4 * 512 + 8
    assert report._upstream_attention_bytes(TransformerBlock(256, 8, 64, 0.0).attn1, 8, 1000) == 4 * 8000 * (
        frame + 8000
    )
    result = report.report(config.preset("tiny"), "tiny", 60, 2)
    width, x, heads, norm = 4 * 32, 64, 4, 2
    everything = x + norm + 4 * width + heads
    floats = {"auto": everything, "none": everything, "selective": x + width + heads, "block": x}
    if result.backend != "reference":
        kept = {mode.mode: mode.attention_bytes for mode in result.memory}
        assert kept == {mode: 4 * 2 * 60 * n for mode, n in floats.items()}
    assert result.upstream_attention_bytes == 4 * 2 * 60 * (4 * width + heads + heads * 60)


def test_a_dit_has_no_figure_of_a_unet_block():
    result = report.report(config.preset("tiny3"), "tiny3", 40, 1)
    assert result.upstream_attention_bytes is None
    assert all(mode.attention_bytes is None for mode in result.memory)


def test_the_largest_batch_fits_and_one_row_more_does_not():
    memory = 300 * 2**20
    result = report.report(config.preset("tiny"), "tiny", 60, 2, memory)
    state = 16 * result.total.parameters
    for mode in result.memory:
        row = mode.peak_bytes / result.batch
        assert state + mode.largest_batch * row <= 0.9 * memory < state + (mode.largest_batch + 1) * row
    auto, none, selective, block = (mode.largest_batch for mode in result.memory)
    assert 0 < auto == none < selective < block, "as this batch is small"


def test_a_memory_too_small_for_the_parameters_fits_no_row():
    result = report.report(config.preset("tiny"), "tiny", 60, 2, memory=2**20)
    assert [mode.largest_batch for mode in result.memory] == [0] * len(MODES)


@pytest.mark.parametrize(("text", "size"), [("80GB", 80 * 10**9), ("79.5 GiB", 85362475008), ("512mib", 2**29)])
def test_memory_has_a_unit(text, size):
    assert report.parse_memory(text) == size


@pytest.mark.parametrize("text", ["80", "-1GB", "0GB", "many GB", "80 bananas"])
def test_memory_that_is_none_is_named(text):
    with pytest.raises(ValueError, match="memory must be a number and one of MB, GB"):
        report.parse_memory(text)


def test_flops_equal_those_of_a_real_utterance():
    """The utterance of the report has ``frames`` frames, prompt included."""
    tokens, embedding = torch.zeros(1, 30, dtype=torch.int32), torch.zeros(1, 192)
    prompt = {"prompt_token": tokens, "prompt_token_len": torch.tensor([30])}
    target = {"token": tokens, "token_len": torch.tensor([30]), "embedding": embedding}
    for name, prompt_frames, rest in (
        ("tiny", 52, {"flow_cache": torch.zeros(1, 80, 0, 2)}),
        ("tiny3", 60, {"streaming": False, "finalize": True}),
    ):
        flow = config.build(config.preset(name)).eval()
        feat = {"prompt_feat": torch.zeros(1, prompt_frames, 80), "prompt_feat_len": torch.tensor([prompt_frames])}
        with Counts() as counts:
            mel, _ = flow.inference(**target, **prompt, **feat, **rest)
        result = report.report(config.preset(name), name, prompt_frames + mel.shape[2], 1)
        assert result.total.flops_per_utterance == counts.flops.total()


@pytest.mark.parametrize("kernel_backend", ["cpu"], indirect=True)
def test_flops_do_not_depend_on_the_backend(kernel_backend):
    with use_backend("reference"):
        plain = report.report(config.preset("tiny"), "tiny", 60, 1)
    with use_backend(kernel_backend):
        fused = report.report(config.preset("tiny"), "tiny", 60, 1)
    assert fused.backend == kernel_backend
    assert [p.flops_per_utterance for p in fused.parts] == [p.flops_per_utterance for p in plain.parts]


@pytest.mark.parametrize(
    ("name", "option", "path", "after"),
    [
        ("tiny", "encoder.num_blocks", ("encoder", "num_blocks"), 1),
        ("tiny", "decoder.estimator.num_mid_blocks", ("decoder", "estimator", "num_mid_blocks"), 1),
        ("tiny3", "decoder.estimator.depth", ("decoder", "estimator", "depth"), 2),
    ],
)
def test_a_change_saves_what_building_the_smaller_flow_saves(name, option, path, after):
    before = report.report(config.preset(name), name, 60, 2)
    change = next(change for change in before.what_if if change.option == option)
    spec = node = config.preset(name)
    for key in path[:-1]:
        node = node[key]
    assert (change.before, change.after) == (node[path[-1]], after)
    node[path[-1]] = after
    smaller = report.report(spec, name, 60, 2)
    assert change.saving.parameters == before.total.parameters - smaller.total.parameters
    assert change.saving.flops_per_step == before.total.flops_per_step - smaller.total.flops_per_step
    assert change.saving.flops_per_utterance == pytest.approx(
        before.total.flops_per_utterance - smaller.total.flops_per_utterance, abs=10
    )
    saved = before.total.saved_bytes - smaller.total.saved_bytes
    assert change.saving.saved_bytes == pytest.approx(saved, rel=0.05)


def test_the_changes_of_the_published_flow_answer_what_to_shrink(published):
    savings = {change.saving.name: change.saving for change in published["cosyvoice"].what_if}
    assert list(savings) == [
        "encoder.num_blocks 6 -> 3",
        "decoder.estimator.num_mid_blocks 12 -> 8",
        "decoder.estimator.n_blocks 4 -> 2",
    ]
    assert savings["decoder.estimator.num_mid_blocks 12 -> 8"].parameters == 81_878_864 - 62_168_912
    assert savings["encoder.num_blocks 6 -> 3"].parameters == 20_493_312 // 2
    assert savings["encoder.num_blocks 6 -> 3"].flops_per_step == 0


def test_no_weight_is_allocated_and_no_generator_is_touched():
    python, torch_state = random.getstate(), torch.get_rng_state()
    flow, _, _ = report._measure(config.preset("tiny"), 1, 20)
    assert all(is_fake(parameter) for parameter in flow.parameters())
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), torch_state)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return report.run(parser.parse_args(arguments))


def test_json_holds_the_parts_and_the_changes(capsys):
    assert run("tiny", "--frames", "40", "--batch", "2", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["flow"] == "tiny"
    assert (printed["kind"], printed["frames"], printed["batch"]) == ("MaskedDiffWithXvec", 40, 2)
    assert printed["total"]["parameters"] == sum(part["parameters"] for part in printed["parts"])
    assert {change["option"] for change in printed["what_if"]} >= {"encoder.num_blocks"}


def test_the_table_names_every_part_and_its_parameters(capsys, monkeypatch):
    """In a narrow terminal as well."""
    monkeypatch.setenv("COLUMNS", "80")
    assert run("tiny3", "--frames", "40", "--batch", "1") == 0
    printed = capsys.readouterr().out
    for part in report.report(config.preset("tiny3"), "tiny3", 40, 1).parts:
        assert part.name.replace("decoder.", "") in printed
        assert f"{part.parameters:,}" in printed
    assert "What shrinking would save" in printed


def test_the_table_of_the_memory_modes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("tiny", "--frames", "40", "--batch", "1", "--memory", "1GB") == 0
    printed = capsys.readouterr().out
    modes = report.report(config.preset("tiny"), "tiny", 40, 1, 10**9).memory
    for mode in modes:
        line = next(line for line in printed.splitlines() if mode.mode in line.split())
        assert f"{mode.saved_bytes / 2**20:,.1f}" in line
        assert f"{mode.largest_batch:,}" in line


def test_a_yaml_file_is_reported_as_its_preset_would_be(tmp_path, capsys):
    pytest.importorskip("hyperpyyaml", reason="not run: reading yaml needs hyperpyyaml")

    def text(node: object) -> str:
        if not isinstance(node, dict):
            return json.dumps(node)
        entries = ", ".join(f"{json.dumps(key)}: {text(value)}" for key, value in node.items() if key != "class")
        return (f"!new:fastflow.{node['class']} " if "class" in node else "") + "{" + entries + "}"

    path = tmp_path / "mine.yaml"
    path.write_text("flow: " + text(config.preset("tiny3")) + "\n")
    assert run(str(path), "--frames", "40", "--json") == 0
    from_yaml = json.loads(capsys.readouterr().out)
    assert run("tiny3", "--frames", "40", "--json") == 0
    assert from_yaml | {"flow": "tiny3"} == json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such-flow",), "cosyvoice2"),
        (("tiny", "--frames", "0"), "frames must be >= 1, got 0"),
        (("tiny", "--memory", "80"), "memory must be a number and one of"),
        (("tiny", "--batch", "-1"), "batch must be >= 1, got -1"),
        (("tiny2", "--frames", "41"), "frames must be a multiple of 2 for this flow, got 41"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(*arguments)
