"""Text: what is read and what is refused, how it is split and kept, and what is drawn from it."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from aftermax.lab.data.corpus import SPLITS, Corpus, prepare, split_documents
from aftermax.lab.data.sources import Document, read_documents

from .lab_work import prose, write_texts


@pytest.fixture
def texts(tmp_path) -> Path:
    return write_texts(tmp_path / "texts")


def corpus_of(data: Path | None, out: Path, tokenizer="bytes", vocabulary=300, **room) -> Corpus:
    lengths = {"shortest": 49, "longest": 97} | room
    return prepare(data, tokenizer, vocabulary, out=out / "data", **lengths)


def documents_of(corpus: Corpus, split: str) -> list[np.ndarray]:
    tokens = corpus.tokens(split)
    return [tokens[start:stop] for start, stop in corpus.documents(split)]


# what is read


def test_a_folder_is_read_in_the_order_of_names_without_what_is_not_text(texts):
    names = [document.name for document in read_documents(texts)]
    flat, deep = [f"{i}.txt" for i in range(7)], ["deeper/7.txt", "deeper/8.txt"]
    assert names == flat + deep


def test_the_standard_library_is_read_without_tests_and_other_peoples_packages():
    names = {document.name for document in read_documents(None)}
    assert "json/decoder.py" in names
    assert not [name for name in names if "site-packages" in name or "/test/" in name]


def test_what_is_skipped_is_skipped_below_the_folder_not_above_it(tmp_path):
    """A reader's texts may stand in a folder called tests."""
    texts = write_texts(tmp_path / "tests" / "texts")
    (texts / "__pycache__").mkdir()
    (texts / "__pycache__" / "compiled.txt").write_text("not a text")
    assert len(read_documents(texts)) == 9


def test_one_file_is_one_document(texts):
    (document,) = read_documents(texts / "0.txt")
    assert document == Document("0.txt", (texts / "0.txt").read_bytes())


# how it is split


def test_no_file_is_in_two_splits_and_none_is_lost():
    documents = [Document(f"{i}.txt", bytes(100 + i)) for i in range(200)]
    splits = split_documents(documents)
    names = [document.name for part in splits.values() for document in part]
    assert sorted(names) == sorted(document.name for document in documents)


def test_shares_are_about_right():
    splits = split_documents([Document(f"{i}.txt", bytes(100 + i)) for i in range(200)])
    total = sum(len(d.text) for part in splits.values() for d in part)
    for split, share in SPLITS.items():
        assert sum(len(d.text) for d in splits[split]) / total == pytest.approx(share, abs=0.01)


def test_a_split_does_not_depend_on_the_order_or_content_of_files():
    """A file that is edited stays where it was: nothing that was held out becomes training text."""
    documents = [Document(f"{i}.txt", bytes(100)) for i in range(50)]
    edited = [Document(d.name, bytes(99) + b"x") for d in reversed(documents)]

    def names(of):
        return {split: {d.name for d in part} for split, part in split_documents(of).items()}

    assert names(documents) == names(edited)


def test_a_single_file_is_cut_into_regions_that_make_it_up_again():
    text = prose(0, 5000).encode()
    splits = split_documents([Document("a", text)])
    regions = {split: part[0].text for split, part in splits.items()}
    assert regions["train"] + regions["tune"] + regions["validation"] == text
    for split, share in SPLITS.items():
        assert len(regions[split]) / len(text) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("size", range(400, 420))
def test_a_file_is_cut_between_characters(size):
    splits = split_documents([Document("a", ("é" * size).encode())])
    assert sum(len(part[0].text.decode()) for part in splits.values()) == size


# how it is kept


def test_a_second_call_opens_what_is_there(texts, tmp_path):
    first = corpus_of(texts, tmp_path)
    made = {p: p.stat().st_mtime_ns for p in first.folder.iterdir()}
    second = corpus_of(texts, tmp_path)
    assert second == first
    assert {p: p.stat().st_mtime_ns for p in second.folder.iterdir()} == made
    assert [p.name for p in (tmp_path / "data").iterdir()] == [first.digest]


