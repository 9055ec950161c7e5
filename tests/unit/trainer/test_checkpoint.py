"""Checkpoints across layouts. The reference is one plain process that never saves; see ranks/checkpoint.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from trainer.checkpoints import manifest

NODE = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
DDP, FSDP = "replicate", "shard"


@pytest.fixture
def run(ranks, tmp_path):
    """`run(layout, *actions, type=…, env=…, code=0)`: → the text of rank 0; dumps go to tmp_path."""

    def start(layout, *actions, code=0, env=(), spec=None, **config):
        world = 1
        for size in layout.values():
            world *= size
        given = {
            "layout": layout,
            "root": str(tmp_path / "checkpoints"),
            "config": config,
            "do": actions,
            **(spec or {}),
        }
        result = ranks("checkpoint", world, argv=[json.dumps(given)], env=env)
        assert result.exit_codes == [code] * world, result.output
        return result.output[0]

    return start


@pytest.fixture
def reference(run, tmp_path):
    """`reference(steps)`: what one process that trains without a break ends with."""

    def train(steps):
        run({}, ["train", steps], ["dump", str(tmp_path / "reference")])
        return torch.load(tmp_path / "reference.0")

    return train


def _dumped(tmp_path, name, world):
    return [torch.load(tmp_path / f"{name}.{rank}") for rank in range(world)]


def _assert_same(dumps, expected, *, exact=False):
    """Parameters and moments, of all ranks together, are the reference's."""
    seen = set()
    for one in dumps:
        assert one["step"] == expected["step"] and one["lr"] == [expected["lr"][0]] * len(one["lr"])
        for name, value in one["model"].items():
            compare = torch.equal if exact else lambda a, b: torch.allclose(a, b, rtol=1e-6, atol=1e-7)
            assert compare(value, expected["model"][name]), name
            assert one["moments"][name].keys() == expected["moments"][name].keys()
            for key, moment in one["moments"][name].items():
                assert compare(moment, expected["moments"][name][key]), (name, key)
            seen.add(name)
    assert seen == expected["model"].keys()


FROM_TO = [
    ("shard", {FSDP: 4}, {}),
    ("shard", {FSDP: 4}, {FSDP: 2}),
    ("shard", {FSDP: 4}, {FSDP: 3}),
    ("shard", {FSDP: 2, "tensor": 2}, {DDP: 2}),
    ("shard", {DDP: 2}, {FSDP: 2, "tensor": 2}),
    ("shard", {DDP: 2, FSDP: 2}, {"pipeline": 2, FSDP: 2}),
    ("shard", {"pipeline": 2, "tensor": 2}, {FSDP: 2}),
    ("full", {FSDP: 3}, {"tensor": 2}),
    ("full", {FSDP: 2, "tensor": 2}, {"pipeline": 2}),
    ("full", {"pipeline": 2, FSDP: 2}, {FSDP: 2, "tensor": 2}),
    ("local", {FSDP: 2, "tensor": 2}, {FSDP: 2, "tensor": 2}),
    ("local", {"pipeline": 2, FSDP: 2}, {"pipeline": 2, FSDP: 2}),
]


@pytest.mark.parametrize("kind, before, after", FROM_TO, ids=lambda value: str(value).replace(" ", ""))
def test_any_layout_goes_on_in_another(kind, before, after, run, reference, tmp_path):
    expected = reference(5)
    actions = [["train", 3], ["save"], ["train", 2], ["dump", str(tmp_path / "before")], ["finish"]]
    run(before, *actions, type=kind, spec={"scaler": True})
    _assert_same(_dumped(tmp_path, "before", _world(before)), expected)
    output = run(after, ["resume"], ["train", 2], ["dump", str(tmp_path / "after")], spec={"scaler": True})
    assert "resuming from step 3" in output
    dumps = _dumped(tmp_path, "after", _world(after))
    _assert_same(dumps, expected, exact=before == after)
    assert all(one["scale"] == 8.0 for one in dumps)
    lanes = [lane for one in _by_data_rank(dumps, after) for lane in one["lanes"]]
    assert lanes == [[lane, 5 * (lane + 1)] for lane in range(12)]


