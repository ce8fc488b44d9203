"""Documents and the rows they are packed into: none lost, none mixed, the same after a restart."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import DataError, check_corpus, load_corpus
from experiments.data.documents import starts_in
from experiments.data.packed import PackedBatches, PackedRows, packed_validation_batches
from tests.experiments.packing import join


def rows_of(lengths, seq_len) -> PackedRows:
    """Returns rows over documents; a token says its document and its place in it."""
    documents = [1000 * i + np.arange(n, dtype=np.uint32) for i, n in enumerate(lengths)]
    tokens, starts = join(documents)
    return PackedRows(tokens=tokens, starts=starts, seq_len=seq_len)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 20))
@settings(max_examples=200)
def test_rows_hold_every_token_once_and_know_its_document(lengths, seq_len):
    if sum(lengths) < seq_len + 1:
        with pytest.raises(DataError, match="fill no row"):
            rows_of(lengths, seq_len)
        return
    rows = rows_of(lengths, seq_len)
    inputs = np.concatenate([rows[row][0][:-1] for row in range(len(rows))])
    np.testing.assert_array_equal(inputs, rows.tokens[: len(inputs)])
    assert 0 < len(rows.tokens) - len(inputs) <= seq_len
    for row in range(len(rows)):
        tokens, ids = rows[row]
        assert tokens.dtype == ids.dtype == np.int32 and tokens.shape == ids.shape == (seq_len + 1,)
        documents = tokens // 1000
        np.testing.assert_array_equal(ids, documents - documents[0])
        if row + 1 < len(rows):
            assert tokens[-1] == rows[row + 1][0][0]


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    rows = rows_of([7] * 40, seq_len=8)
    every = [int(rows[row][0][0]) for row in range(len(rows))]

    def firsts(seed):
        batches = PackedBatches(rows=rows, batch_size=5, seed=seed)
        return np.concatenate([batches.at(step)[0][:, 0] for step in range(14)])

    seen = firsts(3)
    epochs = seen[: len(rows)], seen[len(rows) : 2 * len(rows)]
    assert len(rows) == 34 and len(seen) == 70
    for epoch in epochs:
        assert sorted(epoch) == sorted(every) and list(epoch) != every
    assert list(epochs[0]) != list(epochs[1])
    # Grain adds the epoch to its seed; unmixed, seed 4 would begin with seed 3's second epoch.
    assert list(firsts(4)[: len(rows)]) not in (list(epochs[0]), list(epochs[1]))


def test_a_step_is_the_same_wherever_one_starts():
    rows = rows_of([5, 9, 2] * 20, seq_len=8)
    there = PackedBatches(rows=rows, batch_size=4, seed=1)
    before = [there.at(step) for step in range(30)]
    again = PackedBatches(rows=rows, batch_size=4, seed=1)
    for step in (29, 7, 12):
        for one, other in zip(again.at(step), before[step], strict=True):
            np.testing.assert_array_equal(one, other)


def test_parts_of_a_batch_are_its_rows():
    """Processes read the rows of their own devices: together they are the batch."""
    rows = rows_of([5, 9, 2] * 20, seq_len=8)
    batches = PackedBatches(rows=rows, batch_size=6, seed=1)
    for step in (0, 5, 40):
        parts = [batches.at(step, start, start + 2) for start in (0, 2, 4)]
        for part, whole in zip(zip(*parts, strict=True), batches.at(step), strict=True):
            np.testing.assert_array_equal(np.concatenate(part), whole)


def test_validation_rows_are_fixed_and_spread():
    rows = rows_of([5] * 40, seq_len=8)
    short = packed_validation_batches(rows, batch_size=50, max_batches=2)
    ((tokens, ids),) = short
    assert len(np.unique(tokens[:24, 0])) == len(rows) == 24
    assert (tokens[24:] == -1).all() and (ids[24:] == -1).all()
    batches = packed_validation_batches(rows, batch_size=3, max_batches=2)
    assert [tokens.shape for tokens, _ in batches] == [(3, 9)] * 2
    assert batches[0][0][0, 0] == 0 and batches[1][0][-1, 0] == rows[len(rows) - 1][0][0]


LINES = '{"text": "ab", "id": 7}\n\n{"tokens": [300, 5]}\n{"text": ""}\n{"tokens": []}\n'


def documents_of(where, end_token) -> list[list[int]]:
    """Returns the documents of a packed corpus, of both parts."""
    corpus = load_corpus(str(where), pack=True, end_token=end_token)
    parts = [(corpus.train, corpus.train_starts), (corpus.validation, corpus.validation_starts)]
    return [list(one) for tokens, starts in parts for one in np.split(tokens, starts[1:])]


def test_lines_are_documents(tmp_path):
    (tmp_path / "x.jsonl").write_text(LINES)
    (tmp_path / "y.txt").write_text("cd")
    assert documents_of(tmp_path, None) == [[97, 98, 10], [300, 5], [99, 100, 10]]
    assert documents_of(tmp_path, 256) == [[97, 98, 256], [300, 5], [99, 100, 256]]


WRONG = [
    ('{"text": "a"}\n{"text": 3}', "x.jsonl, line 2: text is int, not a string"),
    ("\n\n{text}", "x.jsonl, line 3: Expecting property name"),
    ("[1]", 'line 1: a document is {"text": "..."} or {"tokens": [...]}'),
    ('{"text": "a", "tokens": [1]}', "line 1: a document is"),
    ('{"tokens": [1, -1]}', "line 1: tokens are no list of whole numbers"),
    ('{"tokens": [true]}', "line 1: tokens are no list"),
    ('{"tokens": [4294967296]}', "line 1: tokens are no list"),
    ("1\n2\n3\n4\n5", "line 3: a document"),
    ("1\n2\n3\n4\n5", "; 2 more"),
    (b'{"text": "\xff"}', "line 1: 'utf-8' codec"),
    ('{"text": "\\ud800"}', "line 1: 'utf-8' codec can't encode character"),
]


@pytest.mark.parametrize("text, message", WRONG)
def test_lines_that_are_no_documents(text, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        load_corpus(str(path), pack=True)
    assert message in str(caught.value)


def test_an_end_token_closes_a_document():
    tokens = np.array([5, 0, 6, 7, 0, 0, 8], np.uint16)
    assert list(starts_in(tokens, 0)) == [0, 2, 5, 6]
    assert list(starts_in(tokens[:6], 0)) == [0, 2, 5]
    assert list(starts_in(tokens, None)) == [0]


def test_packed_corpora_keep_every_tenth_document_for_validation(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"tokens": [i] * 3}) + "\n" for i in range(20)))
    corpus = load_corpus(str(path), pack=True)
    assert set(corpus.validation) == {9, 19} and len(corpus.train) == 18 * 3
    assert list(corpus.train_starts) == list(range(0, 54, 3))
    assert list(corpus.validation_starts) == [0, 3]
    assert "18 training and 2 validation documents" in corpus.summary


def test_a_token_file_is_cut_between_documents(tmp_path):
    tokens = np.tile(np.array([4, 5, 6, 0], np.uint16), 25)
    np.save(tmp_path / "x.npy", tokens)
    corpus = load_corpus(str(tmp_path / "x.npy"), pack=True, end_token=0)
    assert len(corpus.train) == 92 and len(corpus.validation) == 8
    assert list(corpus.validation_starts) == [0, 4] and len(corpus.train_starts) == 23
    whole = load_corpus(str(tmp_path / "x.npy"), pack=True)
    assert len(whole.train) == 90 and list(whole.validation_starts) == [0]


@pytest.mark.parametrize("end_token, count", [(0, 4), (9, 1), (None, 1)])
def test_an_end_token_that_never_occurs(end_token, count, tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.array([5, 0, 6, 7, 0, 0, 8] + [1] * 33, np.uint16))
    if end_token == 9:
        with pytest.raises(DataError, match=r"end token 9 is nowhere in '.*x\.npy'.*--end-token"):
            load_corpus(str(path), pack=True, end_token=end_token)
    else:
        corpus = load_corpus(str(path), pack=True, end_token=end_token)
        assert len(corpus.train_starts) == count
    # Whoever ends with it has one document.
    np.save(path, np.array([5] * 39 + [9], np.uint16))
    assert len(load_corpus(str(path), pack=True, end_token=9).train_starts) == 1


def test_documents_of_one_token_have_nothing_to_predict(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"tokens": [1]}\n' * 200)
    corpus = load_corpus(str(path), pack=True)
    with pytest.raises(DataError, match="no document of the train part has a second token"):
        check_corpus(corpus, seq_len=8, vocab_size=256)
    path.write_text('{"tokens": [1]}\n' * 100 + '{"tokens": [1, 2]}\n' * 100)
    check_corpus(load_corpus(str(path), pack=True), seq_len=8, vocab_size=256)


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.ndjson", "x.json", "x.txt", "x"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_lines_are_told_by_their_first_line(name, mark, tmp_path):
    """Alone or beside other text, they are read as documents or not at all."""
    path = tmp_path / name
    path.write_bytes(mark + LINES.replace("\n", "\r\n").encode())
    assert documents_of(path, None) == [[97, 98, 10], [300, 5]]
    with pytest.raises(DataError, match=rf"{name} is JSON Lines; --pack reads its documents"):
        load_corpus(str(path))
    (tmp_path / "README.md").write_text("About these files")
    with pytest.raises(DataError, match=rf"{name} is JSON Lines"):
        load_corpus(str(tmp_path))


NOT_LINES = ['{"name": "a", "version": 1}', '{\n  "text": "a"\n}', "{}", "{ return 1 }\n{ 2 }"]


@pytest.mark.parametrize("text", NOT_LINES)
def test_other_text_with_braces_is_text(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    assert load_corpus(str(tmp_path / "x.json")).num_tokens == len(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"content": "a"}\n{"content": "b"}', "is JSON Lines"),
        ('{"text": "a\n{"text": "b"}', "is JSON Lines"),  # torn
        ('[{"text": "a"},\n{"text": "b"}]', "is one JSON array of documents"),
    ],
)
def test_markup_around_documents_is_not_trained_on(text, message, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_corpus(str(tmp_path / "x.json"))
