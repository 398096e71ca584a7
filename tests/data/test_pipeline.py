"""The batches are the same for any number of processes and workers, and a state continues them exactly."""

import collections
import dataclasses
import json
import pathlib
import types

import numpy as np
import pytest

from lm.data import Bytes, DataConfig, DataError, Files, SentencePiece, load_tokenizer, merge_states
from lm.data import train_batches as open_training
from lm.data import validation_batches as open_validation
from tests.data.objective import Chunks, Copy, Places

TOKENIZER = Bytes(num_sentinels=2).build(None)


def write(path, count, length=30, mark="t"):
    """Documents of different lengths, each with its own letters."""
    texts = [f"{mark}{number} " + "abcdefgh"[number % 8] * (number * 7 % length) for number in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def config(tmp_path):
    return DataConfig(
        source=write(tmp_path / "a.jsonl", 60),
        tokenizer=Bytes(num_sentinels=2),
        sequence_length=16,
        encoder_length=12,
        validation_fraction=0.2,
        window=4,
        shuffle_rows=3,
        prefetch=0,
    )


@pytest.fixture
def mixture(config, tmp_path):
    sources = (
        Files(paths=(write(tmp_path / "b.jsonl", 40, mark="b"),), weight=3.0),
        Files(paths=(write(tmp_path / "c.jsonl", 25, mark="c"),), weight=1.0),
    )
    return dataclasses.replace(config, source="", sources=sources)


def take(batches, count=None):
    """The next batches, as a list of ({field: array}, ids)."""
    found = []
    while count is None or len(found) < count:
        try:
            batch = next(batches)
        except StopIteration:
            break
        fields = {name: array for name, array in batch._asdict().items() if array is not None}
        found.append((fields, batches.document_ids()))
    return found


def run(config, objective, batch_size, count, opener=open_training, **process):
    batches = opener(config, objective, TOKENIZER, batch_size, **process)
    found = take(batches, count)
    batches.close()
    return found


def same(first, second):
    assert len(first) == len(second)
    for (fields, ids), (other_fields, other_ids) in zip(first, second, strict=True):
        assert fields.keys() == other_fields.keys()
        for name, array in fields.items():
            np.testing.assert_array_equal(array, other_fields[name], err_msg=name)
        assert ids == other_ids


def join(parts):
    """The global batches of several processes."""
    found = []
    for items in zip(*parts, strict=True):
        fields = {name: np.concatenate([item[0][name] for item in items]) for name in items[0][0]}
        found.append((fields, [name for item in items for name in item[1]]))
    return found


def differ(first, second):
    return any(not np.array_equal(a[0]["inputs"], b[0]["inputs"]) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("objective", [Chunks(), Copy()], ids=["chunks", "copy"])
@pytest.mark.parametrize("process_count", [2, 4])
def test_training_does_not_depend_on_the_number_of_processes(config, mixture, objective, process_count):
    for settings in (config, mixture):
        whole = run(settings, objective, 4, 30)
        parts = [
            run(settings, objective, 4, 30, process_index=index, process_count=process_count)
            for index in range(process_count)
        ]
        same(join(parts), whole)


def test_a_process_reads_only_its_share(config):
    config = dataclasses.replace(config, window=4, validation_fraction=0.0)
    read = [set() for _ in range(2)]
    for index in range(2):
        batches = open_training(config, Chunks(), TOKENIZER, 4, process_index=index, process_count=2)
        # Few enough that no lane is through its windows of the first epoch.
        for _, ids in take(batches, 5):
            read[index] |= set(ids)
    assert not read[0] & read[1]
    assert min(map(len, read)) >= 8


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 7, 20])
def test_resuming_continues_exactly_and_twice_in_a_row(mixture, stop, prefetch):
    settings = dataclasses.replace(mixture, prefetch=prefetch)
    unbroken = run(settings, Copy(), 3, stop + 11)
    first = open_training(settings, Copy(), TOKENIZER, 3)
    take(first, stop)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    second = open_training(settings, Copy(), TOKENIZER, 3)
    second.set_state(state)
    same(take(second, 5), unbroken[stop : stop + 5])
    state = json.loads(json.dumps(second.get_state()))
    second.close()
    third = open_training(settings, Copy(), TOKENIZER, 3)
    third.set_state(state)
    same(take(third, 6), unbroken[stop + 5 :])
    # Going back with the same object, whose threads have made batches ahead.
    third.set_state(state)
    same(take(third, 6), unbroken[stop + 5 :])
    third.close()


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 4), (4, 2)])
def test_a_state_fits_another_number_of_processes(mixture, before, after):
    unbroken = run(mixture, Copy(), 4, 14)
    states = []
    for index in range(before):
        batches = open_training(mixture, Copy(), TOKENIZER, 4, process_index=index, process_count=before)
        take(batches, 9)
        states.append(json.loads(json.dumps(batches.get_state())))
    merged, parts = merge_states(states[::-1]), []
    for index in range(after):
        batches = open_training(mixture, Copy(), TOKENIZER, 4, process_index=index, process_count=after)
        batches.set_state(merged)
        parts.append(take(batches, 5))
    same(join(parts), unbroken[9:])