def _world(layout):
    return torch.Size(layout.values()).numel()


def _by_data_rank(dumps, layout):
    data, tensor = layout.get(DDP, 1) * layout.get(FSDP, 1), layout.get("tensor", 1)
    return [dumps[rank * tensor] for rank in range(data)]


def test_the_generators_of_every_rank_go_on(run, tmp_path):
    run({DDP: 2}, ["train", 1], ["save"], ["dump", str(tmp_path / "whole")], ["finish"])
    run({DDP: 2}, ["resume"], ["dump", str(tmp_path / "part")])
    whole, part = _dumped(tmp_path, "whole", 2), _dumped(tmp_path, "part", 2)
    assert [one["random"].tolist() for one in whole] == [one["random"].tolist() for one in part]
    assert not torch.equal(whole[0]["random"], whole[1]["random"])


@pytest.mark.parametrize("limit", [10**9, 9_000], ids=["one file", "many files"])
@pytest.mark.parametrize("tied", [False, True])
def test_full_is_a_folder_that_plain_transformers_opens(limit, tied, run, tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    spec = {"limit": limit, "tied": tied, "tokenizer": str(tmp_path / "tokenizer")}
    run({FSDP: 2}, ["train", 2], ["dump", str(tmp_path / "ours")], ["save"], ["finish"], type="full", spec=spec)
    folder = tmp_path / "checkpoints/step_00000002"
    assert len(list(folder.glob("model*.safetensors"))) == (1 if limit == 10**9 else 6)
    assert not [path for path in folder.glob("*.safetensors") if "optimizer" in path.name]
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    ours = _dumped(tmp_path, "ours", 1)[0]["model"]
    same = type(model)(model.config)
    same.load_state_dict(ours, strict=not tied)
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, same(ids).logits)
    assert not torch.equal(model(ids).logits, type(model)(model.config)(ids).logits)
    if limit == 10**9:
        assert load_file(folder / "model.safetensors").keys() == ours.keys()


def test_auto_is_shard_where_the_model_is_sharded(run, tmp_path):
    for layout, kind in (({FSDP: 2}, "shard"), ({DDP: 2}, "full"), ({}, "full")):
        run(layout, ["train", 1], ["save"], ["finish"], resume="none")
        assert manifest.verify(tmp_path / "checkpoints/step_00000001")["layout"] == kind


def test_local_says_that_it_loads_only_in_its_layout(run):
    run({FSDP: 2}, ["train", 1], ["save"], ["finish"], type="local")
    for other in ({}, {FSDP: 3}, {DDP: 2}):
        output = run(other, ["resume"], code=1)
        assert "is of type local, written by 2 ranks as fsdp2" in output


def test_another_model_is_refused_whatever_the_type(run, tmp_path):
    for kind in ("full", "shard", "local"):
        run({FSDP: 2}, ["train", 1], ["save"], ["finish"], type=kind)
        for other in ({"intermediate_size": 48}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}):
            output = run({FSDP: 2}, ["resume"], code=1, spec={"model": other})
            assert "the checkpoint is of another model: model.layers." in output
        shutil.rmtree(tmp_path / "checkpoints")


def test_skip_optimizer_loads_the_model_and_the_place(run, tmp_path):
    run({}, ["train", 3], ["dump", str(tmp_path / "before")], ["save"], ["finish"])
    run({FSDP: 2}, ["resume"], ["dump", str(tmp_path / "after")], skip_optimizer=True)
    (before,), after = _dumped(tmp_path, "before", 1), _dumped(tmp_path, "after", 2)
    assert after[0]["moments"] == {} and after[0]["step"] == 3
    assert all(torch.equal(before["model"][name], value) for name, value in after[0]["model"].items())


def test_a_save_before_the_first_step_has_no_moments(run, reference, tmp_path):
    expected = reference(2)
    for kind in ("full", "shard", "local"):
        run({FSDP: 2}, ["save"], ["finish"], type=kind)
        run({FSDP: 2}, ["resume"], ["train", 2], ["dump", str(tmp_path / "after")])
        _assert_same(_dumped(tmp_path, "after", 2), expected)
        shutil.rmtree(tmp_path / "checkpoints")


