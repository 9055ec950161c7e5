from __future__ import annotations

import fcntl
import json
import threading
import time

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from trainer.data import tokenizer
from trainer.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, TextTokenizer
from trainer.errors import ConfigError, DeadlineError

SENTENCES = ["the quick brown fox", "jumps over the lazy dog <s> </s> <pad>", "naïve café — “ok” 😀"] * 5


def _silent(_: str) -> None:
    pass


def _trained(path, vocab_size=300):
    return tokenizer.prepare(SENTENCES, vocab_size, path, leader=True, timeout=5, say=_silent)


def _settings(folder, **changes):
    file = folder / "tokenizer_config.json"
    settings = {k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not None}
    file.write_text(json.dumps(settings))
    return TextTokenizer.from_folder(folder)


def test_documents_round_trip_and_literal_special_tokens_are_text(tmp_path):
    bpe = TextTokenizer.from_folder(_trained(tmp_path))
    assert (bpe.bos_id, bpe.eos_id, bpe.pad_id) == (BOS_ID, EOS_ID, PAD_ID)
    for ids, sentence in zip(bpe.encode_documents(SENTENCES), SENTENCES, strict=True):
        assert ids.dtype == "int32" and ids[0] == BOS_ID and ids[-1] == EOS_ID
        assert not {BOS_ID, EOS_ID, PAD_ID} & set(ids[1:-1].tolist())
        assert bpe.decode(ids) == sentence and bpe.encode(sentence) == ids[1:-1].tolist()


def test_the_same_ids_as_transformers(tmp_path):
    folder = _trained(tmp_path)
    ours, theirs = TextTokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in SENTENCES:
        wanted = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == wanted
    assert ours.vocab_size == len(theirs)


def test_bos_only_where_it_is_one_of_its_own(tmp_path):
    folder = _trained(tmp_path)
    prints = {TextTokenizer.from_folder(folder).fingerprint}
    gpt2 = _settings(folder, bos_token="</s>", pad_token=None)
    assert (gpt2.bos_id, gpt2.eos_id, gpt2.pad_id) == (None, EOS_ID, EOS_ID)
    (ids,) = gpt2.encode_documents(["the fox"])
    assert ids[0] != EOS_ID and ids[-1] == EOS_ID and gpt2.decode(ids) == "the fox"
    prints.add(gpt2.fingerprint)
    qwen = _settings(folder, bos_token=None, pad_token={"content": "<pad>", "special": True})
    assert (qwen.bos_id, qwen.eos_id, qwen.pad_id) == (None, EOS_ID, PAD_ID)
    prints.add(qwen.fingerprint)
    assert len(prints) == 3
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        _settings(folder, eos_token=None)


def test_a_special_token_that_only_the_configuration_knows_is_added_by_transformers(tmp_path):
    folder = _trained(tmp_path)
    before = TextTokenizer.from_folder(folder).vocab_size
    ours = _settings(folder, eos_token="<|end|>")
    assert ours.eos_id == before == ours.vocab_size - 1
    assert ours.encode_documents(["fox <|end|>"])[0].tolist().count(before) == 1


def test_saved_truncation_and_padding_are_not_taken_over(tmp_path):
    folder = _trained(tmp_path)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    assert (
        TextTokenizer.from_folder(folder).decode(TextTokenizer.from_folder(folder).encode("the quick")) == "the quick"
    )


def test_a_tokenizer_without_tokenizer_json(tmp_path):
    words = {"[UNK]": 0, "</s>": 1, "<pad>": 2, "fox": 3, "dog": 4, "[CLS]": 5, "[SEP]": 6, "[MASK]": 7, "/": 8}
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "eos_token": "</s>", "pad_token": "<pad>"})
    )
    ours = TextTokenizer.from_folder(tmp_path)
    assert ours.encode_documents(["fox dog"])[0].tolist() == [3, 4, 1] and ours.decode([3, 4, 1]) == "fox dog"
    assert (ours.bos_id, ours.pad_id, ours.vocab_size) == (None, 2, 9)


def test_a_slow_tokenizer(tmp_path):
    # characters, of a class that has no fast counterpart
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    ours = TextTokenizer.from_folder(tmp_path)
    (ids,) = ours.encode_documents(["ab </s>"])
    assert ids.tolist().count(ours.eos_id) == 1 and ours.decode(ids) == "ab </s>"
    assert ours.fingerprint == TextTokenizer.from_folder(tmp_path).fingerprint


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot read a tokenizer in"):
        TextTokenizer.from_folder(tmp_path)
    folder = _trained(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot read a tokenizer in"):
        TextTokenizer.from_folder(folder)


def test_half_a_surrogate_pair_does_not_end_the_run(tmp_path):
    ours = TextTokenizer.from_folder(_trained(tmp_path))
    assert ours.decode(ours.encode_documents(["fox \ud83d"])[0]) == "fox ?"
    assert tokenizer.train(["fox \ud83d"], 300).get_vocab_size() <= 300


def test_vocabulary_with_holes_ends_after_its_largest_id(tmp_path):
    backend = Tokenizer(models.WordLevel({"fox": 0, "</s>": 50, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert TextTokenizer.from_folder(tmp_path).vocab_size == 51


def test_trained_once_and_found_again(tmp_path):
    said: list[str] = []
    arguments = {"leader": True, "timeout": 5, "say": said.append}
    folder = tokenizer.prepare(SENTENCES, 300, tmp_path / "cache", **arguments)
    before = (folder / "tokenizer.json").stat().st_mtime_ns
    assert tokenizer.prepare(SENTENCES, 300, tmp_path / "cache", **arguments) == folder
    assert (folder / "tokenizer.json").stat().st_mtime_ns == before and len(said) == 1
    assert tokenizer.prepare(SENTENCES, 301, tmp_path / "cache", **arguments) != folder


def test_training_is_deterministic(tmp_path):
    folders = [_trained(tmp_path / name) for name in "ab"]
    assert (folders[0] / "tokenizer.json").read_bytes() == (folders[1] / "tokenizer.json").read_bytes()


def test_others_wait_for_the_leader_with_a_message(tmp_path):
    said: list[str] = []
    waiting = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        waiting.set()

    def lead() -> None:
        waiting.wait(5)
        _trained(tmp_path)

    leader = threading.Thread(target=lead)
    leader.start()
    folder = tokenizer.prepare(SENTENCES, 300, tmp_path, leader=False, timeout=5, say=say)
    leader.join()
    assert (folder / "tokenizer.json").is_file()
    assert len(said) == 1 and "rank 0 to train the tokenizer" in said[0]


def test_waiting_has_a_deadline(tmp_path):
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"waited 0\.1 s for the node's rank 0"):
        tokenizer.prepare(SENTENCES, 300, tmp_path, leader=False, timeout=0.1, say=_silent)
    name = f"tokenizer-{tokenizer.fingerprint(SENTENCES, 300)}"
    with open(tmp_path / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DeadlineError, match="another run's tokenizer lock"):
            tokenizer.prepare(SENTENCES, 300, tmp_path, leader=True, timeout=0.1, say=_silent)
    assert not (tmp_path / name).exists() and 0.2 <= time.monotonic() - began < 5


def test_many_leaders_at_once_leave_one_whole_tokenizer(tmp_path):
    threads = [threading.Thread(target=_trained, args=(tmp_path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]
