"""`python -m trainer run` as whole processes: resume, stop, failures, exit codes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from trainer.checkpoints import manifest
from trainer.config import recipe_names


def _steps(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in root.glob("step_*"))


def _losses(rows):
    return {row["step"]: (row["loss"], row["grad_norm"], row["lr"], row["tokens"]) for row in rows}


def test_one_process_from_start_to_sample(train, events, tmp_path):
    result = train("run", "log.tensorboard=true")
    assert result.exit_codes == [0], result.output
    assert all(words in result.output[0] for words in ("held-out loss", "perplexity", "sample: 'The"))
    assert [row["step"] for row in events("run", "step")] == [1, 2, 3, 4, 5, 6]
    assert events("run", "end")[-1]["status"] == "succeeded"
    assert _steps(tmp_path / "run/checkpoints") == [4, 6]
    assert list((tmp_path / "run/tensorboard").iterdir())
    assert "seq_len: 16" in (tmp_path / "run/config.yaml").read_text()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "run/checkpoints/step_00000006"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the of <s> it", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    assert tokenizer.bos_token_id == model.config.bos_token_id == 0
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("world", [1, 2])
def test_resume_equals_uninterrupted(world, train, events, tmp_path):
    assert train("whole", world=world).exit_codes == [0] * world
    (tmp_path / "part").mkdir()
    stopped = train("part", script="stop_after", world=world, env={"STOP_AFTER": "3"})
    assert stopped.exit_codes == [75] * world, stopped.output
    assert events("part", "end", rank=world - 1)[-1]["status"] == "preempted"
    assert _steps(tmp_path / "part/checkpoints") == [2, 3]
    (tmp_path / "part/stop").unlink()
    resumed = train("part", world=world, env={"ORCH_ATTEMPT": "2"})
    assert resumed.exit_codes == [0] * world, resumed.output
    assert "resuming from step 3" in resumed.output[0]
    whole, part = _losses(events("whole", "step")), _losses(events("part", "step"))
    assert part == whole
    assert events("part", "eval")[-1]["loss"] == events("whole", "eval")[-1]["loss"]
    assert [row["attempt"] for row in events("part", "start")] == [1, 2]


def test_resume_at_another_world_size_trains_the_next_rows(train, events, tmp_path):
    assert train("whole").exit_codes == [0]
    assert train("part", "train.steps=3").exit_codes == [0]
    shutil.rmtree(tmp_path / "part/checkpoints/step_00000002")
    result = train("part", world=2)
    assert result.exit_codes == [0, 0], result.output
    whole, part = _losses(events("whole", "step")), _losses(events("part", "step"))
    for step in (4, 5, 6):
        assert part[step][3] == whole[step][3]  # the same rows: exactly as many valid tokens
    # the first three steps ran under another schedule (train.steps=3), so only the rows are compared


def test_newest_that_verifies_on_any_node_wins(train, tmp_path):
    """Two nodes with their own disks; the newest of all is damaged, the next lies on rank 1's node only."""
    assert train("first", "train.steps=6", "checkpoint.keep_last=3").exit_codes == [0]
    a, b = tmp_path / "a", tmp_path / "b"
    source = tmp_path / "first/checkpoints"
    shutil.copytree(source / "step_00000002", a / "step_00000002")
    shutil.copytree(source / "step_00000006", a / "step_00000006")
    shutil.copytree(source / "step_00000004", b / "step_00000004")
    with (a / "step_00000006/model.safetensors").open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    node = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    env = [node | {"ORCH_CHECKPOINT_DIR": str(a)}, node | {"ORCH_CHECKPOINT_DIR": str(b)}]
    result = train("second", world=2, env=env)
    assert result.exit_codes == [0, 0], result.output
    assert "passed over" in result.output[0] and "hash of model.safetensors" in result.output[0]
    assert "resuming from step 4" in result.output[0]
    assert _steps(a) == [4, 6] or _steps(a) == [2, 6]
    assert manifest.verify(a / "step_00000006")["world"] == 2
    assert _steps(b) == [4]  # only global rank 0 writes


def test_nothing_verifies_is_an_error_not_a_silent_restart(train, tmp_path):
    assert train("run", "train.steps=2").exit_codes == [0]
    (tmp_path / "run/checkpoints/step_00000002/training/optimizer.safetensors").write_bytes(b"short")
    result = train("run")
    assert result.exit_codes == [1]
    assert "no checkpoint verifies" in result.output[0] and "optimizer.safetensors has 5 bytes" in result.output[0]
    assert train("run", "checkpoint.resume=none").exit_codes == [0]


def test_a_new_start_outranks_the_old_checkpoints(train, tmp_path):
    assert train("run").exit_codes == [0]
    assert train("run", "checkpoint.resume=none", "train.steps=3", "checkpoint.every=0").exit_codes == [0]
    result = train("run", "train.steps=4", "checkpoint.every=0")
    assert "resuming from step 3" in result.output[0], result.output
    assert _steps(tmp_path / "run/checkpoints") == [3, 4]


def test_other_data_is_refused_on_resume(train):
    assert train("run", "train.steps=2").exit_codes == [0]
    result = train("run", "data.seq_len=12")
    assert result.exit_codes == [1]
    assert "trained with data.seq_len=16, here it is 12: exact resume is impossible" in result.output[0]
    result = train("run", "data.limit=6")
    assert result.exit_codes == [1] and "was trained on other data" in result.output[0]