@pytest.mark.parametrize("kind", ["full", "shard", "local"])
def test_training_on_does_not_tear_what_is_being_saved(kind, run, reference, tmp_path):
    """The writer copies late and the next step comes at once: `poll` must hold the optimizer back."""
    expected = reference(2)
    output = run({FSDP: 2}, ["train", 2], ["slow copy"], ["save"], ["train", 3], ["finish"], type=kind)
    (event,) = [json.loads(line[6:]) for line in output.splitlines() if line.startswith("event ")]
    assert 0.2 < event["blocked"] <= event["seconds"]
    run({FSDP: 2}, ["resume"], ["dump", str(tmp_path / "after")])
    _assert_same(_dumped(tmp_path, "after", 2), expected, exact=True)


def test_synchronous_saves_are_whole_when_save_returns(run, tmp_path):
    run({DDP: 2}, ["train", 1], ["save"], asynchronous=False)
    manifest.verify(tmp_path / "checkpoints/step_00000001")


@pytest.mark.parametrize("policy, code", [("warn", 0), ("stop", 1)])
@pytest.mark.parametrize("kind, full", [("full", [0]), ("shard", [1]), ("shard", [0]), ("local", [1])])
def test_a_disk_full_on_one_rank_fails_the_save_on_all(policy, code, kind, full, run, tmp_path):
    root = tmp_path / "checkpoints"
    actions = [["train", 1], ["save"], ["finish"], ["full disk", full, 20_000], ["train", 1], ["save"], ["finish"]]
    output = run({FSDP: 2}, *actions, code=code, type=kind, on_failure=policy, keep_last=1)
    assert "checkpoint at step 2 could not be written" in output and "File too large" in output
    assert f"rank {full[0]}: " in output
    assert [path.name for path in root.iterdir()] == ["step_00000001"]
    manifest.verify(root / "step_00000001")


def test_a_failure_is_told_within_the_next_steps(run):
    actions = [["full disk", [1], 20_000], ["train", 1], ["save"], ["train", 5000]]
    output = run({FSDP: 2}, *actions, code=1, type="shard", on_failure="stop")
    assert "CheckpointError: checkpoint at step 1 could not be written" in output


def test_two_disks_one_of_them_replaced_by_an_empty_one(run, reference, tmp_path):
    """`full` lies on rank 0's disk only; rank 0 then comes up where there is none, or an older one."""
    expected = reference(4)
    a, b, c = (tmp_path / name for name in "abc")
    nodes = [NODE | {"ORCH_CHECKPOINT_DIR": str(path)} for path in (a, b)]
    run({FSDP: 2}, ["train", 2], ["save"], ["train", 1], ["save"], ["finish"], env=nodes)
    assert sorted(path.name for path in a.iterdir()) == ["step_00000002", "step_00000003"] and not list(b.iterdir())
    swapped = [NODE | {"ORCH_CHECKPOINT_DIR": str(path)} for path in (c, a)]
    output = run({FSDP: 2}, ["resume"], ["train", 1], ["dump", str(tmp_path / "after")], env=swapped)
    assert "resuming from step 3" in output
    _assert_same(_dumped(tmp_path, "after", 2), expected)


def test_shard_on_two_disks_is_refused_and_names_the_key(run, tmp_path):
    nodes = [NODE | {"ORCH_CHECKPOINT_DIR": str(tmp_path / name)} for name in "ab"]
    output = run({FSDP: 2}, ["save"], env=nodes, type="shard", code=2)
    assert "ConfigError: checkpoint.type=shard needs storage that all nodes share" in output
    assert "checkpoint.remote" in output


