"""One GPU: tokens/s, strict MFU against the measured matmul peak, and memory, beside HF `Trainer` on the same model.

    python benchmarks/gpu.py [--only 124M 1.1B 8B 8B-bf16] [--steps 20] [--json] [--skip-hf]

The peak is the best of several large bf16 matrix products on this very device, not a data sheet's. FLOPs are counted
strictly (trainer/models/flops.py: no input embedding, half of the attention square). A step's time is the median
after the first five; both sides run the same rows, compiled, in bf16 with fp32 parameters and AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
SKIP = 5
LLAMA_8B = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
SIZES = {
    "124M": dict(
        model=dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
                   num_key_value_heads=12, vocab_size=50304, tie_word_embeddings=True),
        rows=32, seq_len=1024, checkpoint="none", states="fp32", aim=0.50,
    ),
    "1.1B": dict(
        model=dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
                   num_key_value_heads=4, vocab_size=32000, tie_word_embeddings=False),
        rows=16, seq_len=2048, checkpoint="none", states="fp32", aim=0.65,
    ),
    "8B": dict(
        model=dict(**LLAMA_8B, num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False),
        rows=1, seq_len=4096, checkpoint="full", states="fp32", aim=0.55,
    ),
    "8B-bf16": dict(
        model=dict(**LLAMA_8B, num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False),
        rows=4, seq_len=4096, checkpoint="selective", states="bf16", aim=0.65,
    ),
}  # fmt: skip


def matmul_peak() -> float:
    """FLOPs per second of the best bf16 matrix product here."""
    import torch

    best = 0.0
    for size in (4096, 8192, 16384):
        a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
        for _ in range(3):
            a @ b
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            a @ b
        end.record()
        torch.cuda.synchronize()
        best = max(best, 2 * size**3 * 10 / (start.elapsed_time(end) / 1e3))
        del a, b
    torch.cuda.empty_cache()  # the sizes to come run in other processes on the same device
    return best


def ours(size: dict, steps: int, folder: Path) -> tuple[float, float]:
    """(seconds a step, peak bytes)."""
    keys = [f"model.{key}={value}" for key, value in size["model"].items()]
    # one document sees all of its row, as the other side's: isolated ones would be less work than the FLOPs counted
    keys += ["data.source=synthetic", "data.cross_document=true", f"data.seq_len={size['seq_len']}", "data.holdout=0"]
    keys += [f"train.steps={steps}", f"train.global_batch={size['rows']}", f"train.micro_batch={size['rows']}"]
    keys += ["train.precision=bf16", "train.compile=true", f"train.activation_checkpoint={size['checkpoint']}"]
    keys += [f"optim.state_dtype={size['states']}", "checkpoint.every=0", "checkpoint.at_end=false"]
    keys += ["eval.every=0", "log.tensorboard=false", "sample.max_new_tokens=0"]
    _run(["-m", "trainer", "run", "--config", "demo", *keys], folder)
    rows = [json.loads(line) for line in (folder / "run/events/rank-0.jsonl").read_text().splitlines()]
    events = [row for row in rows if row["kind"] == "step"]
    return statistics.median(row["step_s"] for row in events[SKIP:]), max(row["memory"] for row in events)


def hf(size: dict, steps: int, folder: Path) -> tuple[float, float]:
    given = dict(model=size["model"], rows=size["rows"], seq_len=size["seq_len"], steps=steps, compile=True,
                 checkpoint=size["checkpoint"] != "none")  # fmt: skip
    result = json.loads(_run([str(HERE / "job/hf_trainer.py"), json.dumps(given)], folder).splitlines()[-1])
    return statistics.median(result["seconds"][SKIP:]), result["memory"]


def _run(arguments: list[str], folder: Path) -> str:
    environ = os.environ | {"ORCH_RUN_DIR": str(folder / "run"), "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run([sys.executable, *arguments], env=environ, capture_output=True, text=True, cwd=folder,
                          timeout=1200, check=False)  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    return done.stdout


def measure(name: str, size: dict, steps: int, peak: float, *, with_hf: bool) -> dict:
    from transformers import LlamaConfig

    from trainer.models.flops import flops_per_token

    flops = flops_per_token(LlamaConfig(**size["model"]), size["seq_len"])
    tokens = size["rows"] * size["seq_len"]
    row: dict = {"size": name, "aim": size["aim"]}
    for side, run in (("ours", ours), ("hf", hf)):
        if side == "hf" and not with_hf:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                seconds, memory = run(size, steps, Path(folder))
            except RuntimeError as error:
                row[side] = {"error": str(error)}
                continue
        speed = tokens / seconds
        mfu = round(speed * flops / peak, 4)
        row[side] = {"tokens_per_s": round(speed), "mfu": mfu, "gib": round(memory / 2**30, 1)}
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--skip-hf", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs an NVIDIA GPU; this machine has none")
    peak = matmul_peak()
    print(f"{torch.cuda.get_device_name()}: {peak / 1e12:.0f} TFLOP/s in the best bf16 matrix product", flush=True)
    rows = []
    for name in given.only:
        rows.append(measure(name, SIZES[name], given.steps, peak, with_hf=not given.skip_hf))
        print(json.dumps(rows[-1]), flush=True)
    if given.json:
        print(json.dumps({"peak": peak, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