def test_what_a_killed_process_left_half_written_is_in_nobodys_way(texts, tmp_path, monkeypatch):
    """A container gives the same process number again and again."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    digest = corpus_of(texts, tmp_path / "once").digest
    (tmp_path / "data" / f"{digest}.7").mkdir(parents=True)
    assert corpus_of(texts, tmp_path).digest == digest


def test_the_digest_follows_content_names_and_tokenizer(texts, tmp_path):
    digests = [corpus_of(texts, tmp_path).digest]
    digests.append(corpus_of(texts, tmp_path, "bpe").digest)
    digests.append(corpus_of(texts, tmp_path, "bpe", vocabulary=310).digest)
    (texts / "0.txt").rename(texts / "00.txt")
    digests.append(corpus_of(texts, tmp_path).digest)
    (texts / "00.txt").write_text(prose(99, 900), encoding="utf-8")
    digests.append(corpus_of(texts, tmp_path).digest)
    assert len(set(digests)) == len(digests)


def test_bytes_are_the_text(texts, tmp_path):
    corpus = corpus_of(texts, tmp_path)
    kept = [bytes(d.astype(np.uint8)) for split in SPLITS for d in documents_of(corpus, split)]
    assert sorted(kept) == sorted(d.text for d in read_documents(texts))
    assert corpus.symbols.text == 256


def test_bpe_decodes_to_the_text(texts, tmp_path):
    corpus = corpus_of(texts, tmp_path, "bpe")
    tokenizer = Tokenizer.from_file(str(corpus.folder / "tokenizer.json"))
    documents = [d for split in SPLITS for d in documents_of(corpus, split)]
    kept = [tokenizer.decode(d.tolist(), skip_special_tokens=False) for d in documents]
    assert sorted(kept) == sorted(d.text.decode() for d in read_documents(texts))
    assert corpus.symbols.text == tokenizer.get_vocab_size() <= 300
    assert sum(map(len, documents)) < sum(len(d.text) for d in read_documents(texts))


def test_bpe_of_a_single_file_that_is_not_ascii(tmp_path):
    """Its regions meet between two characters, so each can be decoded."""
    path, letters = tmp_path / "one.txt", random.Random(0).choices("éèêëüñ", k=3000)
    for extra in range(4):
        path.write_text("x" * extra + "".join(letters), encoding="utf-8")
        corpus_of(path, tmp_path, "bpe")


def test_every_document_ends_with_the_end_symbol_and_holds_no_other(texts, tmp_path):
    corpus = corpus_of(texts, tmp_path)
    for split in SPLITS:
        ends = [stop for _, stop in corpus.documents(split)]
        assert np.flatnonzero(corpus.tokens(split) >= corpus.symbols.text).tolist() == ends
        assert (corpus.tokens(split)[ends] == corpus.symbols.end).all()


def test_tokens_are_mapped_not_loaded(texts, tmp_path):
    tokens = corpus_of(texts, tmp_path).tokens("train")
    assert isinstance(tokens, np.memmap)
    assert not tokens.flags.writeable


# what is drawn


def test_held_out_windows_lie_inside_one_document(texts, tmp_path):
    corpus = corpus_of(texts, tmp_path)
    windows = corpus.held_out_windows("validation", 40, 97)
    texts_held_out = [d.astype(np.int64).tobytes() for d in documents_of(corpus, "validation")]
    assert windows.shape == (40, 97)
    for window in windows:
        assert any(window.numpy().tobytes() in text for text in texts_held_out)


def test_held_out_windows_are_the_same_for_every_caller(texts, tmp_path):
    corpus = corpus_of(texts, tmp_path)
    first = corpus.held_out_windows("validation", 8, 97)
    torch.manual_seed(5)
    assert torch.equal(Corpus.open(corpus.folder).held_out_windows("validation", 8, 97), first)
    assert not torch.equal(corpus.held_out_windows("validation", 8, 97, seed=1), first)


def test_held_out_windows_reach_both_ends_of_a_document(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(b"x" * 5000)
    corpus = corpus_of(path, tmp_path)
    ((start, stop),) = corpus.documents("validation")
    windows = corpus.held_out_windows("validation", 2, stop - start)
    assert windows.shape == (2, stop - start)


def test_random_windows_are_pieces_of_the_split_that_the_generator_decides(texts, tmp_path):
    corpus = corpus_of(texts, tmp_path)
    draws = [
        corpus.random_windows("train", 6, 49, torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    whole = corpus.tokens("train").astype(np.int64).tobytes()
    assert all(window.numpy().tobytes() in whole for window in draws[0])


# what is refused, before anything is written


def refused(tmp_path: Path, data: Path, error=ValueError, **options) -> str:
    """The message; nothing may have been left behind."""
    with pytest.raises(error) as raised:
        corpus_of(data, tmp_path / "out", **options)
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert left == []
    return str(raised.value)


def test_a_path_that_is_not_there(tmp_path):
    message = refused(tmp_path, tmp_path / "nowhere", FileNotFoundError)
    assert message == f"--data {tmp_path}/nowhere: there is no such file or folder"


def test_a_folder_without_text(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"\x89PNG\0")
    assert refused(tmp_path, folder) == f"--data {folder} holds no text"


def test_a_binary_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)) * 10)
    assert refused(tmp_path, path) == f"--data {path} is not text (UTF-8)"


def test_a_file_in_another_encoding(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("là-bas ".encode("latin-1") * 1000)
    assert refused(tmp_path, path) == f"--data {path} is not text (UTF-8)"


def test_an_empty_file(tmp_path):
    path = tmp_path / "a.txt"
    path.touch()
    assert refused(tmp_path, path) == f"--data {path} is empty"


def test_a_file_that_cannot_be_read(texts, tmp_path, monkeypatch):
    read = Path.read_bytes

    def failing(path):
        if path.name == "3.txt":
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    message = refused(tmp_path, texts, OSError)
    assert message == f"--data: {texts}/3.txt cannot be read: Input/output error"


def test_a_text_shorter_than_one_context(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("too short. " * 10)
    message = refused(tmp_path, path)
    assert "a.txt is too short" in message
    assert "one context needs 49" in message


def test_no_document_long_enough_for_the_longest_evaluation(texts, tmp_path):
    message = refused(tmp_path, texts, longest=50_000)
    longest = max(path.stat().st_size for path in texts.rglob("*.txt"))
    assert "the 50000 tokens that the longest evaluation needs" in message
    assert "ask for smaller --multiples" in message
    assert int(message.split("the longest has ")[1].split(")")[0]) <= longest


def test_no_document_long_enough_to_choose_the_learning_rate_by(tmp_path):
    """The remedy is another text; smaller multiples would change nothing."""
    folder = tmp_path / "crumbs"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i}.txt").write_text("forty bytes of text, not one more, no.\n")
    message = refused(tmp_path, folder)
    assert "--multiples" not in message
    assert "49 tokens" in message


def test_a_longer_evaluation_of_a_text_that_is_prepared_is_refused_too(texts, tmp_path):
    corpus = corpus_of(texts, tmp_path)
    with pytest.raises(ValueError, match="ask for smaller --multiples"):
        corpus_of(texts, tmp_path, longest=50_000)
    assert json.loads((corpus.folder / "meta.json").read_text())["digest"] == corpus.digest


@pytest.mark.parametrize("vocabulary", [0, 255, 65_001])
def test_a_vocabulary_that_cannot_be(texts, tmp_path, vocabulary):
    message = refused(tmp_path, texts, tokenizer="bpe", vocabulary=vocabulary)
    assert message == f"a BPE vocabulary has 256 to 65000 tokens, got {vocabulary}"