@pytest.mark.parametrize("kind", ["shard", "local", "full"])
def test_a_remote_brings_lost_disks_back(kind, run, reference, tmp_path):
    expected = reference(4)
    remote = str(tmp_path / "remote")
    nodes = [NODE | {"ORCH_CHECKPOINT_DIR": str(tmp_path / name)} for name in "ab"]
    output = run({FSDP: 2}, ["train", 3], ["save"], ["finish"], env=nodes, type=kind, remote=remote)
    assert "warning" not in output
    assert "parts" not in manifest.verify(tmp_path / "remote/run/step_00000003")
    fresh = [NODE | {"ORCH_CHECKPOINT_DIR": str(tmp_path / name)} for name in "cd"]
    actions = [["resume"], ["train", 1], ["dump", str(tmp_path / "after")]]
    output = run({FSDP: 2}, *actions, env=fresh, type=kind, remote=remote)
    assert "resuming from step 3" in output and "fetched from" in output
    _assert_same(_dumped(tmp_path, "after", 2), expected)
    assert "fetched" not in run({FSDP: 2}, *actions, env=fresh, type=kind, remote=remote)
    if kind != "full":  # half of it is worse than nothing: it must not look like nothing
        (tmp_path / "remote/run/step_00000003/manifest-2-of-2.json").unlink()
        fresh = [NODE | {"ORCH_CHECKPOINT_DIR": str(tmp_path / name)} for name in "ef"]
        output = run({FSDP: 2}, *actions, env=fresh, type=kind, remote=remote, code=1)
        assert "no checkpoint verifies" in output and "not on every node" in output


def test_local_on_two_disks_wants_all_parts_of_one_save(run, reference, tmp_path):
    expected = reference(3)
    nodes = [NODE | {"ORCH_CHECKPOINT_DIR": str(tmp_path / name)} for name in "ab"]
    actions = [["train", 2], ["save"], ["train", 2], ["save"], ["finish"]]
    run({FSDP: 2}, *actions, env=nodes, type="local")
    shutil.copytree(tmp_path / "a/step_00000004", tmp_path / "old")
    shutil.rmtree(tmp_path / "b/step_00000004")  # as if node b had died between the two renames
    output = run({FSDP: 2}, ["resume"], ["train", 1], ["dump", str(tmp_path / "after")], env=nodes, type="local")
    assert "passed over" in output and "resuming from step 2" in output
    _assert_same(_dumped(tmp_path, "after", 2), expected, exact=False)
    swapped = run({FSDP: 2}, ["resume"], env=nodes[::-1], type="local", code=1)
    assert "the files of rank 0 lie on another node" in swapped
    run({FSDP: 2}, ["resume"], ["train", 2], ["save"], ["finish"], env=nodes, type="local")  # step 4 again
    assert "resuming from step 4" in run({FSDP: 2}, ["resume"], env=nodes)
    shutil.rmtree(tmp_path / "a/step_00000004")
    (tmp_path / "old").rename(tmp_path / "a/step_00000004")
    output = run({FSDP: 2}, ["resume"], env=nodes)
    assert output.count("not on every node") == 2 and "resuming from step 2" in output


def test_damage_is_passed_over_and_told(run, tmp_path):
    run({FSDP: 2}, ["train", 1], ["save"], ["train", 1], ["save"], ["finish"], type="shard")
    damaged = tmp_path / "checkpoints/step_00000002/shards/__1_0.distcp"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    output = run({FSDP: 2}, ["resume"])
    assert "passed over" in output and "the hash of shards/__1_0.distcp does not match" in output
    assert "resuming from step 1" in output
    shutil.rmtree(tmp_path / "checkpoints/step_00000001")
    assert "no checkpoint verifies" in run({FSDP: 2}, ["resume"], code=1)


def test_a_named_checkpoint_begins_a_new_timeline(run, tmp_path):
    root: Path = tmp_path / "checkpoints"
    run({}, ["train", 1], ["save"], ["train", 1], ["save"], ["train", 1], ["save"], ["finish"], keep_last=5)
    output = run({}, ["resume"], ["train", 1], ["save"], ["finish"], resume="step_00000001", keep_last=5)
    assert "resuming from step 1" in output
    assert manifest.read(root / "step_00000002")["timeline"] == 1
    assert "resuming from step 2" in run({}, ["resume"])
    assert "no checkpoint verifies" in run({}, ["resume"], resume="step_00000009", code=1)
