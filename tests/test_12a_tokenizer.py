"Tests of 12a_tokenizer. Generated from nbs/12a_tokenizer.ipynb: edit that, then run pythia_book build."
import pytest
import torch
from pythia_nb.tokenizer import Tokenizer, toy_tokenizer, whole_characters


def test_tokenizer_round_trip_and_files(tmp_path):
    tok = toy_tokenizer()
    for text in ["", "plain", "tabs\tand\r\nnewlines\n", "🦊 ünï 日本", "\x00\x7f"]:
        assert tok.decode(tok.encode(text)) == text
    assert tok.encode_batch(["a fox", "dog"]) == [tok.encode("a fox"), tok.encode("dog")]
    tok.save(tmp_path/"t"/"tokenizer.json")
    for path in (tmp_path/"t", tmp_path/"t"/"tokenizer.json"):
        again = Tokenizer.from_file(path)
        assert again.hash == tok.hash and again.encode("lazy fox") == tok.encode("lazy fox") and again.eos_id == 0
    assert toy_tokenizer(300).hash != tok.hash

def test_tokenizer_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"): Tokenizer.from_file(tmp_path/"nothing.json")
    (tmp_path/"broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json is not a readable tokenizer file"):
        Tokenizer.from_file(tmp_path/"broken.json")


@pytest.mark.parametrize("text", ["plain text", "🦊🙂🙃", "Grüße, 日本語!", "�", "a�b", "é" * 40, ""])
def test_pieces_are_whole_and_complete(text):
    tok = toy_tokenizer(300)
    pieces = list(whole_characters(tok, tok.encode(text)))
    assert "".join(pieces) == text and all(pieces)
    if "�" not in text: assert not any("�" in p for p in pieces)

def test_bytes_that_are_no_text_still_come_out():
    tok, generator = toy_tokenizer(), torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.randint(1, tok.vocab_size, (12,), generator=generator).tolist()
        assert "".join(whole_characters(tok, ids)) == tok.decode(ids)
    first_byte = tok.encode("🦊")[:1]
    assert list(whole_characters(tok, first_byte)) == ["�"]