def test_other_model_is_refused_on_resume(train):
    assert train("run", "train.steps=2").exit_codes == [0]
    result = train("run", "model.intermediate_size=48")
    assert result.exit_codes == [1]
    assert "the checkpoint is of another model" in result.output[0]


def test_sigterm_is_a_stop(train, events):
    result = train(
        "run", "train.steps=500", script="stop_after", env={"STOP_AFTER": "2", "STOP_BY": "signal"}
    )
    assert result.exit_codes == [75], result.output
    assert events("run", "checkpoint")[-1]["step"] == events("run", "end")[-1]["step"] == 2


def test_stop_seen_by_one_rank_stops_all(train, events, tmp_path):
    folders = [{"ORCH_RUN_DIR": str(tmp_path / name)} for name in ("a", "b")]
    env = [folders[0], folders[1] | {"STOP_AFTER": "2"}]
    shared = {"ORCH_CHECKPOINT_DIR": str(tmp_path / "checkpoints")}
    result = train("run", "train.steps=500", script="stop_after", world=2, env=[one | shared for one in env])
    assert result.exit_codes == [75, 75], result.output
    assert _steps(tmp_path / "checkpoints")[-1] == 2


def test_failing_rank_reports_and_exits_at_once(train, events):
    result = train(
        "run", "train.steps=500", script="fail_after", world=2, env={"FAIL_AFTER": "2", "FAIL_RANK": "1"}
    )
    assert result.exit_codes == [1, 1], result.output
    (error,) = events("run", "error", rank=1)
    assert (error["type"], error["message"], error["step"]) == ("ZeroDivisionError", "injected", 2)
    assert "fail_after.py" in error["traceback"]
    assert "ZeroDivisionError: injected" in result.output[1]
    assert events("run", "end", rank=1)[-1]["status"] == "failed"
    assert events("run", "error", rank=0)[0]["time"] >= error["time"]


@pytest.mark.parametrize("policy, code", [("warn", 0), ("stop", 1)])
def test_failed_writes_keep_the_old_checkpoints(policy, code, train, events, tmp_path):
    assert train("run", "train.steps=2").exit_codes == [0]
    result = train("run", f"checkpoint.on_failure={policy}", script="full_disk")
    assert result.exit_codes == [code], result.output
    assert "could not be written" in result.output[0] and "File too large" in result.output[0]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000002"]
    manifest.verify(tmp_path / "run/checkpoints/step_00000002")


def test_without_a_checkpoint_at_the_end(train, events, tmp_path):
    result = train("run", "checkpoint.every=4", "checkpoint.at_end=false")
    assert result.exit_codes == [0], result.output
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000004"]
    assert [row["step"] for row in events("run", "step")] == [1, 2, 3, 4, 5, 6]
    stopped = train("stopped", "checkpoint.every=0", "checkpoint.at_end=false", script="stop_after",
                    env={"STOP_AFTER": "3"})  # fmt: skip
    assert stopped.exit_codes == [75], stopped.output
    assert [path.name for path in (tmp_path / "stopped/checkpoints").glob("step_*")] == ["step_00000003"]


def test_non_finite_gradients_are_skipped_then_fatal(train, events):
    env = {"NAN_AFTER": "1", "NAN_CALLS": "4"}
    result = train("run", "train.steps=9", "train.max_bad_steps=2", script="nan_after", env=env)
    assert result.exit_codes == [1], result.output
    (error,) = events("run", "error")
    assert error["type"] == "NonFiniteError" and error["step"] == 4
    assert [row["step"] for row in events("run", "bad_step")] == [2, 3, 4]


def test_bad_rows_are_named_and_a_run_may_stop_at_the_first(train, events):
    """Only rank 1's loss is NaN: all ranks stop together, and the rows are those of rank 1."""
    env = {"NAN_AFTER": "2", "NAN_CALLS": "2", "NAN_RANK": "1"}
    result = train("run", "train.non_finite=stop", world=2, script="nan_after", env=env)
    assert result.exit_codes == [1, 1], result.output
    (bad,) = events("run", "bad_step")
    assert (bad["step"], bad["data_ranks"], bad["grad_norm"]) == (3, [1], "nan")
    assert [row.split(":")[0] for row in bad["rows"]] == ["lane 2", "lane 3"]
    assert all("document" in row and "tokens" in row for row in bad["rows"])
    assert [row["step"] for row in events("run", "step")] == [1, 2]


@pytest.mark.parametrize("wrong", ["optim.lrr=1", "train.global_batch=3", "train.steps=many"])
def test_wrong_configuration_is_one_line_and_exit_2(wrong, train, events):
    result = train("run", "train.micro_batch=2", wrong)
    assert result.exit_codes == [2]
    assert "Traceback" not in result.output[0] and result.output[0].startswith("error: ")
    assert events("run", "error")[0]["type"] == "ConfigError"


@pytest.mark.parametrize("recipe", recipe_names())
def test_dry_run(recipe, ranks):
    result = ranks("cli", argv=["run", "--config", recipe, "--dry_run"])
    assert result.exit_codes == [0], result.output
    assert f"dry run of recipe '{recipe}' passed" in result.output[0]
