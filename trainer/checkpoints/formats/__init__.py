"""What is in a checkpoint's folder, by `checkpoint.type`: `full`, `shard` or `local`.

Each module writes a snapshot into a staging folder and loads a verified folder into tensors. Beside it, in every
type, lie `config.json` and the tokenizer, and `training/` with `state.json` (step, schedule, scaler, data position)
and `rng.pt` (the generators of every rank).
"""