def test_states_that_do_not_fit(config, mixture):
    batches = [open_training(config, Chunks(), TOKENIZER, 4, process_index=i, process_count=2) for i in range(2)]
    states = [one.get_state() for one in batches]
    with pytest.raises(ValueError, match="holds rows 2 to 4 of each batch, rows 0 to 2 are needed: merge"):
        batches[0].set_state(states[1])
    with pytest.raises(ValueError, match="batch_size 4, now it is 8"):
        open_training(config, Chunks(), TOKENIZER, 8).set_state(states[0])
    with pytest.raises(ValueError, match="was saved with documents"):
        open_training(mixture, Chunks(), TOKENIZER, 4).set_state(states[0])
    with pytest.raises(ValueError, match="hold 2 of 4 rows"):
        merge_states(states[:1])
    next(batches[0])
    with pytest.raises(ValueError, match="not saved at one step"):
        merge_states([batches[0].get_state(), states[1]])


def test_a_thread_does_not_change_the_batches(mixture):
    same(run(dataclasses.replace(mixture, prefetch=4), Copy(), 3, 20), run(mixture, Copy(), 3, 20))


@pytest.mark.parametrize("num_workers", [2])
def test_worker_processes_do_not_change_the_batches(mixture, num_workers):
    plain = run(mixture, Copy(), 3, 12)
    settings = dataclasses.replace(mixture, prefetch=2, num_workers=num_workers)
    batches = open_training(settings, Copy(), TOKENIZER, 3)
    same(take(batches, 5), plain[:5])
    state = json.loads(json.dumps(batches.get_state()))
    batches.close()
    # A state goes on with workers, and a state of workers without them.
    batches = open_training(settings, Copy(), TOKENIZER, 3)
    batches.set_state(state)
    same(take(batches, 2), plain[5:7])
    batches.close()
    batches = open_training(mixture, Copy(), TOKENIZER, 3)
    batches.set_state(state)
    same(take(batches, 7), plain[5:])


