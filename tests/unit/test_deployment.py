"""Deployment files, overrides, and what is said when they are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from truedag.launch.deployment import Deployment
from truedag.launch.deployment_file import load_deployment, shipped_deployments
from truedag.launch.errors import DeploymentError
from truedag.launch.workload import InferWorkload
from truedag.parallel.strategy import Strategy

DEMO = "moe-10b-tp2-ep2-pp2-cpu"


def load(*overrides: str, deployment: str | Path = DEMO) -> Deployment:
    return load_deployment(str(deployment), overrides)[1]


def message(*overrides: str, deployment: str | Path = DEMO) -> str:
    with pytest.raises(DeploymentError) as caught:
        load(*overrides, deployment=deployment)
    return str(caught.value)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("words " * 50)
    path = tmp_path / "small.yaml"
    values = {
        "name": "small",
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2},
        "strategy": {"tp": 1, "pp": 2},
        "workload": {"text": "text.txt", "global_batch_size": 4, "sequence_length": 16},
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", shipped_deployments())
def test_what_ships_is_valid_and_named_like_its_file(name: str) -> None:
    path, deployment = load_deployment(name, [])
    assert deployment.name == name == path.stem
    assert deployment.description


def test_the_demo_is_the_second_row_of_the_deployments_at_its_real_width() -> None:
    demo = load()
    assert (demo.model.num_layers, demo.model.num_experts, demo.model.hidden_size) == (16, 16, 512)
    assert (demo.model.num_attention_heads, demo.model.kv_channels, demo.model.expert_hidden_size) == (16, 32, 1024)
    assert demo.strategy == Strategy(tp=2, pp=2, dp=2, ep=2, etp=1)
    assert demo.world_size == 8
    assert demo.workload.num_microbatches(demo.strategy.dp) >= 4
    assert 0 < demo.trace.step < demo.workload.steps


FIVE = {
    "moe-30b-ep64-tp8-pp2-dp2": 2048,
    "moe-10b-tp2-ep2-pp2": 4,
    "llama3-70b-tp2-pp4": 8,
    "moe-30b-ep64-tp2-pp8": 1024,
    "moe-30b-ep8-tp4-pp2-dp4": 256,
}


@pytest.mark.parametrize(("name", "num_ranks"), FIVE.items())
def test_the_five_deployments_ship_at_full_size_and_small(name: str, num_ranks: int) -> None:
    full, small = load(deployment=name), load(deployment=f"{name}-cpu")
    assert (full.world_size, full.backend.name, full.backend.device) == (num_ranks, "nccl", "cuda")
    assert (small.backend.name, small.backend.device) == ("gloo", "cpu")
    assert small.world_size <= 16
    assert small.model.num_layers == full.model.num_layers
    assert small.model.num_experts == full.model.num_experts
    assert (small.model.attention, small.model.experts) == (full.model.attention, full.model.experts)
    for axis in ("tp", "pp", "ep"):
        assert (getattr(small.strategy, axis) > 1) == (getattr(full.strategy, axis) > 1)


def test_the_second_of_the_five_runs_on_eight_ranks_too() -> None:
    orthogonal = load("strategy=EP2-TP2-PP2", deployment="moe-10b-tp2-ep2-pp2")
    assert (orthogonal.world_size, orthogonal.strategy.etp, orthogonal.strategy.dp) == (8, 2, 2)


def test_experts_and_layers_of_the_five_are_where_they_were_declared() -> None:
    second, fourth = load(deployment="moe-10b-tp2-ep2-pp2"), load(deployment="moe-30b-ep64-tp2-pp8")
    assert second.strategy.ranks_of_expert(16, 16, layer=0, expert=7) == [0]
    assert second.strategy.ranks_of_expert(16, 16, layer=15, expert=7) == [2]
    assert second.strategy.ranks_of_expert(16, 16, layer=15, expert=8) == [3]
    assert fourth.strategy.ranks_of_expert(16, 64, layer=5, expert=63) == [2 * 128 + 126, 2 * 128 + 127]


def test_a_workload_is_training_or_inference_and_says_its_own_keys(small: Path) -> None:
    assert load(deployment=small).workload.kind == "train"
    values = yaml.safe_load(small.read_text())
    values["workload"] = {"kind": "infer", "text": "text.txt", "prompt_lengths": [4, 6], "decode_steps": 3}
    small.write_text(yaml.safe_dump(values))
    infer = load(deployment=small)
    assert isinstance(infer.workload, InferWorkload)
    assert (infer.workload.lengths, infer.workload.decode_steps) == ((4, 6), 3)
    assert Deployment.model_validate_json(infer.model_dump_json()) == infer
    said = message("workload.learning_rate=1", deployment=small)
    assert "unknown key workload.learning_rate; valid in workload of kind infer: num_prompts" in said
    assert "need 5000 positions" in message("workload.decode_steps=4994", deployment=small)


def test_a_model_is_read_from_a_hugging_face_configuration_and_changed_by_other_keys(small: Path) -> None:
    config = {
        "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (small.parent / "config.json").write_text(json.dumps(config))
    values = yaml.safe_load(small.read_text())
    values["model"] = {"huggingface": "config.json", "attention": "unfused", "num_layers": 2}
    small.write_text(yaml.safe_dump(values))
    model = load("model.dtype=float32", deployment=small).model
    assert (model.num_layers, model.kv_heads, model.dense_hidden_size, model.attention) == (2, 2, 96, "unfused")
    assert (model.tied_embeddings, model.vocab_size, model.dtype) == (True, 300, "float32")
    (small.parent / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert "hidden_act='relu'" in message(deployment=small)


def test_a_file_of_ones_own_is_read_and_its_text_found_beside_it(small: Path) -> None:
    deployment = load(deployment=small)
    assert deployment.workload.text == small.parent / "text.txt"
    assert deployment.world_size == 2


def test_an_override_replaces_a_value_and_keeps_the_others() -> None:
    assert load("trace.recorder=off", "workload.distributed_optimizer=true").trace.recorder == "off"
    demo = load("model.num_layers=4", "trace.recorder=python", "backend.threads=2", "model.norm_epsilon=1e-6")
    assert demo.model.num_layers == 4
    assert demo.model.num_experts == 16
    assert demo.trace.recorder == "python"
    assert demo.backend.threads == 2
    assert demo.model.norm_epsilon == 1e-6


def test_an_overridden_text_is_looked_for_where_the_command_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.txt").write_text("my own words " * 20)
    monkeypatch.chdir(tmp_path)
    assert load("workload.text=mine.txt").workload.text == tmp_path / "mine.txt"


@pytest.mark.parametrize(
    ("notation", "expected"),
    [
        ("TP2-PP2-DP2-EP2-ETP1", Strategy(tp=2, pp=2, dp=2, ep=2, etp=1)),
        ("EP2-TP2-PP2-DP1", Strategy(tp=2, pp=2, dp=2, ep=2, etp=2, notation="orthogonal")),
        ("{tp: 2, dp: 2, ep: 2}", Strategy(tp=2, dp=2, ep=2)),
    ],
)
def test_a_strategy_is_a_notation_or_sizes(notation: str, expected: Strategy) -> None:
    assert load(f"strategy={notation}").strategy == expected


def test_a_deployment_survives_the_run_record() -> None:
    demo = load()
    assert Deployment.model_validate_json(demo.model_dump_json()) == demo


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.num_layer=4"], "unknown key model.num_layer (did you mean num_layers"),
        (["modle.num_layers=4"], "unknown key modle (did you mean model?)"),
        (["strategy={tp: 2}", "strategy.ppp=2"], "unknown key strategy.ppp (did you mean pp"),
        (["model.num_layers=sixteen"], "model.num_layers='sixteen': input should be a valid integer"),
        (["model.activation=tanh"], "model.activation='tanh': input should be 'gelu' or 'swiglu'"),
        (["model.num_layers=true"], "model.num_layers=True: must be a finite number"),
        (["workload.learning_rate=.inf"], "workload.learning_rate=inf: must be a finite number"),
        (["backend.collective_timeout_s=1e18"], "should be less than or equal to 10000000"),
        (["strategy=5"], "strategy=5: must hold keys, of tp, cp, pp, vpp, dp, ep, etp"),
        (["backend=gloo"], "backend='gloo': must hold keys, of name, device, threads"),
        (["strategy=TP100000000000-EP3-ETP7"], "the most is 1048576"),
        (["model.experts=grouped", "model.expert_hidden_size=10"], "needs rows of whole 16 bytes"),
        (["model.num_layers=0"], "num_layers must be at least 1"),
        (["ranks=6"], "needs 8 ranks, there are 6"),
        (["strategy=TP2-PP3-DP2-EP2-ETP1"], "num_layers=16 is no multiple of PP3"),
        (["strategy=TP2-PP2-DP2-EP3-ETP1"], "do not divide the 4 ranks of a stage"),
        (["strategy=TP2-QQ2"], "'QQ2' is not an axis"),
        (["strategy.tp=4"], "strategy is 'TP2-PP2-DP2-EP2-ETP1'"),
        (["trace.step=2"], "the run has steps 0 to 1"),
        (["workload.kind=serve"], "workload.kind='serve': must be one of train, infer"),
        (["workload.decode_steps=4"], "valid in workload of kind train: global_batch_size,"),
        (["model.hugging_face=here"], "unknown key model.hugging_face (did you mean huggingface?)"),
        (["model.huggingface=here"], "cannot be read as a Hugging Face configuration"),
        (["weights=here"], "there is neither model.safetensors nor model.safetensors.index.json"),
        (["workload.tokenizer=here.json"], "here.json: there is no such tokenizer file"),
        (["backend.device=cpu", "backend.name=nccl"], "name=nccl needs device=cuda"),
        (["workload.text=nowhere.txt"], "nowhere.txt: the tokens cannot be read"),
        (["model.num_layers"], "is not of the form key.path=value"),
        (["=4"], "is not of the form key.path=value"),
        (["model.num_layers=["], "the value is no YAML"),
        (["name=../elsewhere"], "name='../elsewhere'"),
    ],
)
def test_a_wrong_override_is_named_with_the_key(overrides: list[str], expected: str, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    said = message(*overrides)
    assert expected in said
    assert repr(overrides[-1]) in said


def test_a_text_shorter_than_a_sequence_is_refused(small: Path) -> None:
    (small.parent / "text.txt").write_text("sixteen letters.")
    assert "has 16 bytes; sequence_length=16 needs 17" in message(deployment=small)


def test_what_is_wrong_in_the_file_names_the_file(small: Path) -> None:
    small.write_text(small.read_text().replace("num_layers: 2", "num_layers: 2\n  colour: red"))
    assert message(deployment=small).startswith(f"{small}: unknown key model.colour")


def test_a_key_that_stands_twice_is_refused_with_its_line(small: Path) -> None:
    small.write_text(small.read_text() + "\nname: other\n")
    assert "the key name stands twice, again in line" in message(deployment=small)


def test_a_missing_key_is_named(small: Path) -> None:
    small.write_text(small.read_text().replace("num_layers: 2", ""))
    assert f"{small}: model.num_layers is missing" in message(deployment=small)


def test_several_faults_come_in_one_message() -> None:
    said = message("model.num_layer=4", "backend.threads=many")
    assert said.startswith("2 things are wrong:")
    assert "model.num_layer" in said
    assert "backend.threads" in said


def test_an_unknown_deployment_names_the_nearest_and_all_that_ship() -> None:
    said = message(deployment="moe-10b-tp2-ep2-cpu")
    assert f"did you mean {DEMO} or" in said
    assert "unknown deployment" in said


@pytest.mark.parametrize(("content", "expected"), [("- a\n- b\n", "no mapping"), ("a: [", "is no YAML")])
def test_a_file_that_is_no_deployment_is_refused(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    assert expected in message(deployment=path)


def test_a_path_without_a_file_is_refused() -> None:
    assert "there is no deployment file nowhere.yaml" in message(deployment="nowhere.yaml")


SECTIONS = ["", "model.", "strategy.", "workload.", "backend.", "trace."]


@given(section=st.sampled_from(SECTIONS), key=st.from_regex(r"[a-z][a-z_]{0,12}", fullmatch=True))
def test_a_key_that_no_section_has_is_always_named(section: str, key: str) -> None:
    unknown = f"{section}{key}_x"
    said = message("strategy={tp: 2, pp: 2, dp: 2, ep: 2}", f"{unknown}=1")
    assert re.search(rf"unknown key {re.escape(unknown)}\b", said)


def test_the_readmes_deployment_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "Mixtral-8x7B").mkdir()
    (tmp_path / "book.txt").write_text("All of it is here. " * 500)
    config = {
        "model_type": "mixtral", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "Mixtral-8x7B" / "config.json").write_text(json.dumps(config))
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    assert "Mixtral-8x7B: there is neither model.safetensors" in message(deployment=path)
    deployment = load("weights=null", deployment=path)
    assert deployment.world_size == 8
    assert (deployment.model.num_experts, deployment.model.dtype, deployment.backend.device) == (8, "bfloat16", "cuda")
