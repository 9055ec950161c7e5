"""job.json, result.json and log: each written by one side and read by the other, against the fixtures.

`ORCH_WRITE_FIXTURES=1` writes them anew; a change to them is a change of docs/contracts.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from orchestrator.commands import job
from orchestrator.node.launch import Launcher, Rank
from orchestrator.specs import ImageRef, JobSpec, Node, NodeResult, RunState

FIXTURES = Path(__file__).parent / "fixtures"
SECRET = "hf_0123456789"


def same(name: str, text: str) -> None:
    path = FIXTURES / name
    if os.environ.get("ORCH_WRITE_FIXTURES"):
        path.write_text(text)
    assert path.read_text() == text


def test_the_host_writes_job_json() -> None:
    nodes = (Node("n1", "203.0.113.11", private="10.0.0.11"), Node("n2", "203.0.113.12", private="10.0.0.12"))
    spec = JobSpec(
        run_id="demo-20260131-120000-ab12",
        name="demo",
        nodes=nodes,
        procs=2,
        command=("-m", "trainer", "run", "--config", "demo"),
        stop="file",
        image=ImageRef("localhost:5000/demo", "c0ffee", "sha256:" + "0" * 64),
        env={"EPOCHS": "2"},
        operator="kim",
    )
    text = json.dumps(job.job(spec, 1, job.places(spec, 1)), indent=1) + "\n"
    same("job.json", text)


def launcher(tmp_path: Path) -> Launcher:
    (tmp_path / "job.json").write_text((FIXTURES / "job.json").read_text())
    (tmp_path / "secrets.env").write_text(f"HF_TOKEN={json.dumps(SECRET)}\n")
    return Launcher(str(tmp_path))


def test_the_launcher_reads_job_json_and_secrets_env(tmp_path: Path) -> None:
    it = launcher(tmp_path)
    env = it.environment()
    assert (env["ORCH_RUN_ID"], env["EPOCHS"], env["HF_TOKEN"]) == ("demo-20260131-120000-ab12", "2", SECRET)
    assert it.endpoint == "10.0.0.11:29400"
    assert not (tmp_path / "secrets.env").exists()


def test_the_launcher_writes_result_json_and_log(tmp_path: Path) -> None:
    it = launcher(tmp_path)
    it.environment()
    output = {
        2: f"step 1 loss 3.1\ntoken {SECRET}\nno end".encode(),
        3: b"[rank3]: Traceback (most recent call last):\n"
        b'[rank3]:   File "/app/train.py", line 9, in <module>\n'
        b'[rank3]:     raise ValueError("bad shard")\n[rank3]: ValueError: bad shard\n',
    }
    for number, text in output.items():
        hello = {"rank": number, "local_rank": number - 2, "started_ns": 1}
        rank = Rank(hello, None, it.secrets)  # type: ignore[arg-type]
        it.log.put(rank.lines.feed(text, 0.0) + rank.lines.end())
        it.ranks[number] = rank
    it.ranks[2].code, it.ranks[2].ordered, it.ranks[2].ended_ns = -15, "peer", 9
    it.ranks[3].code, it.ranks[3].ended_ns = 1, 8
    it.ranks[3].lines.tracebacks.last["time_ns"] = 7
    it.started_ns = 0
    assert it.finish() == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["host"] and result["ended_ns"] > 10**18
    result |= {"host": "gpu2", "ended_ns": 10}
    same("result.json", json.dumps(result, indent=1) + "\n")
    same("log", (tmp_path / "log").read_text())


def test_the_host_reads_result_json() -> None:
    result = NodeResult.from_json(json.loads((FIXTURES / "result.json").read_text()))
    assert (result.node, result.index, result.state, result.exit_code) == ("n2", 1, RunState.FAILED, 1)
    told, failed = result.ranks
    assert (told.rank, told.exit_code, told.error) == (2, -15, None)
    assert failed.error and (failed.error.type, failed.error.message, failed.error.time_ns) == (
        "ValueError",
        "bad shard",
        7,
    )