def all_passed(state, num_epochs):
    """Whether each lane is through its windows of the first epochs."""
    per_epoch = [-(-documents // size) for documents, size in zip(state["documents"], state["windows"], strict=True)]
    return all(
        lane + state["batch_size"] * cursor[0] >= num_epochs * windows
        for lane, cursors in enumerate(state["cursors"])
        for cursor, windows in zip(cursors, per_epoch, strict=True)
    )


@pytest.mark.parametrize("batch_size", [1, 3, 8, 80])
def test_every_document_comes_once_an_epoch(mixture, batch_size):
    settings = dataclasses.replace(mixture, validation_fraction=0.0)
    batches = open_training(settings, Places(), TOKENIZER, batch_size)
    seen = collections.Counter()
    documents = collections.defaultdict(set)
    while not all_passed(batches.get_state(), 2):
        batch = next(batches)
        places = batch.targets.reshape(-1)[(batch.segment_ids > 0).reshape(-1)].reshape(-1, 2)
        seen.update(map(tuple, places.tolist()))
        for (epoch, _), name in zip(places.tolist(), batches.document_ids(), strict=True):
            documents[epoch].add(name)
    assert max(seen.values()) == 1
    for epoch in range(2):
        assert {index for found, index in seen if found == epoch} == set(range(65))
        assert len(documents[epoch]) == 65


def _texts(config):
    with open(config.source) as file:
        return [json.loads(line)["text"] for line in file]


@pytest.mark.parametrize("num_epochs", [1, 2])
@pytest.mark.parametrize("process_count", [1, 2])
def test_a_number_of_epochs_has_every_target_as_often(mixture, num_epochs, process_count):
    sources = tuple(dataclasses.replace(source, weight=1.0) for source in mixture.sources)
    settings = dataclasses.replace(mixture, sources=sources, validation_fraction=0.0, num_epochs=num_epochs)
    parts = [
        run(settings, Chunks(), 4, None, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    seen = collections.Counter()
    for fields, _ in join(parts):
        seen += collections.Counter(fields["targets"][fields["weights"] > 0].tolist())
    expected = collections.Counter()
    for source in sources:
        for text in _texts(types.SimpleNamespace(source=source.paths[0])):
            expected += collections.Counter(TOKENIZER.encode(text).tolist() * num_epochs)
    assert seen == expected


def test_a_number_of_epochs_resumes(mixture):
    sources = tuple(dataclasses.replace(source, weight=1.0) for source in mixture.sources)
    settings = dataclasses.replace(mixture, sources=sources, num_epochs=2)
    unbroken = run(settings, Copy(), 4, None)
    batches = open_training(settings, Copy(), TOKENIZER, 4)
    take(batches, 5)
    again = open_training(settings, Copy(), TOKENIZER, 4)
    again.set_state(json.loads(json.dumps(merge_states([batches.get_state()]))))
    same(take(again), unbroken[5:])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("process_count", [1, 2])
@pytest.mark.parametrize("batch_size", [2, 6, 16, 400])
def test_evaluation_covers_every_target_once(mixture, batch_size, process_count, packing):
    settings = dataclasses.replace(mixture, packing=packing)

    def rows(size, count):
        parts = [
            run(settings, Chunks(), size, None, open_validation, process_index=index, process_count=count)
            for index in range(count)
        ]
        batches = join(parts)
        fields = {name: np.concatenate([batch[name] for batch, _ in batches]) for name in batches[0][0]}
        filled = fields["segment_ids"].any(1)
        # Only the last batch is filled up.
        assert (np.flatnonzero(~filled) >= (len(batches) - 1) * size).all()
        assert not fields["weights"][~filled].any()
        return {name: array[filled] for name, array in fields.items()}

    found, expected = rows(batch_size, process_count), rows(1, 1)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_evaluation_keeps_the_order_of_the_corpus(config):
    single = dataclasses.replace(config, packing=False)
    numbers = [int(n.split("#")[1]) for _, names in run(single, Chunks(), 4, None, open_validation) for n in names]
    assert numbers == sorted(numbers)


def test_both_sides_of_the_split_are_the_corpus(config):
    training = dataclasses.replace(config, num_epochs=1)
    ids = [name for _, names in run(training, Chunks(), 4, None) for name in names]
    held_out = [name for _, names in run(config, Chunks(), 4, None, open_validation) for name in names]
    assert not set(ids) & set(held_out)
    assert set(ids) | set(held_out) == {f"a.jsonl#{number}" for number in range(60)}
    assert 4 <= len(set(held_out)) <= 20


def test_evaluating_all_of_a_corpus(config):
    everything = dataclasses.replace(config, validation_fraction=1.0)
    held_out = {name for _, names in run(everything, Chunks(), 4, None, open_validation) for name in names}
    assert len(held_out) == 60
    with pytest.raises(DataError, match="no training document: 60 document"):
        open_training(everything, Chunks(), TOKENIZER, 4)


def test_orders_differ_by_epoch_and_seed(config):
    other = dataclasses.replace(config, seed=1)
    assert differ(run(config, Chunks(), 4, 10), run(other, Chunks(), 4, 10))
    twice = run(dataclasses.replace(config, num_epochs=2), Chunks(), 1, None)
    half = len(twice) // 2
    assert [ids for _, ids in twice[:half]] != [ids for _, ids in twice[half : 2 * half]]


def test_proportions_of_a_mixture_are_those_of_rows(mixture):
    counts = collections.Counter()
    for fields, ids in run(mixture, Chunks(), 4, 100):
        names = iter(ids)
        for row in fields["segment_ids"]:
            counts[next(names).split("#")[0]] += 1
            for _ in range(row.max() - 1):
                next(names)
    assert abs(counts["b.jsonl"] - 300) <= 4
    assert abs(counts["1/c.jsonl"] - 100) <= 4


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_corpus_smaller_than_a_batch_is_repeated(config, tmp_path, count):
    small = dataclasses.replace(config, source=write(tmp_path / "s.jsonl", count), validation_fraction=0.0)
    found = run(small, Chunks(), 16, 3)
    assert all((fields["segment_ids"].any(1)).all() for fields, _ in found)
    assert {name for _, ids in found for name in ids} == {f"s.jsonl#{number}" for number in range(count)}


def test_no_example_at_all(config, tmp_path):
    (tmp_path / "e.jsonl").write_text('{"text": ""}\n' * 9)
    empty = dataclasses.replace(config, source=str(tmp_path / "e.jsonl"))
    with pytest.raises(DataError, match=r"no training example results from \d document"):
        run(empty, Chunks(), 2, 1)
    with pytest.raises(DataError, match="no training example results"):
        run(empty, Chunks(), 2, 1, open_validation)
    # A few empty documents are passed over.
    (tmp_path / "e.jsonl").write_text('{"text": ""}\n' * 30 + '{"text": "one"}\n')
    mostly = dataclasses.replace(config, source=str(tmp_path / "e.jsonl"), validation_fraction=0.0)
    found = run(mostly, Chunks(), 8, 4)
    assert all(fields["weights"].sum() == 24 for fields, _ in found)


def test_an_empty_split_says_the_numbers(config, tmp_path):
    one = dataclasses.replace(config, source=write(tmp_path / "one.jsonl", 1))
    with pytest.raises(DataError, match=r"no validation document: data\.validation_fraction is 0\.2, .* 1 document"):
        open_validation(one, Chunks(), TOKENIZER, 2)


def test_bad_data_stop_the_batches_with_their_place(config, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    for prefetch in (0, 2):
        bad = dataclasses.replace(config, source=str(path), prefetch=prefetch, validation_fraction=0.0)
        batches = open_training(bad, Chunks(), TOKENIZER, 2)
        with pytest.raises(DataError, match=r"bad\.jsonl:2 is not valid JSON"):
            take(batches, 5)
        with pytest.raises(ValueError, match="closed"):
            next(batches)


def test_rows_must_be_divisible_among_processes(config):
    with pytest.raises(ValueError, match="batch_size 3 is not a positive multiple of the 2 processes"):
        open_training(config, Chunks(), TOKENIZER, 3, process_index=0, process_count=2)


def test_statistics_ids_and_digests(config):
    batches = open_training(config, Chunks(), TOKENIZER, 4)
    found, digests = [], []
    for _ in range(6):
        found.append(next(batches))
        digests.append(batches.digest())
    statistics = batches.statistics()
    tokens = sum(int((batch.segment_ids > 0).sum()) for batch in found)
    assert statistics["tokens"] == tokens
    assert statistics["padding_fraction"] == pytest.approx(1 - tokens / (6 * 4 * 16))
    assert statistics["batches"] == 6
    assert statistics["tokens_per_second"] > 0
    assert 0 < statistics["epochs"] < 3
    # The share of the documents that were read, one row of a long document or not.
    read = {name for _, names in run(config, Chunks(), 4, 6) for name in names}
    assert statistics["epochs"] == pytest.approx(len(read) / 48, abs=0.3)
    assert len(set(digests)) == 6
    again = open_training(config, Chunks(), TOKENIZER, 4)
    next(again)
    assert again.digest() == digests[0]
    assert len(again.document_ids()) == sum(row.max() for row in found[0].segment_ids)
    again.close()
    with pytest.raises(ValueError, match="closed"):
        next(again)


def test_the_cache_does_not_change_the_batches(config):
    cold = dataclasses.replace(config, cache_megabytes=0)
    same(run(config, Copy(), 4, 40), run(cold, Copy(), 4, 40))


def test_a_tokenizer_sees_training_documents_only(mixture):
    class Choice:
        def build(self, text):
            self.seen = list(text.sample(10**9))
            self.some = list(text.sample(200))
            return TOKENIZER

    choice = Choice()
    load_tokenizer(choice, mixture, pathlib.Path(mixture.sources[0].paths[0]).parent / "t")
    single = dataclasses.replace(mixture, sources=tuple(dataclasses.replace(s, weight=1.0) for s in mixture.sources))
    names = {name for _, ids in run(dataclasses.replace(single, num_epochs=1), Chunks(), 2, None) for name in ids}
    assert len(choice.seen) == len(set(choice.seen)) == len(names) < 65
    assert choice.some == choice.seen[: len(choice.some)]
    assert 200 <= sum(map(len, choice.some)) < 240


def test_a_tokenizer_is_trained_once(config, tmp_path):
    path = tmp_path / "w.jsonl"
    path.write_text("".join(json.dumps({"text": f"word{number} " * 20}) + "\n" for number in range(100)))
    choice = SentencePiece(vocab_size=340, num_sentinels=2, character_coverage=1.0)
    settings = dataclasses.replace(config, source=str(path), tokenizer=choice)
    with pytest.raises(DataError, match="holds no whole tokenizer"):
        load_tokenizer(choice, None, tmp_path / "t")
    first = load_tokenizer(choice, settings, tmp_path / "t")
    path.unlink()
    again = load_tokenizer(choice, None, tmp_path / "t")
    assert again.fingerprint == first.fingerprint == load_tokenizer(choice, settings, tmp_path / "t").fingerprint
