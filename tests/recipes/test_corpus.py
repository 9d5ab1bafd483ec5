import json

import pytest
from tiny import tiny_tokenizer

from afterglow.core.chat_encoding import encode_chat
from afterglow.recipes.unlearning.corpus import CorpusConfig, cut, main, make_pieces

TEXT = "the quick brown fox jumps over the lazy dog\n\n" * 20


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_pieces_joined_are_the_text_and_none_is_longer_than_asked(tokenizer):
    count = len(tokenizer(TEXT, add_special_tokens=False).input_ids)
    for tokens in (1, 7, count - 1, count, count + 1):
        pieces = list(cut(TEXT, tokenizer, tokens, 1))
        assert "".join(pieces) == TEXT and len(pieces) == -(-count // tokens)
    assert list(cut(TEXT, tokenizer, count - 1, 2)) == ["".join(cut(TEXT, tokenizer, count - 1, 1))[:-1]]
    assert list(cut("", tokenizer, 5, 1)) == []


def test_rows_are_what_a_trainer_reads(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT, "short")))
    config = CorpusConfig(source=str(tmp_path / "texts.jsonl"), tokenizer=str(tmp_path / "tokenizer"), tokens=64)
    folder = make_pieces(tmp_path / "made", config)
    rows = [json.loads(line) for line in (folder / "pieces.jsonl").read_text().splitlines()]
    assert "".join(row["completion"][0]["content"] for row in rows)[:100] == TEXT[:100]
    assert not any("short" in row["completion"][0]["content"] for row in rows), "fewer than 16 tokens"
    assert make_pieces(tmp_path / "made", config) == folder

    plain = tiny_tokenizer()
    plain.chat_template = "{{- bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    encoded = encode_chat(plain, rows[0]["prompt"], rows[0]["completion"])
    assert plain.decode(encoded.input_ids[encoded.assistant]) == rows[0]["completion"][0]["content"]

    words = ["--source", config.source, "--tokenizer", config.tokenizer, "--column", "body"]
    assert main(["--output_dir", str(tmp_path / "other"), *words]) == 1
    assert "texts.jsonl:1: no text in column 'body'; the row has ['text']" in capsys.readouterr().err
